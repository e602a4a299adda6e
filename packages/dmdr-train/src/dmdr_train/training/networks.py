"""The networks of a recipe: the family, the generator, and teacher and fake score in one network."""

from typing import Any, NamedTuple

import dmdr_models
import torch
from dmdr_models.families.protocols import Family
from dmdr_models.folder.quantisation import method_of
from dmdr_models.networks.applied_loras import fold_loras
from dmdr_models.networks.channels_last import channels_last
from dmdr_models.networks.checkpointed import checkpoint_blocks
from dmdr_models.networks.compiled import compile_blocks
from dmdr_models.networks.lora import LoRANetwork
from dmdr_models.networks.lora_files import LoRA
from dmdr_models.networks.quantised import quantise
from dmdr_models.networks.step_loras import StepLoRAs
from torch import nn

from dmdr_train.base.errors import naming
from dmdr_train.base.random_draws import named_generator
from dmdr_train.data.embedding_cache import EmbeddingCache
from dmdr_train.distributed.device import DTYPES
from dmdr_train.recipe import schema
from dmdr_train.recipe.quantised_base import check_quantised_folder

# A VAE in fp16 overflows.
FAMILY_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float32}


def load_family(settings: schema.Recipe, dtype: torch.dtype | None = None) -> Family:
    """The family of a recipe, in the precision that it trains in or in `dtype`; only its configs are read.

    Its own size is the first of the recipe's.
    """
    model = settings.model
    with naming("model.path"):
        family = dmdr_models.load(
            model.family,
            model.path,
            vae=model.vae,
            resolution=model.sizes[0].shape if model.sizes else None,
            max_tokens=model.max_tokens,
            dtype=dtype or FAMILY_DTYPES[settings.optim.precision],
        )
        for size in model.sizes:
            family.latent_shape(*size.shape)
    if settings.guidance.unconditional == "empty_text":
        with naming("guidance.unconditional"):
            family.use_empty_text()
    if settings.data.embeddings is not None:
        with naming("data.embeddings"):
            family.text = EmbeddingCache(settings.data.embeddings)
    return family


def open_decoder(settings: schema.Recipe, family: Family) -> None:
    """Read the decoder, whose absence would otherwise be noticed late, and switch on what the recipe saves of memory.

    Raises:
        UserError: the decoder is missing or damaged.
    """
    model, memory = settings.model, settings.memory
    with naming("model.path" if model.vae is None else "model.vae"):
        family.open_decoder()
    with naming("memory"):
        family.save_memory(
            vae_checkpointing="vae" in memory.gradient_checkpointing,
            vae_tiling=memory.vae_tiling,
            vae_slicing=memory.vae_slicing,
            offload_text=memory.offload_text_encoders,
        )
    if memory.channels_last:
        latent_family: Any = family  # one with a VAE, as preflight has checked
        channels_last(latent_family.vae)


def load_network(model: schema.Model, family: Family, generator: bool = False) -> nn.Module:
    """The teacher's network with its LoRAs in its weights, or the network that the generator starts from.

    One whose own weights are trained comes in float32: the optimizer keeps its master copy of them.
    """
    weights = model.generator if generator else None
    full = generator and model.generator_lora is None
    loras = teacher_loras(model, family) if weights is None else []
    with naming("model.path" if weights is None else "model.generator"):
        network = family.load_network(weights, torch.float32 if full else None)
    for i, lora in enumerate(loras):
        with naming(f"model.teacher_loras.{i}.path"):
            lora[0].check(network)
    fold_loras(network, loras)
    return network


def teacher_loras(model: schema.Model, family: Family) -> list[tuple[LoRA, float]]:
    """The LoRAs of the teacher, each with its strength."""
    found = []
    for i, lora in enumerate(model.teacher_loras):
        with naming(f"model.teacher_loras.{i}.path"):
            found.append((family.read_lora(lora.path), lora.strength))
    return found


