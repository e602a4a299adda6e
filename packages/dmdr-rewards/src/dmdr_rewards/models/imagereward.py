"""ImageReward: how much the author of a prompt would like the picture.

Source: "ImageReward: Learning and Evaluating Human Preferences for Text-to-Image Generation", arXiv 2304.05977, and
the public release THUDM/ImageReward, code and weights Apache-2.0.

    tokens = ViT-L/16(pixels)                                    BLIP's image encoder, [197, 1024] for 224 x 224 pixels
    h      = BERT([CLS] prompt [SEP] [PAD] …; tokens)            35 tokens, every layer attends to the picture's tokens
    score  = (mlp(h at [CLS]) − 0.16717…) / 1.0333…              768-1024-128-64-16-1, linear: no activations

The constants are mean and standard deviation of the raw output over the release's data, so scores have mean 0 and a
standard deviation of 1; they are not bounded.

Scores equal those of the package image-reward 1.5 up to rounding. Its preprocessing resizes the shorter side to 224
(bicubic), crops the centre, and applies CLIP's mean and std; `preprocess="dmdr"` squashes the picture instead. The
networks come from timm (image) and transformers (text), which use the release's tensor names.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dmdr_rewards.interface.info import BUILT_IN
from dmdr_rewards.interface.reward import TowerReward
from dmdr_rewards.models.clip import shorter_side
from dmdr_rewards.networks import checkpoint_files
from dmdr_rewards.networks.frozen_network import FrozenNetwork, precision, recompute
from dmdr_rewards.networks.score_head import score_head
from dmdr_rewards.pictures.preprocess import Preprocess, chosen
from dmdr_rewards.prompts.texts import as_texts, cut
from dmdr_rewards.prompts.wordpiece import WordPiece

_MEAN, _STD = 0.16717362830052426, 1.0333394966054072
_HEAD_WIDTH = 64  # of one attention head, in the image and in the text encoder
_TOKENS = 35
_VISION, _TEXT = "blip.visual_encoder", "blip.text_encoder"
# Projections from BLIP's contrastive pretraining, and a constant. The release's own code does not use them.
_UNUSED = (
    "blip.vision_proj.weight",
    "blip.vision_proj.bias",
    "blip.text_proj.weight",
    "blip.text_proj.bias",
    f"{_TEXT}.embeddings.position_ids",
)


def reward(
    checkpoint: str | PathLike[str],
    tokenizer: str | PathLike[str] | None = None,
    preprocess: Literal["reference", "dmdr"] = "reference",
    gradient_checkpointing: bool = False,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> "ImageReward":
    """The reward `imagereward`.

    checkpoint  ImageReward.pt of the release, or the same tensors as .safetensors
    tokenizer   bert-base-uncased's vocab.txt, or a folder that holds vocab.txt or tokenizer.json; default: vocab.txt
                beside the checkpoint
    preprocess  "reference": shorter side and centre crop; "dmdr": squash. Both give the same score for square pictures
    gradient_checkpointing  recompute the image encoder's layers in the backward pass to save memory; changes no value
    dtype       precision of the image encoder; the text encoder stays in float32

    All dimensions follow from the shapes of the tensors. Raises ValueError for files that are missing, damaged, unsafe
    or of another model, and for a vocabulary of another size than the checkpoint's.
    """
    path = Path(checkpoint)
    how = ("imagereward", torch.device(device), dtype, gradient_checkpointing)
    networks = checkpoint_files.load_once(path, lambda: _Networks(path, device, dtype, gradient_checkpointing), *how)
    words = WordPiece(Path(tokenizer) if tokenizer is not None else path.parent / "vocab.txt", _TOKENS)
    if words.size != networks.words:
        raise ValueError(
            f"tokenizer {words.path} has {words.size} entries, checkpoint {path} knows {networks.words}: "
            "give bert-base-uncased's vocab.txt"
        )
    return ImageReward(networks, words, chosen(preprocess, shorter_side(networks.image_size)))


class ImageReward(TowerReward):
    """(mlp(h at [CLS]) − mean) / std. The text encoder also reads the picture, so only image features can be shared.

    Formula, source and range are at the top of this module.
    """

    def __init__(self, networks: "_Networks", words: WordPiece, preprocess: Preprocess) -> None:
        self._networks, self.tower = networks, networks.image
        self._words = words
        self.preprocess = preprocess
        self.info = replace(BUILT_IN["imagereward"], image_size=preprocess.image_size, preprocess=str(preprocess))

    def notes(self, prompts: Sequence[Any]) -> list[str | None]:
        """For each text, what the score does not read of it, or None."""
        return cut(self._words.lengths(as_texts(prompts)), self._words.length)

    def score_features(self, features: Tensor, prompts: Tensor | Sequence[Any]) -> Tensor:
        """Score B pictures' tokens, Tensor[B, 1 + patches, width], under B texts -> float32 Tensor[B].

        Raises ValueError for prompts that are not texts, and for a number of prompts other than B. Prompts of more than
        35 tokens are truncated, with a warning for the first.
        """
        ids, mask = (each.to(self.tower.device) for each in self._words(prompts, len(features)))
        raw = self._networks.mlp(self._networks.text(ids, mask, features)).squeeze(-1)
        return ((raw - _MEAN) / _STD).float()


class _Networks:
    """The frozen image encoder, text encoder and mlp of a checkpoint, its image size and its vocabulary's size."""

    def __init__(
        self, path: Path, device: str | torch.device, dtype: torch.dtype, gradient_checkpointing: bool
    ) -> None:
        tensors = {name: tensor for name, tensor in checkpoint_files.load(path).items() if name not in _UNUSED}
        network = _network(tensors, path)
        image = network["blip"]["visual_encoder"]
        if gradient_checkpointing:
            recompute(image.blocks)
        text = network["blip"]["text_encoder"]
        self.image_size, self.words = image.patch_embed.img_size, text.config.vocab_size
        self.image = FrozenNetwork(image, device, dtype)
        # In float32: it is a tenth of the work, and would cause most of bfloat16's error in the score.
        self.text = FrozenNetwork(_ClassToken(text), device, precision(dtype))
        self.mlp = FrozenNetwork(network["mlp"]["layers"], device, precision(dtype))


