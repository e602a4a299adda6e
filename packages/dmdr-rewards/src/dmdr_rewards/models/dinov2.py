"""DINOv2 with its four-layer linear head, from the files that torch.hub downloads.

Source: "DINOv2: Learning Robust Visual Features without Supervision", arXiv 2304.07193, and the public release
facebookresearch/dinov2, code and weights Apache-2.0. DMDR's class-conditional reward is this classifier at ViT-L/14.

    features = [cls_(L-3), cls_(L-2), cls_(L-1), cls_L, mean of the patch tokens of layer L]    each after the final
    logits   = W · features + b,   W: [1000, 5·width]                                           LayerNorm

Outputs equal those of the released network up to rounding, including its resampling of the position embeddings. The
release adds 0.1 to the target grid in the scale factor (bicubic, no antialiasing), which shifts every sample slightly;
transformers resamples to the exact size, with different numbers. Pictures are squashed to the working size (bicubic,
antialias) as in DMDR's training; the release evaluates on a resize to 256 and a centre crop of 224.

Backbones with registers and the one-layer head (2·width inputs) are not supported; they are refused by name or shape.
"""

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn

from dmdr_rewards.base.errors import MissingError
from dmdr_rewards.interface.info import BUILT_IN
from dmdr_rewards.models.class_label import ClassLabelReward
from dmdr_rewards.networks import checkpoint_files
from dmdr_rewards.networks.classifier import ImageClassifier
from dmdr_rewards.networks.frozen_network import FrozenNetwork, recompute
from dmdr_rewards.pictures.preprocess import IMAGENET_MEAN, IMAGENET_STD, Preprocess, chosen, from_folder

FETCH = BUILT_IN["dinov2"].fetch.partition(" && ")[0]
"""The command that downloads the backbone alone."""

_IMAGE_SIZE = 224
_HEAD_WIDTH = 64  # of one attention head, in every released size
_LAYERS = 4  # the linear head reads the class tokens of the last four
_GRID_OFFSET = 0.1  # as in the release, see above


