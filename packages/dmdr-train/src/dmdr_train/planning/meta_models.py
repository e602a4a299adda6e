"""The models of a recipe on torch's meta device: the code of a run builds them, from configs alone.

Configs come from the folder at `model.path` if it is there, otherwise from `model_configs`. No weight is read.
"""

import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import diffusers
import torch
from dmdr_core import VariancePreserving
from dmdr_models import registry
from dmdr_models.base.json_files import read_json
from dmdr_models.families.protocols import Condition
from dmdr_models.folder.layout import Layout
from safetensors.torch import save_file
from torch import Tensor, nn

from dmdr_train.base.errors import UserError, naming
from dmdr_train.distributed.device import DTYPES
from dmdr_train.planning.model_configs import FOLDERS, HUB_NAMES, TEXT_ENCODERS, known
from dmdr_train.recipe.schema import Recipe
from dmdr_train.training.networks import Networks, load_family, make_networks

META = torch.device("meta")
CLIP_LENGTH = 77


@dataclass
class Models:
    """What a run holds, on the meta device.

    Attributes:
        family: the family, with its decoder if it has one.
        networks: generator, and teacher and fake score, in the precision of the training.
        vae: the decoder, or None.
        encoders: the text encoders, each with the length of its sequence; none if embeddings are cached.
        clip_length: tokens of a text for CLIP.
    """

    family: Any
    networks: Networks
    vae: nn.Module | None
    encoders: list[tuple[nn.Module, int]]
    clip_length: int = CLIP_LENGTH

    @property
    def latent(self) -> tuple[int, int, int]:
        """The shape (C, h, w) of the latent of a sample."""
        return self.family.latent_shape(*self.family.size)

    @property
    def pixels(self) -> int:
        """Pixels per latent, along a side."""
        return self.family.size[0] // self.latent[1]

    def condition(self, batch: int) -> Condition:
        """A condition of `batch` samples: labels, or embeddings of texts."""
        config, family = self.family.config, self.family
        if family.layout.takes == "labels":
            return {"class_labels": torch.empty(batch, dtype=torch.long, device=META)}
        if "joint_attention_dim" in config:  # SD3
            width, pooled = config["joint_attention_dim"], config["pooled_projection_dim"]
            return {
                "encoder_hidden_states": empty(batch, self.clip_length + family.max_tokens, width),
                "pooled_projections": empty(batch, pooled),
            }
        times = 6 * config["addition_time_embed_dim"]
        return {
            "encoder_hidden_states": empty(batch, self.clip_length, config["cross_attention_dim"]),
            "text_embeds": empty(batch, config["projection_class_embeddings_input_dim"] - times),
            "time_ids": torch.empty(batch, 6, dtype=torch.long, device=META),
        }

    def predict(self, network: Any, batch: int, **named: Any) -> Tensor:
        """The prediction of a network for `batch` samples, as a step of the training asks for it."""
        x = empty(batch, *self.latent)
        t = empty(batch)
        if isinstance(self.family.process, VariancePreserving):
            t = t.long()
        return self.family.predict(network, x, t, self.condition(batch), **named)


def empty(*shape: int) -> Tensor:
    return torch.empty(shape, device=META)


@contextmanager
def models_of(settings: Recipe, depth: int | None = None, network_alone: bool = False) -> Iterator[Models]:
    """Build the models of a recipe on the meta device.

    Args:
        depth: number of the network's blocks, where they are all alike; None takes the model's own.
        network_alone: leave out the decoder and the text encoders.

    Raises:
        UserError: the model is neither here nor well known, or the recipe does not go with it.
    """
    with tempfile.TemporaryDirectory() as folder, built_from_configs(on_meta):
        models = build(settings, Path(folder), depth)
        yield (
            replace(models, vae=None, encoders=[])
            if network_alone
            else replace(models, encoders=text_encoders(settings, models.family))
        )


def build(settings: Recipe, folder: Path, depth: int | None = None) -> Models:
    """Build the models of a recipe from configs that are written into `folder`."""
    layout = registry.find(settings.model.family)
    if layout.takes == "texts" and layout.name not in TEXT_ENCODERS:
        raise UserError("model.family", f"the plan does not know the texts of {layout.name}; it knows sd3 and sdxl")
    own = configs(settings.model.path, layout)
    if own is None:
        raise UserError("model.path", unknown(settings.model.path))
    if depth is not None:
        config = own[layout.network_part]
        own = own | {layout.network_part: config | {depth_key(config): depth}}
    vae = settings.model.vae
    if vae is not None:
        found = part_configs(vae, {"": ()}) or known(vae)
        if found is None:
            raise UserError("model.vae", unknown(vae))
        write(folder / "vae", found)
    write(folder / "model", own)
    planned = without_files(settings, str(folder / "model"), None if vae is None else str(folder / "vae"))
    family: Any = load_family(planned)
    family.device = META
    with naming("memory"):
        decoder = getattr(family, "vae", None)
        memory = settings.memory
        family.save_memory("vae" in memory.gradient_checkpointing, memory.vae_tiling, memory.vae_slicing)
    with META:
        networks = make_networks(planned, family, META)
    for each in networks:
        nn.Module.to(each, META, DTYPES[settings.optim.precision])
    return Models(family, networks, decoder, [], clip_length(settings.model.path))


