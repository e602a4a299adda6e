"""Building a run from its recipe: family, networks, engines, objectives, trainer."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import dmdr_models
import torch
import torch.distributed as dist
from dmdr_models.family import Family
from dmdr_models.lora import LoRANetwork
from torch import nn

from dmdr_train import recipe
from dmdr_train.checkpoint import FAKE_SCORE, GENERATOR, load_weights
from dmdr_train.draws import named_generator
from dmdr_train.embeddings import EmbeddingCache
from dmdr_train.engines import DTYPES, agreed, make_engine, mean_over_processes
from dmdr_train.errors import UserError, naming
from dmdr_train.objectives import SRPO, DistributionMatching, Objective, ReFL, Regression
from dmdr_train.pairs import Pairs
from dmdr_train.prompts import ClassLabels, Prompts, text_prompts
from dmdr_train.resume import newest_verified
from dmdr_train.trainer import Trainer
from dmdr_train.views import View

# A VAE in fp16 overflows.
FAMILY_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float32}


@dataclass
class Session:
    """The pieces of a run on this process."""

    family: Family
    trainer: Trainer
    device: torch.device

    @property
    def rewards(self) -> list[Any]:
        """Those that objectives train on, each once."""
        rewards = [objective.scorer for objective in self.trainer.objectives if hasattr(objective, "scorer")]
        return list({reward.info.name: reward for reward in rewards}.values())


def build(settings: recipe.Recipe, device: torch.device, resumed: bool = False) -> Session:
    """Load the models and make the two engines. The process group must be up.

    Args:
        resumed: a checkpoint will be loaded, whose networks take the place of those of `run.init_from`.
    """
    family = load_family(settings).to(device)
    with naming("rollout.shift"):
        family.grid(settings.rollout.steps, settings.rollout.shift)
    optim = settings.optim
    pairs = None
    if settings.data.pairs is not None:
        pairs = Pairs(settings.data.pairs, family.latent_shape, optim.batch_size, device)
    networks = make_networks(settings, family, device)
    if settings.run.init_from is not None and not resumed:
        source = agreed(lambda: newest_verified("run.init_from", str(settings.run.init_from)))
        load_weights("run.init_from", source / GENERATOR, networks.generator)
        load_weights("run.init_from", source / FAKE_SCORE, networks.fake_score)
    offload = settings.memory.offload_optimizer
    generator = make_engine(networks.generator, optim, optim.generator, settings.run.steps, device, offload)
    updates = len(settings.matching) * settings.guidance.ratio
    guidance_engine = make_engine(networks.fake_score, optim, optim.fake_score, updates, device, offload)
    with naming("memory.reward_crop"):
        view = View(family, settings.memory)
    trainer = Trainer(
        settings,
        family,
        generator,
        guidance_engine,
        make_objectives(settings, family, guidance_engine, device),
        make_prompts(settings, family),
        view,
        device,
        dist.get_rank(),
        dist.get_world_size(),
        mean_over_processes,
        pairs,
    )
    return Session(family, trainer, device)


def load_family(settings: recipe.Recipe, dtype: torch.dtype | None = None) -> Family:
    """The family of a recipe, in the precision that it trains in or in `dtype`."""
    model, memory = settings.model, settings.memory
    options = {"vae": model.vae, "resolution": model.resolution, "max_tokens": model.max_tokens}
    with naming("model.path"):
        family = dmdr_models.load(
            model.family,
            model.path,
            dtype=dtype or FAMILY_DTYPES[settings.optim.precision],
            **{name: value for name, value in options.items() if value is not None},
        )
    with naming("model.path" if model.vae is None else "model.vae"):
        assert family.vae  # opens the decoder, which would else be missed after hours
    switches = {
        "vae_checkpointing": "vae" in memory.gradient_checkpointing,
        "vae_tiling": memory.vae_tiling,
        "vae_slicing": memory.vae_slicing,
        "offload_text": memory.offload_text_encoders,
    }
    family.save_memory(**{name: True for name, on in switches.items() if on})
    if settings.data.embeddings is not None:
        with naming("data.embeddings"):
            family.text = EmbeddingCache(settings.data.embeddings)
    return family


def load_network(model: recipe.Model, family: Family, generator: bool = False) -> nn.Module:
    """The teacher's network, or the one that the generator starts from.

    One whose own weights are trained comes in float32: the optimizer keeps its master copy of them.
    """
    weights = model.generator if generator else None
    full = generator and model.generator_lora is None
    with naming("model.path" if weights is None else "model.generator"):
        return family.load_network(weights, torch.float32 if full else None)


class Networks(NamedTuple):
    """What the two engines train: the generator, and teacher and fake score in one network with a LoRA."""

    generator: nn.Module
    fake_score: nn.Module


def make_networks(settings: recipe.Recipe, family: Family, device: torch.device) -> Networks:
    """Two adapters on one frozen network where that can be, otherwise two networks."""
    if settings.shares_backbone:
        base = prepared(load_network(settings.model, family), settings)
        # The engines see the adapters alone. diffusers' own `to` warns of layers to keep in float32, where none are.
        base = nn.Module.to(base, device, DTYPES[settings.optim.precision])
        lora = settings.model.generator_lora
        assert lora is not None
        return Networks(
            add_lora(base, lora, family, settings.run.seed, "generator", shared=True).to(device),
            add_lora(base, settings.model.fake_score_lora, family, settings.run.seed, "fake_score", shared=True).to(
                device
            ),
        )
    generator = make_generator(settings, family)
    guidance = prepared(load_network(settings.model, family), settings)
    guidance = add_lora(guidance, settings.model.fake_score_lora, family, settings.run.seed, "fake_score")
    return Networks(generator.to(device), guidance.to(device))


def make_generator(settings: recipe.Recipe, family: Family) -> nn.Module:
    """The generator alone, as an engine of its own trains it."""
    network = prepared(load_network(settings.model, family, generator=True), settings)
    if settings.model.generator_lora is None:
        return network.requires_grad_(True)
    return add_lora(network, settings.model.generator_lora, family, settings.run.seed, "generator")


def prepared(network: Any, settings: recipe.Recipe) -> Any:
    if "network" in settings.memory.gradient_checkpointing:
        network.enable_gradient_checkpointing()
    return network.eval()


def add_lora(
    network: nn.Module, lora: recipe.Lora, family: Family, seed: int, role: str, shared: bool = False
) -> LoRANetwork:
    draws = named_generator(seed, "lora", role)
    with naming(f"model.{role}_lora.targets"):
        return LoRANetwork(
            network, lora.rank, lora.alpha, lora.targets or family.lora_targets, draws, role, shared
        ).eval()


def make_objectives(settings: recipe.Recipe, family: Family, guidance: Any, device: torch.device) -> list[Objective]:
    """Distribution matching first: the others' automatic weights follow it."""
    objectives: list[Objective] = []
    for i, (name, objective) in enumerate(zip(settings.names, settings.objectives, strict=True)):
        key = f"objectives.{i}.reward"
        if isinstance(objective, recipe.DistributionMatching):
            objectives.insert(0, DistributionMatching(objective, settings.guidance, family, guidance))
        elif isinstance(objective, recipe.Regression):
            objectives.append(Regression(objective))
        elif isinstance(objective, recipe.ReFL):
            objectives.append(ReFL(objective, make_reward(key, objective.reward, settings, family, device), name))
        else:
            objectives.append(SRPO(objective, make_reward(key, objective.reward, settings, family, device), name))
    return objectives


