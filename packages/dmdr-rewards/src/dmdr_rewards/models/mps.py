"""MPS: which picture people would prefer for a prompt, under a condition such as its aesthetics.

    V, W, C   = the tokens of CLIP ViT-H-14 for picture, prompt and condition, projected: [257 or 77, 1024]
    s_i       = max_j W_i · C_j                        word i of the prompt counts if s_i / max s > 0.3
    v         = network(V, W where it counts)          the picture's first token, `networks.word_attention`
    score     = exp(logit_scale) · cos(v, W at the prompt's end)

Source: "Learning Multi-dimensional Human Preference for Text-to-Image Generation", arXiv 2405.14705, and the public
release Kwai-Kolors/MPS, whose code is MIT. The scale is about 100.

Texts are filled up to 77 tokens, and the tokens that fill them count like words, in the prompt and in the condition.
V is taken before CLIP's last normalisation. Preprocessing is that of transformers' CLIP.
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dmdr_rewards.base.errors import MissingError
from dmdr_rewards.interface.info import BUILT_IN
from dmdr_rewards.interface.reward import TowerReward
from dmdr_rewards.models.clip import shorter_side
from dmdr_rewards.networks import checkpoint_files
from dmdr_rewards.networks.clip_towers import (
    TransformersTokens,
    activation_of,
    tokenizer_hashes,
    transformers_config,
    transformers_model,
    vision_layers,
)
from dmdr_rewards.networks.frozen_network import FrozenNetwork, precision, recompute
from dmdr_rewards.networks.word_attention import word_attention
from dmdr_rewards.pictures.preprocess import Preprocess, chosen
from dmdr_rewards.prompts.text_cache import TextCache
from dmdr_rewards.prompts.texts import as_texts, cut

FILES = (
    "MPS_overall_checkpoint.safetensors",
    "MPS_overall_checkpoint_diffsynth.safetensors",
    "MPS_overall_checkpoint.pth",
)
CONDITIONS = {
    "overall": (
        "light, color, clarity, tone, style, ambiance, artistry, shape, face, hair, hands, limbs, structure, instance, "
        "texture, quantity, attributes, position, number, location, word, things."
    ),
    "aesthetics": "light, color, clarity, tone, style, ambiance, artistry",
    "alignment": "quantity, attributes, position, number, location",
    "detail": "shape, face, hair, hands, limbs, structure, instance, texture",
}
"""The words that stand for each condition. They are part of the model: other words give other scores."""

_THRESHOLD = 0.3
_REMEMBERED = 256  # prompts; one takes 78 rows of 1024 numbers


def reward(
    checkpoint: str | PathLike[str],
    condition: Literal["overall", "aesthetics", "alignment", "detail"] = "overall",
    preprocess: Literal["reference", "dmdr"] = "reference",
    gradient_checkpointing: bool = False,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> "MPS":
    """The reward `mps`.

    checkpoint  the release's state dict as .safetensors, with config.json and the tokenizer's files of
                laion/CLIP-ViT-H-14-laion2B-s32B-b79K beside it; or the folder that holds them
    condition   what is scored. The public weights were trained for "overall" only
    preprocess  "reference": shorter side and centre crop; "dmdr": squash. Both give the same score for square pictures
    gradient_checkpointing  recompute the layers that read the picture in the backward pass to save memory; changes no
                value
    dtype       precision of these layers; the text tower stays in float32

    Raises ValueError for another condition, and for files that are missing, damaged, unsafe or of another model.
    """
    if condition not in CONDITIONS:
        raise ValueError(f"condition {condition!r}: choose one of {', '.join(CONDITIONS)}")
    path = Path(checkpoint)
    path = checkpoint_files.find(path, *FILES) if path.is_dir() or not path.suffix else path
    if not path.is_file():
        raise MissingError(f"checkpoint {path}: no such file")
    facts = json.dumps([transformers_config(path.parent), tokenizer_hashes(path.parent)], sort_keys=True)
    how = ("mps", facts, torch.device(device), dtype, gradient_checkpointing)
    networks = checkpoint_files.load_once(path, lambda: _Networks(path, device, dtype, gradient_checkpointing), *how)
    reference = replace(shorter_side(networks.image_size), halves="down")
    return MPS(networks, condition, chosen(preprocess, reference))


class MPS(TowerReward):
    """exp(logit_scale) · cosine of a picture, after attention to the words that count, and its prompt.

    Formula and source are at the top of this module. Rewards of several conditions share the image tower's work.
    """

    def __init__(self, networks: "_Networks", condition: str, preprocess: Preprocess) -> None:
        self.towers, self.tower, self.preprocess = networks, networks.image, preprocess
        self.scale = networks.logit_scale
        self._condition = networks.states([CONDITIONS[condition]])[0, :-1]
        info = BUILT_IN["mps"]
        self.info = replace(
            info,
            description=f"{info.description}; condition: {condition}",
            range=(-self.scale, self.scale),
            image_size=preprocess.image_size,
            preprocess=f"{preprocess}; {networks.activation}",
        )

    def notes(self, prompts: Sequence[Any]) -> list[str | None]:
        """For each text, what the score does not read of it, or None."""
        return cut(self.towers.tokenize.lengths(as_texts(prompts)), self.towers.tokenize.context)

    def counts(self, words: Tensor) -> Tensor:
        """The states of B texts, Tensor[B, L, D] -> bool Tensor[B, L], True for tokens that the condition asks for."""
        similarity = (words @ self._condition.T).amax(dim=-1)
        return similarity / similarity.amax(dim=-1, keepdim=True) > _THRESHOLD

    def score_features(self, features: Tensor, prompts: Tensor | Sequence[Any]) -> Tensor:
        """Score B pictures' tokens, Tensor[B, 1 + patches, D], under B texts -> float32 Tensor[B].

        Raises ValueError for prompts that are not texts, and for a number of prompts other than B. Prompts that are
        too long are truncated, with a warning for the first.
        """
        states = self.towers.texts(as_texts(prompts, len(features)))
        words, end = states[:, :-1], states[:, -1]
        picture = self.towers.reader(features, words, self.counts(words))
        return (self.scale * F.cosine_similarity(picture, end, dim=-1)).float()


class _Networks:
    """The frozen networks of a checkpoint, its tokenizer and its image size.

    texts  list of B texts -> Tensor[B, L + 1, D]: the states of all L tokens, and once more that at the text's end
    """

    def __init__(
        self, path: Path, device: str | torch.device, dtype: torch.dtype, gradient_checkpointing: bool
    ) -> None:
        clip_tensors, reader_tensors = _tensors(path)
        model = transformers_model(path.parent, clip_tensors, path)
        vision = model.config.vision_config
        reader = word_attention(reader_tensors, 1 + (vision.image_size // vision.patch_size) ** 2, path)
        if reader.blocks()[0].to_q.in_features != model.config.projection_dim:
            raise ValueError(
                f"checkpoint {path} and {path.parent / 'config.json'} are not of one model: a CLIP ViT-H-14"
            )
        if gradient_checkpointing:
            recompute([*vision_layers(model), *reader.blocks()])
        self.image_size, self.activation = (vision.image_size, vision.image_size), activation_of(model)
        self.logit_scale = float(model.logit_scale.detach().double().exp())
        self.tokenize = TransformersTokens(path.parent, model.config.text_config.max_position_embeddings, "max_length")
        self.image = FrozenNetwork(_Projected(model.vision_model, model.visual_projection), device, dtype)
        self.reader = FrozenNetwork(reader, device, dtype)
        self.text = FrozenNetwork(_Projected(model.text_model, model.text_projection), device, precision(dtype))
        self.texts = TextCache(self.states, _REMEMBERED)

    def states(self, texts: list[str]) -> Tensor:
        """The states of B texts, without the cache: see `texts`."""
        ids, _ = self.tokenize(texts)
        states = self.text(ids.to(self.text.device))
        # The end has the highest number of all tokens; what fills a text up may have the same, and comes after it.
        end = states[torch.arange(len(ids)), ids.argmax(dim=1)]
        return torch.cat([states, end[:, None]], dim=1)


class _Projected(nn.Module):
    """A tower of the CLIP: pixels, or token ids -> the projected states of all tokens."""

    def __init__(self, tower: nn.Module, projection: nn.Module) -> None:
        super().__init__()
        self.tower, self.projection = tower, projection

    def forward(self, given: Tensor) -> Tensor:
        return self.projection(self.tower(given).last_hidden_state)


def _tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The tensors of the CLIP, and those of the network on it."""
    try:
        tensors = checkpoint_files.load(path)
    except ValueError as error:
        if path.suffix == ".safetensors":
            raise
        raise ValueError(
            f"{error}; if it is MPS's release, a pickled network: load it with the code of github.com/Kwai-Kolors/MPS "
            "and save its state_dict() as .safetensors, as docs/rewards.md shows"
        ) from error
    clip = {name.removeprefix("model."): tensor for name, tensor in tensors.items() if name.startswith("model.")}
    own = {name.removeprefix("cross_model."): each for name, each in tensors.items() if name.startswith("cross_model.")}
    others = set(tensors) - {f"model.{name}" for name in clip} - {f"cross_model.{name}" for name in own}
    checkpoint_files.refuse_unless_exact(path, missing=set(), unexpected=others, wrong=[])
    return clip, own