def without_files(settings: Recipe, path: str, vae: str | None) -> Recipe:
    """The recipe with the models at these places, and without files that change no size."""
    plain = {"init": "kaiming"}
    model = settings.model
    lora = model.generator_lora and model.generator_lora.model_copy(update={**plain, "start": None})
    update: dict[str, Any] = {"path": path, "vae": vae, "generator": None, "teacher_loras": [], "generator_lora": lora}
    update["fake_score_lora"] = model.fake_score_lora.model_copy(update=plain)
    return settings.model_copy(
        update={
            "model": model.model_copy(update=update),
            "data": settings.data.model_copy(update={"embeddings": None}),
            "memory": settings.memory.model_copy(
                update={"shared_backbone": settings.shares_backbone, "compile": False, "quantize": None}
            ),
        }
    )


def clip_length(path: str) -> int:
    """How many tokens of a text CLIP reads in the model's folder, or the published models' 77."""
    place = Path(path) / "text_encoder" / "config.json"
    return int(read_json(place).get("max_position_embeddings", CLIP_LENGTH)) if place.is_file() else CLIP_LENGTH


def text_encoders(settings: Recipe, family: Any) -> list[tuple[nn.Module, int]]:
    """The text encoders of a recipe without cached embeddings, each with the length of its sequence."""
    import transformers

    layout = family.layout
    if layout.takes != "texts" or settings.data.embeddings is not None:
        return []
    found = []
    default = TEXT_ENCODERS.get(layout.name, {})
    for part, classes in layout.text_encoders.items():
        place = Path(settings.model.path) / part / "config.json"
        config = read_json(place) if place.is_file() else default.get(part)
        if config is None:
            continue
        kind: Any = getattr(transformers, classes[0])
        with META, default_dtype(family.dtype):
            encoder = kind(kind.config_class(**{k: v for k, v in config.items() if k != "_class_name"}))
        t5 = classes[0].startswith("T5")
        found.append(
            (encoder.requires_grad_(False).eval(), family.max_tokens if t5 else clip_length(settings.model.path))
        )
    return found


def configs(path: str, layout: Layout) -> dict[str, dict[str, Any]] | None:
    """The configs of a model by part, from its folder or from the well-known ones; None if there is neither."""
    needed = {part: classes for part, classes in layout.parts.items() if part not in layout.text_encoders}
    return part_configs(path, needed) or known(path)


def depth_key(config: Mapping[str, Any]) -> str:
    """The name of the number of blocks in a network's config, if all blocks are alike; otherwise empty."""
    if config.get("dual_attention_layers"):
        return ""
    return {"SD3Transformer2DModel": "num_layers", "SiTTransformer": "depth"}.get(config.get("_class_name", ""), "")


def depth_of(settings: Recipe) -> int | None:
    """The number of the network's blocks, if all are alike and the sizes are known."""
    layout = registry.find(settings.model.family)
    config = (configs(settings.model.path, layout) or {}).get(layout.network_part, {})
    return config.get(depth_key(config))


def part_configs(path: str, parts: Mapping[str, Any]) -> dict[str, dict[str, Any]] | None:
    """The configs in a local folder, of those parts that it has; None if there is no such folder."""
    if not Path(path).is_dir():
        return None
    files = {part: Path(path) / part / config_name(part) for part in parts}
    with naming("model.path"):
        return {part: read_json(file) for part, file in files.items() if file.is_file()}


def write(folder: Path, found: Mapping[str, dict[str, Any]]) -> None:
    """Write configs as a folder of a model with files of weights that are empty."""
    for part, config in found.items():
        (folder / part).mkdir(parents=True, exist_ok=True)
        (folder / part / config_name(part)).write_text(json.dumps(config), encoding="utf-8")
        if part != "scheduler":
            save_file({}, folder / part / "diffusion_pytorch_model.safetensors")


def config_name(part: str) -> str:
    return "scheduler_config.json" if part == "scheduler" else "config.json"


def unknown(path: str) -> str:
    names = ", ".join([*HUB_NAMES, *(name for name in FOLDERS if name not in HUB_NAMES.values())])
    return f"no folder {path!r} here, and its sizes are not known; give a folder with config.json, or one of {names}"


def on_meta(make: Callable[[], nn.Module], dtype: torch.dtype) -> nn.Module:
    """Build a module on the meta device."""
    with META, default_dtype(dtype):
        module = make()
    return nn.Module.to(module, dtype)


@contextmanager
def built_from_configs(build: Callable[[Callable[[], nn.Module], torch.dtype], nn.Module]) -> Iterator[None]:
    """Make diffusers' `from_pretrained` read configs alone.

    Args:
        build: is called with a function that makes the model, and with the dtype of its weights; returns the model.
    """

    def from_pretrained(
        kind: Any,
        path: str,
        subfolder: str | None = None,
        torch_dtype: torch.dtype = torch.float32,
        output_loading_info: bool = False,
        **_: Any,
    ) -> Any:
        config = kind.load_config(path, subfolder=subfolder)
        model = build(lambda: kind.from_config(config), torch_dtype)
        return (model, {}) if output_loading_info else model

    with mock.patch.object(diffusers.ModelMixin, "from_pretrained", classmethod(from_pretrained)):
        yield


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Make new weights in `dtype`."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
