"""Building the trainer of a run from its recipe: family, networks, engines, objectives, rollouts."""

from pathlib import Path

import torch
import torch.distributed as dist
from dmdr_models.families.protocols import Family
from dmdr_models.networks.channels_last import channels_last
from dmdr_models.networks.lora import LoRANetwork

from dmdr_train.base.errors import naming
from dmdr_train.checkpoint.find import newest_verified
from dmdr_train.checkpoint.load import load_moments, load_weights
from dmdr_train.checkpoint.manifest import FAKE_SCORE, GENERATOR
from dmdr_train.data.pairs import Pairs
from dmdr_train.data.prompt_order import make_prompts
from dmdr_train.data.real_pictures import RealPictures
from dmdr_train.distributed.collectives import agreed, mean_over_processes
from dmdr_train.distributed.deepspeed_engine import make_engine
from dmdr_train.distributed.device import allow_tf32
from dmdr_train.objectives.from_recipe import make_objectives
from dmdr_train.recipe.schema import Recipe
from dmdr_train.training.discriminator import Discriminator
from dmdr_train.training.guide import Guide
from dmdr_train.training.networks import Networks, load_family, make_networks, open_decoder
from dmdr_train.training.reward_view import View
from dmdr_train.training.rollouts import Rollouts
from dmdr_train.training.trainer import Trainer


def build(settings: Recipe, device: torch.device, resumed: bool = False) -> Trainer:
    """Load the models, make the two engines, and put the trainer together. The process group must be up.

    Args:
        resumed: a checkpoint will be loaded, whose networks take the place of those of `run.init_from`.
    """
    allow_tf32(settings.optim, device)
    family = load_family(settings)
    objectives = make_objectives(settings, family, device)  # first: their mistakes are found before networks are read
    open_decoder(settings, family)
    family.to(device)
    with naming("rollout.shift"):
        family.grid(settings.rollout.steps, settings.rollout.shift)
    optim = settings.optim
    data, stored = settings.data, (family.latent_shape(*family.size), optim.batch_size, device)
    pairs = None if data.pairs is None else Pairs(data.pairs, *stored)
    real = pairs if data.pictures is None else RealPictures(data.pictures, *stored)
    networks = make_networks(settings, family, device)
    source = None if resumed else start_from(settings, family, networks)
    offload = settings.memory.offloaded_adam if settings.memory.offload_optimizer else None
    generator = make_engine(networks.generator, optim, optim.generator, settings.generator_updates, device, offload)
    updates = sum(map(len, settings.matching)) * settings.guidance.ratio
    guidance = make_engine(networks.fake_score, optim, optim.fake_score, updates, device, offload)
    if settings.memory.channels_last:  # not before: DeepSpeed sends weights around as they lie in memory
        for network in networks:
            channels_last(getattr(network, "base", network))
    with naming("memory.reward_crop"):
        view = View(family, settings.memory, [size.shape for size in settings.model.sizes])
    discriminator = None
    if settings.guidance.discriminator is not None:
        with naming("guidance.discriminator"):
            discriminator = Discriminator(
                settings.guidance, family, guidance, device, settings.run.seed, settings.rollout.shift, real
            )
    start = settings.matching[0].start if settings.matching else 0
    trainer = Trainer(
        settings,
        family,
        generator,
        Guide(settings.guidance, family, guidance, start, discriminator),
        objectives,
        Rollouts(settings, family, generator, make_prompts(settings, family), view, device, pairs),
        device,
        dist.get_rank(),
        dist.get_world_size(),
        mean_over_processes,
    )
    if source is not None and settings.run.init_moments:
        load_moments(source, trainer)
    return trainer


def start_from(settings: Recipe, family: Family, networks: Networks) -> Path | None:
    """Put the weights of `model.generator_lora.start`, then of `run.init_from`, into new networks.

    Returns:
        The checkpoint of `run.init_from`.
    """
    lora, generator = settings.model.generator_lora, networks.generator
    if lora is not None and lora.start is not None:
        assert isinstance(generator, LoRANetwork)
        with naming("model.generator_lora.start"):
            generator.start_from(family.read_lora(lora.start))
    if settings.run.init_from is None:
        return None
    source = agreed(lambda: newest_verified("run.init_from", str(settings.run.init_from)))
    load_weights("run.init_from", source / GENERATOR, networks.generator)
    load_weights("run.init_from", source / FAKE_SCORE, networks.fake_score)
    return source
