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
from dmdr_train.checkpoint import FAKE_SCORE, GENERATOR, load_weights, newest
from dmdr_train.data import ClassLabels
from dmdr_train.draws import named_generator
from dmdr_train.engines import make_engine
from dmdr_train.objectives import DistributionMatching, Objective, ReFL
from dmdr_train.trainer import Trainer


@dataclass
class Session:
    """The pieces of a run on this process."""

    settings: recipe.Recipe
    family: Family
    trainer: Trainer
    device: torch.device


def build(settings: recipe.Recipe, device: torch.device) -> Session:
    """Load the models and make the two engines. The process group must be up."""
    family = dmdr_models.load(settings.model.family, settings.model.path, vae=settings.model.vae).to(device)
    optim, steps = settings.optim, settings.run.steps
    networks = {"generator": make_generator(settings, family), "fake_score": make_guidance(settings, family)}
    if settings.run.init_from is not None:
        source = newest("run.init_from", settings.run.init_from)
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
    return Session(settings, family, trainer, device)


def make_generator(settings: recipe.Recipe, family: Family) -> nn.Module:
    network = family.load_network(settings.model.generator)
    if settings.model.generator_lora is None:
        network.requires_grad_(True)
    else:
        network = add_lora(network, settings.model.generator_lora, family, settings.run.seed, "generator")
    if settings.model.gradient_checkpointing:
        checkpointed(network)
    return network.eval()


def make_guidance(settings: recipe.Recipe, family: Family) -> nn.Module:
    """Teacher and fake score in one network: the frozen teacher with a LoRA of variable scale."""
    network = add_lora(family.load_network(), settings.model.fake_score_lora, family, settings.run.seed, "fake_score")
    if settings.model.gradient_checkpointing:
        checkpointed(network)
    return network.eval()


def add_lora(network: nn.Module, lora: recipe.Lora, family: Family, seed: int, role: str) -> LoRANetwork:
    return LoRANetwork(
        network, lora.rank, lora.alpha, lora.targets or family.lora_targets, named_generator(seed, "lora", role)
    )


def checkpointed(network: nn.Module) -> None:
    base: Any = network.network if isinstance(network, LoRANetwork) else network
    base.enable_gradient_checkpointing()


def make_objectives(settings: recipe.Recipe, family: Family, guidance: Any, device: torch.device) -> list[Objective]:
    objectives: list[Objective] = []
    for objective in settings.objectives:
        if isinstance(objective, recipe.DistributionMatching):
            objectives.append(DistributionMatching(objective, settings.guidance, family, guidance))
        else:
            objectives.append(ReFL(objective, family, make_reward(objective.reward, device)))
    return objectives


def make_reward(reward: recipe.Reward, device: torch.device) -> Any:
    import dmdr_rewards

    return dmdr_rewards.create(reward.name, checkpoint=reward.checkpoint, device=device, **reward.options)


def make_prompts(settings: recipe.Recipe, family: Family) -> ClassLabels:
    assert family.num_classes is not None
    classes = settings.data.classes
    return ClassLabels(list(range(family.num_classes)) if classes == "all" else classes)
