"""Building a run from its recipe: family, networks, engines, objectives, trainer."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from dmdr_models.families.protocols import Family

from dmdr_train.base.errors import naming
from dmdr_train.checkpoint.find import newest_verified
from dmdr_train.checkpoint.load import load_weights
from dmdr_train.checkpoint.manifest import FAKE_SCORE, GENERATOR
from dmdr_train.data.pairs import Pairs
from dmdr_train.data.prompt_order import make_prompts
from dmdr_train.distributed.collectives import agreed, mean_over_processes
from dmdr_train.distributed.deepspeed_engine import make_engine
from dmdr_train.objectives.registry import make_objectives
from dmdr_train.recipe import schema
from dmdr_train.training.networks import load_family, make_networks, open_decoder
from dmdr_train.training.reward_view import View
from dmdr_train.training.trainer import Trainer


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


def build(settings: schema.Recipe, device: torch.device, resumed: bool = False) -> Session:
    """Load the models and make the two engines. The process group must be up.

    Args:
        resumed: a checkpoint will be loaded, whose networks take the place of those of `run.init_from`.
    """
    family = load_family(settings)
    open_decoder(settings, family)
    family.to(device)
    with naming("rollout.shift"):
        family.grid(settings.rollout.steps, settings.rollout.shift)
    optim = settings.optim
    pairs = None
    if settings.data.pairs is not None:
        pairs = Pairs(settings.data.pairs, family.latent_shape(*family.size), optim.batch_size, device)
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