class _ClassToken(nn.Module):
    """The text encoder's last state at [CLS]: Tensor[B, width]."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, ids: Tensor, mask: Tensor, tokens: Tensor) -> Tensor:
        output = self.encoder(input_ids=ids, attention_mask=mask, encoder_hidden_states=tokens, is_decoder=False)
        return output.last_hidden_state[:, 0]


def _network(tensors: Mapping[str, Tensor], path: Path) -> Any:
    """The network under the file's own names, holding the file's tensors."""
    try:
        with torch.device("meta"):
            blip = {"visual_encoder": _vision(tensors), "text_encoder": _text(tensors)}
            layers = score_head(blip["text_encoder"].config.hidden_size)
            network = nn.ModuleDict({"blip": nn.ModuleDict(blip), "mlp": nn.ModuleDict({"layers": layers})})
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise ValueError(f"checkpoint {path} is not an ImageReward.pt: cannot read its dimensions: {error}") from error
    checkpoint_files.assign(network, tensors, path)
    embeddings = blip["text_encoder"].embeddings
    embeddings.position_ids = torch.arange(embeddings.position_embeddings.num_embeddings)[None]  # not in the file
    return network


def _vision(tensors: Mapping[str, Tensor]) -> Any:
    from timm.models.vision_transformer import VisionTransformer

    width, _, patch, _ = tensors[f"{_VISION}.patch_embed.proj.weight"].shape
    _, positions, _ = tensors[f"{_VISION}.pos_embed"].shape
    return VisionTransformer(
        img_size=math.isqrt(positions - 1) * patch,
        patch_size=patch,
        embed_dim=width,
        depth=_depth(tensors, f"{_VISION}.blocks"),
        num_heads=width // _HEAD_WIDTH,
        mlp_ratio=len(tensors[f"{_VISION}.blocks.0.mlp.fc1.weight"]) / width,
        num_classes=0,
        global_pool="",
    )


def _text(tensors: Mapping[str, Tensor]) -> Any:
    from transformers import BlipTextConfig, BlipTextModel

    words, width = tensors[f"{_TEXT}.embeddings.word_embeddings.weight"].shape
    config = BlipTextConfig(
        vocab_size=words,
        hidden_size=width,
        encoder_hidden_size=len(tensors[f"{_VISION}.cls_token"].flatten()),
        intermediate_size=len(tensors[f"{_TEXT}.encoder.layer.0.intermediate.dense.weight"]),
        num_hidden_layers=_depth(tensors, f"{_TEXT}.encoder.layer"),
        num_attention_heads=width // _HEAD_WIDTH,
        max_position_embeddings=len(tensors[f"{_TEXT}.embeddings.position_embeddings.weight"]),
    )
    return BlipTextModel(config, add_pooling_layer=False)


def _depth(tensors: Mapping[str, Tensor], prefix: str) -> int:
    blocks = (re.match(rf"{re.escape(prefix)}\.(\d+)\.", name) for name in tensors)
    return 1 + max(int(match[1]) for match in blocks if match)
