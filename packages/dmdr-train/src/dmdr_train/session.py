"""Building a run from its recipe: family, networks, engines, objectives, trainer."""

from dataclasses import dataclass
from typing import Any

import dmdr_models
import torch
import torch.distributed as dist
from dmdr_models.family import Family
from dmdr_models.lora import LoRANetwork
from torch import nn

from dmdr_train import recipe
from dmdr_train.checkpoint import FAKE_SCORE, GENERATOR, load_weights, newest, verify
from dmdr_train.data import ClassLabels
from dmdr_train.draws import named_generator
from dmdr_train.engines import make_engine
from dmdr_train.errors import UserError, naming
from dmdr_train.objectives import DistributionMatching, Objective, ReFL
from dmdr_train.trainer import Trainer


@dataclass
class Session:
    """The pieces of a run on this process."""

    family: Family
    trainer: Trainer
    device: torch.device


def build(settings: recipe.Recipe, device: torch.device) -> Session:
    """Load the models and make the two engines. The process group must be up."""
    family = load_family(settings.model).to(device)
    optim, steps = settings.optim, settings.run.steps
    networks = {"generator": make_generator(settings, family), "fake_score": make_guidance(settings, family)}
    if settings.run.init_from is not None:
        source = newest("run.init_from", settings.run.init_from)
        verify("run.init_from", source)
        load_weights("run.init_from", source / GENERATOR, networks["generator"])
        load_weights("run.init_from", source / FAKE_SCORE, networks["fake_score"])
    generator = make_engine(networks["generator"].to(device), optim, optim.generator, steps, device)
    guidance_engine = make_engine(
        networks["fake_score"].to(device), optim, optim.fake_score, steps * settings.guidance.ratio, device
    )
    trainer = Trainer(
        settings,
        family,
        generator,
        guidance_engine,
        make_objectives(settings, family, guidance_engine, device),
        make_prompts(settings, family),
        device,
        dist.get_rank(),
        dist.get_world_size(),
    )
    return Session(family, trainer, device)


def load_family(model: recipe.Model) -> Family:
    with naming("model.path"):
        family = dmdr_models.load(model.family, model.path, vae=model.vae)
    with naming("model.path" if model.vae is None else "model.vae"):
        assert family.image_size  # opens the decoder, which would else be missed after hours
    return family


def load_network(model: recipe.Model, family: Family, generator: bool = False) -> nn.Module:
    weights = model.generator if generator else None
    with naming("model.path" if weights is None else "model.generator"):
        return family.load_network(weights)


def make_generator(settings: recipe.Recipe, family: Family) -> nn.Module:
    network = load_network(settings.model, family, generator=True)
    if settings.model.generator_lora is None:
        network.requires_grad_(True)
    else:
        network = add_lora(network, settings.model.generator_lora, family, settings.run.seed, "generator")
    if settings.model.gradient_checkpointing:
        checkpointed(network)
    return network.eval()


def make_guidance(settings: recipe.Recipe, family: Family) -> nn.Module:
    """Teacher and fake score in one network: the frozen teacher with a LoRA of variable scale."""
    network = add_lora(
        load_network(settings.model, family), settings.model.fake_score_lora, family, settings.run.seed, "fake_score"
    )
    if settings.model.gradient_checkpointing:
        checkpointed(network)
    return network.eval()


def add_lora(network: nn.Module, lora: recipe.Lora, family: Family, seed: int, role: str) -> LoRANetwork:
    with naming(f"model.{role}_lora.targets"):
        return LoRANetwork(
            network, lora.rank, lora.alpha, lora.targets or family.lora_targets, named_generator(seed, "lora", role)
        )


def checkpointed(network: nn.Module) -> None:
    base: Any = network.network if isinstance(network, LoRANetwork) else network
    base.enable_gradient_checkpointing()


def make_objectives(settings: recipe.Recipe, family: Family, guidance: Any, device: torch.device) -> list[Objective]:
    objectives: list[Objective] = []
    for i, objective in enumerate(settings.objectives):
        if isinstance(objective, recipe.DistributionMatching):
            objectives.append(DistributionMatching(objective, settings.guidance, family, guidance))
        else:
            reward = make_reward(f"objectives.{i}.reward", objective.reward, family, device)
            objectives.append(ReFL(objective, family, reward))
    return objectives


def make_reward(key: str, settings: recipe.Reward, family: Family, device: torch.device) -> Any:
    import dmdr_rewards

    with naming(key):
        reward = dmdr_rewards.create(settings.name, checkpoint=settings.checkpoint, device=device, **settings.options)
    known = reward.info.num_classes
    if known is not None and family.num_classes is not None and known < family.num_classes:
        raise UserError(
            f"{key}.checkpoint",
            f"{settings.checkpoint} knows {known} classes and the model has {family.num_classes}; give another reward",
        )
    return reward


def make_prompts(settings: recipe.Recipe, family: Family) -> ClassLabels:
    assert family.num_classes is not None
    classes = settings.data.classes
    return ClassLabels(list(range(family.num_classes)) if classes == "all" else classes)