def make_reward(key: str, reward: recipe.Reward, settings: recipe.Recipe, family: Family, device: torch.device) -> Any:
    """A reward of the recipe, as `dmdr_rewards.create` makes it; UserErrors name `key`."""
    import dmdr_rewards

    options = dict(reward.options)
    if "rewards" in settings.memory.gradient_checkpointing and dmdr_rewards.describe(reward.name).differentiable:
        options["gradient_checkpointing"] = True
    if reward.checkpoint is not None:
        options["checkpoint"] = reward.checkpoint
    with naming(key):
        made = dmdr_rewards.create(reward.name, device=device, dtype=DTYPES[reward.precision], **options)
    if isinstance(made, dmdr_rewards.TowerReward):
        made.remember_texts(0)  # what a resumed run knows differs
    known = made.info.num_classes
    if known is not None and family.num_classes is not None and known < family.num_classes:
        raise UserError(
            f"{key}.checkpoint",
            f"{reward.checkpoint} knows {known} classes and the model has {family.num_classes}; give another reward",
        )
    return made


def make_prompts(settings: recipe.Recipe, family: Family) -> Prompts:
    if family.num_classes is None:
        return text_prompts(settings.data, settings.optim.batch_size)
    classes = settings.data.classes
    return ClassLabels(list(range(family.num_classes)) if classes == "all" else classes)