class Networks(NamedTuple):
    """What the two engines train: the generator, and teacher and fake score in one network with a LoRA."""

    generator: nn.Module
    fake_score: nn.Module


def make_networks(settings: schema.Recipe, family: Family, device: torch.device) -> Networks:
    """Two adapters on one frozen network where that can be, otherwise two networks.

    Raises:
        UserError: the weights are quantised, and the recipe asks for what does not go with them.
    """
    if (method := quantised_by(family)) is not None:
        with naming("model.path"):
            check_quantised_folder(settings, method, family.students.keeps_lora)
    if settings.shares_backbone:
        base = frozen_network(settings, family, device)
        return Networks(
            add_generator_lora(base, settings, family, shared=True).to(device),
            add_lora(base, settings.model.fake_score_lora, family, settings.run.seed, "fake_score", shared=True).to(
                device
            ),
        )
    generator = make_generator(settings, family)
    guidance = prepared(load_network(settings.model, family), settings)
    guidance = add_lora(guidance, settings.model.fake_score_lora, family, settings.run.seed, "fake_score")
    return Networks(generator.to(device), guidance.to(device))


def frozen_network(settings: schema.Recipe, family: Family, device: torch.device) -> nn.Module:
    """The network under all adapters, in the precision of the training, or quantised."""
    base: Any = prepared(load_network(settings.model, family), settings)
    dtype = DTYPES[settings.optim.precision]
    if settings.memory.quantize is not None:
        quantise(nn.Module.to(base, dtype), settings.memory.quantize, device)
    # The engines see the adapters alone. diffusers' own `to` warns of layers to keep in float32, where none are.
    return nn.Module.to(base, device, dtype)


def quantised_by(family: Family) -> str | None:
    """The library that quantised the weights of the family's folder; None for plain weights."""
    return method_of(getattr(family, "config", {}))


def make_generator(settings: schema.Recipe, family: Family) -> nn.Module:
    """The generator alone, as an engine of its own trains it."""
    network = prepared(load_network(settings.model, family, generator=True), settings)
    if settings.model.generator_lora is None:
        return network.requires_grad_(True)
    return add_generator_lora(network, settings, family)


def add_generator_lora(network: nn.Module, settings: schema.Recipe, family: Any, shared: bool = False) -> nn.Module:
    """A network with the generator's adapter, or with one for each step of the grid."""
    lora, seed = settings.model.generator_lora, settings.run.seed
    assert lora is not None
    if not lora.per_step:
        return add_lora(network, lora, family, seed, "generator", shared)
    with torch.device("cpu"):
        times = family.timestep(family.grid(settings.rollout.steps, settings.rollout.shift).times[:-1])
    steps = [add_lora(network, lora, family, seed, "generator", shared=True, step=step) for step in range(len(times))]
    return StepLoRAs(steps, times, shared).eval()


def prepared(network: Any, settings: schema.Recipe) -> Any:
    if every := settings.memory.checkpointed_blocks:
        with naming("memory.gradient_checkpointing"):
            checkpoint_blocks(network, every)
    if settings.memory.compile:
        with naming("memory.compile"):
            compile_blocks(network)
    return network.eval()


def add_lora(
    network: nn.Module,
    lora: schema.Lora,
    family: Family,
    seed: int,
    role: str,
    shared: bool = False,
    step: int | None = None,
) -> LoRANetwork:
    """A network with an adapter in float32; the optimizer keeps its master copy of the adapter.

    Args:
        step: of the grid, where every step has an adapter of its own.
    """
    name = role if step is None else f"{role}_step_{step}"
    draws = named_generator(seed, "lora", name)
    with naming(f"model.{role}_lora.targets"):
        targets = lora.targets or family.lora_targets
        adapted = LoRANetwork(network, lora.rank, lora.alpha, targets, draws, name, shared, lora.init)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return adapted.eval()