def reward(
    checkpoint: str | PathLike[str],
    head: str | PathLike[str] | None = None,
    image_size: int | None = None,
    preprocess: Literal["reference", "dmdr"] = "reference",
    gradient_checkpointing: bool = False,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> ClassLabelReward:
    """The reward `dinov2`: −cross-entropy of `classifier`, which takes the same arguments."""
    return ClassLabelReward(
        classifier(checkpoint, head, image_size, device, dtype, preprocess, gradient_checkpointing), BUILT_IN["dinov2"]
    )


def classifier(
    checkpoint: str | PathLike[str],
    head: str | PathLike[str] | None = None,
    image_size: int | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    preprocess: Literal["reference", "dmdr"] = "reference",
    gradient_checkpointing: bool = False,
) -> ImageClassifier:
    """Load backbone and head.

    checkpoint  the backbone's file, e.g. dinov2_vitl14_pretrain.pth; a folder that holds backbone.safetensors or
                backbone.pth, and head.safetensors or head.pth; or a folder of a transformers
                Dinov2ForImageClassification with its own preprocessing
    head        the head's file, e.g. dinov2_vitl14_linear4_head.pth; not with a folder
    image_size  side of the network's square input, a multiple of the patch size, default 224; not with a transformers
                folder
    preprocess  "dmdr" squashes pictures; torch.hub's files are always used with squashed pictures
    gradient_checkpointing  recompute the backbone's layers in the backward pass to save memory; changes no value

    Width, depth, patch size, feed-forward kind (MLP, or SwiGLU of ViT-g) and number of classes follow from the shapes
    of the tensors. Raises ValueError for files that are missing, damaged, unsafe or of another model, and for an image
    size that is not a multiple of the patch size.
    """
    if (Path(checkpoint) / "config.json").exists():
        return _plain(Path(checkpoint), head, image_size, device, dtype, preprocess, gradient_checkpointing)
    backbone_path, head_path = _files(Path(checkpoint), head)
    backbone, linear = checkpoint_files.load(backbone_path), checkpoint_files.load(head_path)
    backbone.pop("mask_token", None)  # used in pretraining only
    shape = _Shape.of(backbone, backbone_path)
    checkpoint_files.check(backbone, shape.tensors(), backbone_path)
    num_classes = len(linear["weight"]) if "weight" in linear and linear["weight"].ndim else 0
    features = (_LAYERS + 1) * shape.width
    checkpoint_files.check(linear, {"weight": (num_classes, features), "bias": (num_classes,)}, head_path)
    side = _IMAGE_SIZE if image_size is None else image_size
    if side < 1 or side % shape.patch:
        raise ValueError(f"image_size {side} is not a positive multiple of the patch size {shape.patch}")
    model = _model(backbone, shape, side)
    if gradient_checkpointing:
        recompute(model.encoder.layer)
    squash = Preprocess(resize=(side, side), mean=IMAGENET_MEAN, std=IMAGENET_STD)
    return ImageClassifier(_FourLayers(model), _linear(linear), chosen(preprocess, squash), device, dtype)


def backbone(
    checkpoint: str | PathLike[str], device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[FrozenNetwork, Preprocess]:
    """Load the backbone alone -> the network, which maps pixels to features Tensor[B, width], and its preprocessing.

    The features are the class token after the final LayerNorm, as in "Exposing flaws of generative model evaluation
    metrics", arXiv 2306.04675.

    checkpoint  the backbone's file, or a folder that holds it, as in `classifier`; or a folder of a transformers
                Dinov2Model or Dinov2ForImageClassification with its own preprocessing

    Raises ValueError for files that are missing, damaged, unsafe or of another model.
    """
    folder = Path(checkpoint)
    if (folder / "config.json").exists():
        return FrozenNetwork(_ClassToken(_published(folder)), device, dtype), from_folder(folder)
    path = _only(folder, "backbone") if folder.is_dir() else folder
    tensors = checkpoint_files.load(path)
    tensors.pop("mask_token", None)  # used in pretraining only
    shape = _Shape.of(tensors, path)
    checkpoint_files.check(tensors, shape.tensors(), path)
    squash = Preprocess(resize=(_IMAGE_SIZE, _IMAGE_SIZE), mean=IMAGENET_MEAN, std=IMAGENET_STD)
    return FrozenNetwork(_ClassToken(_model(tensors, shape, _IMAGE_SIZE)), device, dtype), squash


def _published(folder: Path) -> Any:
    """The backbone in a transformers folder; the classifier that may be there is left out."""
    from transformers import Dinov2Model

    kind = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
    if kind != "dinov2" or not any(folder.glob("*.safetensors")):
        raise ValueError(f"checkpoint {folder} must hold config.json of a dinov2 and *.safetensors; it holds a {kind}")
    loader: Any = Dinov2Model
    try:
        model, report = loader.from_pretrained(
            folder,
            use_safetensors=True,
            local_files_only=True,
            ignore_mismatched_sizes=True,  # refused below, listed by name together with all others
            output_loading_info=True,
        )
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise ValueError(f"checkpoint {folder} cannot be loaded as a DINOv2: {error}") from error
    extra = {name for name in report["unexpected_keys"] if not name.startswith("classifier.")}
    checkpoint_files.refuse_unless_loaded(folder, {**report, "unexpected_keys": extra})
    return model


class _ClassToken(nn.Module):
    """Pixels Tensor[B, 3, H, W] -> the class token after the final LayerNorm, Tensor[B, width]."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor) -> Tensor:
        return self.model(pixels).last_hidden_state[:, 0]


def _plain(
    folder: Path,
    head: Any,
    image_size: int | None,
    device: str | torch.device,
    dtype: torch.dtype,
    preprocess: Literal["reference", "dmdr"],
    gradient_checkpointing: bool,
) -> ImageClassifier:
    given = [name for name, value in (("head", head), ("image_size", image_size)) if value is not None]
    kind = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
    if given or kind != "dinov2":
        raise ValueError(
            f"checkpoint {folder} is a transformers folder of a {kind} model: "
            + (f"leave out {' and '.join(given)}" if given else "use the reward 'class-label'")
        )
    found = ImageClassifier.from_folder(folder, device, dtype, preprocess)
    if gradient_checkpointing:
        recompute(found.tower.module.get_submodule("model.dinov2.encoder.layer").children())
    return found


class _FourLayers(nn.Module):
    """Pixels Tensor[B, 3, H, W] -> Tensor[B, 5·width]: the input of the four-layer head."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor) -> Tensor:
        output = self.model(pixels, output_hidden_states=True)
        tokens = [self.model.layernorm(layer[:, 0]) for layer in output.hidden_states[-_LAYERS:]]
        return torch.cat([*tokens, output.last_hidden_state[:, 1:].mean(dim=1)], dim=1)


@dataclass(frozen=True)
class _Shape:
    """The dimensions of a backbone, from which the name and shape of each of its tensors follow."""

    width: int
    depth: int
    patch: int
    positions: int
    ratio: int
    gated: bool

    @classmethod
    def of(cls, tensors: dict[str, Tensor], path: Path) -> "_Shape":
        """Infer them from the tensors of the file `path`. Raises ValueError for a file that is not such a backbone."""
        blocks = {int(match[1]) for name in tensors if (match := re.match(r"blocks\.(\d+)\.", name))}
        gated = "blocks.0.mlp.w3.weight" in tensors
        try:
            width, _, patch, _ = tensors["patch_embed.proj.weight"].shape
            _, positions, _ = tensors["pos_embed"].shape
            hidden = tensors["blocks.0.mlp.w3.weight" if gated else "blocks.0.mlp.fc2.weight"].shape[1]
        except (KeyError, ValueError, IndexError) as error:
            raise ValueError(f"checkpoint {path} is not a DINOv2 backbone with torch.hub's names: {error}") from error
        ratios = [ratio for ratio in range(1, 17) if _hidden(width, ratio, gated) == hidden]
        side = math.isqrt(positions - 1)
        depth = max(blocks) + 1
        if width % _HEAD_WIDTH or side * side != positions - 1 or not ratios or depth < _LAYERS:
            raise ValueError(
                f"checkpoint {path} is not a DINOv2 backbone: width {width} (expected a multiple of {_HEAD_WIDTH}), "
                f"{positions - 1} positions (a square), feed-forward width {hidden} (a whole ratio of the width), "
                f"{depth} blocks (at least {_LAYERS})"
            )
        return cls(width, depth, patch, positions, ratios[0], gated)

    def tensors(self) -> dict[str, tuple[int, ...]]:
        return dict(self._tensors())

    def _tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        width, hidden = self.width, _hidden(self.width, self.ratio, self.gated)
        yield "cls_token", (1, 1, width)
        yield "pos_embed", (1, self.positions, width)
        yield "patch_embed.proj.weight", (width, 3, self.patch, self.patch)
        yield "patch_embed.proj.bias", (width,)
        linears = {"attn.qkv": (3 * width, width), "attn.proj": (width, width)}
        if self.gated:
            linears |= {"mlp.w12": (2 * hidden, width), "mlp.w3": (width, hidden)}
        else:
            linears |= {"mlp.fc1": (hidden, width), "mlp.fc2": (width, hidden)}
        for block in (f"blocks.{index}" for index in range(self.depth)):
            for name, shape in linears.items():
                yield f"{block}.{name}.weight", shape
                yield f"{block}.{name}.bias", shape[:1]
            for name in ("norm1.weight", "norm1.bias", "ls1.gamma", "norm2.weight", "norm2.bias", "ls2.gamma"):
                yield f"{block}.{name}", (width,)
        yield "norm.weight", (width,)
        yield "norm.bias", (width,)


def _hidden(width: int, ratio: int, gated: bool) -> int:
    # SwiGLU has a third matrix; two thirds of the width, rounded up to a multiple of 8, keep the parameter count.
    return (width * ratio * 2 // 3 + 7) // 8 * 8 if gated else width * ratio


def _files(checkpoint: Path, head: str | PathLike[str] | None) -> tuple[Path, Path]:
    if not checkpoint.is_dir():
        if not checkpoint.exists():
            raise MissingError(f"checkpoint {checkpoint}: no such file")
        if head is None:
            raise ValueError(f"checkpoint {checkpoint} is a file: give head=FILE too, or a folder with both")
        return checkpoint, Path(head)
    if head is not None:
        raise ValueError(f"head {head}: the folder {checkpoint} has its own, so leave head out or give two files")
    return _only(checkpoint, "backbone"), _only(checkpoint, "head")


def _only(folder: Path, stem: str) -> Path:
    found = [path for suffix in (".safetensors", ".pth") if (path := folder / (stem + suffix)).exists()]
    if len(found) != 1:
        raise MissingError(f"checkpoint {folder} must hold {stem}.safetensors or {stem}.pth, one of the two")
    return found[0]


def _model(backbone: dict[str, Tensor], shape: _Shape, image_size: int) -> Any:
    from transformers import Dinov2Config, Dinov2Model

    config = Dinov2Config(
        hidden_size=shape.width,
        num_hidden_layers=shape.depth,
        num_attention_heads=shape.width // _HEAD_WIDTH,
        mlp_ratio=shape.ratio,
        patch_size=shape.patch,
        image_size=image_size,
        use_swiglu_ffn=shape.gated,
    )
    # The embeddings already have the working size, so transformers does not resample them.
    adapted = {
        "pos_embed": _resampled(backbone["pos_embed"], image_size // shape.patch),
        "mask_token": torch.zeros(1, shape.width),
    }
    # transformers has renamed its modules but still reads published files, so the state is named as in such a file.
    state = dict(_renamed({**backbone, **adapted}))
    loader: Any = Dinov2Model
    model, report = loader.from_pretrained(None, config=config, state_dict=state, output_loading_info=True)
    assert not any(report.values()), report
    return model


def _resampled(positions: Tensor, side: int) -> Tensor:
    """Position embeddings [1, 1 + n², width] -> [1, 1 + side², width], as the release does; unchanged if equal."""
    grid = math.isqrt(positions.shape[1] - 1)
    if grid == side:
        return positions
    scale = (side + _GRID_OFFSET) / grid
    picture = positions[:, 1:].float().unflatten(1, (grid, grid)).permute(0, 3, 1, 2)
    picture = F.interpolate(picture, scale_factor=(scale, scale), mode="bicubic")
    return torch.cat([positions[:, :1].float(), picture.flatten(2).transpose(1, 2)], dim=1)


_NAMES = {
    "cls_token": "embeddings.cls_token",
    "mask_token": "embeddings.mask_token",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj": "embeddings.patch_embeddings.projection",
    "blocks": "encoder.layer",
    "attn.proj": "attention.output.dense",
    "ls1.gamma": "layer_scale1.lambda1",
    "ls2.gamma": "layer_scale2.lambda1",
    "mlp.w12": "mlp.weights_in",
    "mlp.w3": "mlp.weights_out",
    "norm": "layernorm",
}
_NAME = re.compile(rf"(?<![^.])({'|'.join(map(re.escape, _NAMES))})(?![^.])")


def _renamed(tensors: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """torch.hub's names -> those of transformers' DINOv2 files; the fused query, key and value are split."""
    for name, tensor in tensors.items():
        renamed = _NAME.sub(lambda match: _NAMES[match[1]], name)
        if ".attn.qkv." in name:
            for part, third in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                yield renamed.replace("attn.qkv", f"attention.attention.{part}"), third
        else:
            yield renamed, tensor


def _linear(tensors: dict[str, Tensor]) -> nn.Linear:
    outputs, inputs = tensors["weight"].shape
    layer = nn.Linear(inputs, outputs, device="meta")
    layer.load_state_dict(tensors, assign=True)
    return layer
