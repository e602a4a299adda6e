"""The image tower and the text tower of a CLIP, from files of open_clip or transformers.

Networks are built on the meta device and use the tensors of the memory-mapped file, so a checkpoint is in memory once.
Equal checkpoints (bytes, architecture, device, dtype) give the same object, as long as it is in use.
"""

import functools
import json
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dmdr_rewards.base.errors import MissingError
from dmdr_rewards.networks import checkpoint_files
from dmdr_rewards.networks.frozen_network import FrozenNetwork, recompute
from dmdr_rewards.prompts.text_cache import TextCache
from dmdr_rewards.prompts.texts import Truncation

OPEN_CLIP_FILES = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
)
TRANSFORMERS_FILES = ("model.safetensors", "pytorch_model.bin")
_TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json")


class Tokenize(Protocol):
    """A tokenizer with its context. `lengths` counts the tokens of each text, before it is truncated."""

    context: int

    def lengths(self, prompts: list[str]) -> list[int]: ...

    def __call__(self, prompts: list[str]) -> tuple[Tensor, ...]: ...


class Towers:
    """The image tower and the text tower of a CLIP.

    image        the frozen image tower: pixels Tensor[B, 3, h, w] -> features Tensor[B, D], not normalised
    image_size   (height, width) of its pixels
    logit_scale  the learned factor of the cosine, exp(the stored value)
    texts        list of B texts -> Tensor[B, D] of unit length; recent embeddings are cached. Texts longer than the
                 context are truncated, with a warning for the first
    tokens       list of B texts -> the number of tokens in each, before it is truncated
    context      the most tokens that the text tower reads
    activation   of the towers, in words

    The text tower stays in float32 where `dtype` is bfloat16 or float16: its work is small and done once for a text,
    and in half precision an embedding would depend on how many texts are encoded with it.
    """

    def __init__(
        self,
        image: nn.Module,
        text: nn.Module,
        tokenize: Tokenize,
        activation: str,
        image_size: tuple[int, int],
        logit_scale: Tensor,
        device: str | torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.image = FrozenNetwork(image, device, dtype)
        self.image_size, self.activation = image_size, activation
        self.logit_scale = float(logit_scale.detach().double().exp())
        self.texts = TextCache(self._embed)
        self._text_module = text
        self._tokenize, self.tokens, self.context = tokenize, tokenize.lengths, tokenize.context

    @functools.cached_property
    def _text(self) -> FrozenNetwork:
        # Moved to the device on first use: some rewards never read the prompt.
        return FrozenNetwork(self._text_module, self.image.device, self.image.precision)

    def _embed(self, prompts: list[str]) -> Tensor:
        tokens = [part.to(self.image.device) for part in self._tokenize(prompts)]
        return F.normalize(self._text(*tokens), dim=-1)


def open_clip_config(model: str | Path) -> dict[str, Any]:
    """The architecture with this name in open_clip, or from a JSON file, at its top level or under `model_cfg`.

    Raises ValueError for an unknown name, a file without an architecture, and models whose text tower or tokenizer
    would have to be downloaded from a hub.
    """
    import open_clip

    if str(model).endswith(".json"):
        try:
            config = json.loads(Path(model).read_text(encoding="utf-8"))
            config = config.get("model_cfg", config)
            text = config["text_cfg"]
        except (OSError, ValueError, KeyError, AttributeError) as error:
            raise ValueError(f"model {model} is not an open_clip configuration: {error!r}") from error
    elif model in open_clip.list_models():
        config = open_clip.get_model_config(str(model))
        text = config["text_cfg"]
    else:
        raise ValueError(f"model {model!r} is unknown to open_clip: choose one of {', '.join(open_clip.list_models())}")
    if "multimodal_cfg" in config or {"hf_model_name", "hf_tokenizer_name"} & text.keys():
        raise ValueError(f"model {model}: text towers of Hugging Face and captioning models are not supported")
    return config


def open_clip_towers(
    checkpoint: Path,
    config: dict[str, Any],
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    gradient_checkpointing: bool = False,
) -> Towers:
    """Load a CLIP in open_clip's format.

    checkpoint  file of named tensors, at its top level or under "state_dict", or a folder with one of `OPEN_CLIP_FILES`
    config      see `open_clip_config`

    Raises ValueError for a file that is missing, damaged, unsafe or of another architecture.
    """
    path = checkpoint_files.find(checkpoint, *OPEN_CLIP_FILES) if checkpoint.is_dir() else checkpoint

    def load() -> Towers:
        model = _open_clip_model(config, checkpoint_files.load(path, inside="state_dict"), path)
        image, model.visual = model.visual, nn.Identity()
        if gradient_checkpointing:
            image.set_grad_checkpointing()
        height, width = image.image_size if isinstance(image.image_size, tuple) else (image.image_size,) * 2
        text, tokenize = _OpenClipText(model), _OpenClipTokens(config)
        return Towers(image, text, tokenize, _activation(config), (height, width), model.logit_scale, device, dtype)

    how = (json.dumps(config, sort_keys=True), torch.device(device), dtype, gradient_checkpointing)
    return checkpoint_files.load_once(path, load, *how)


def _activation(config: dict[str, Any]) -> str:
    kind = "QuickGELU" if config.get("quick_gelu") else "GELU"
    vision = config["vision_cfg"]
    own = vision.get("timm_model_name") or isinstance(vision.get("layers"), list)  # timm's networks, and ResNets
    return f"{kind} in the text tower" if own else kind


def transformers_towers(
    folder: Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    gradient_checkpointing: bool = False,
) -> Towers:
    """Load a CLIPModel in transformers' format.

    folder  config.json, model.safetensors or pytorch_model.bin, and the tokenizer's files

    Raises ValueError for files that are missing, damaged, unsafe or of another model.
    """
    path = checkpoint_files.find(folder, *TRANSFORMERS_FILES)
    config = transformers_config(folder)
    tokenizer = tokenizer_hashes(folder)

    def load() -> Towers:
        model = transformers_model(folder, checkpoint_files.load(path), path)
        if gradient_checkpointing:
            recompute(vision_layers(model))
        side = model.config.vision_config.image_size
        tokenize = TransformersTokens(folder, model.config.text_config.max_position_embeddings)
        image, text = _TransformersImage(model), _TransformersText(model)
        return Towers(image, text, tokenize, activation_of(model), (side, side), model.logit_scale, device, dtype)

    how = (json.dumps([config, tokenizer], sort_keys=True), torch.device(device), dtype, gradient_checkpointing)
    return checkpoint_files.load_once(path, load, *how)


def tokenizer_hashes(folder: Path) -> dict[str, str]:
    """The SHA-256 of each file of the tokenizer in a folder. Raises MissingError if there is no tokenizer."""
    found = {name: checkpoint_files.sha256(folder / name) for name in _TOKENIZER_FILES if (folder / name).is_file()}
    if not found.keys() & {"tokenizer.json", "vocab.json"}:  # transformers would create an empty one
        raise MissingError(
            f"checkpoint {folder} has no tokenizer: copy its CLIP's tokenizer.json, or vocab.json and merges.txt, there"
        )
    return found


def activation_of(model: Any) -> str:
    """The activation of both towers of a CLIPModel, in words."""
    kinds = dict.fromkeys((model.config.vision_config.hidden_act, model.config.text_config.hidden_act))
    return " and ".join({"quick_gelu": "QuickGELU", "gelu": "GELU"}.get(kind, kind) for kind in kinds)


def vision_layers(model: Any) -> nn.ModuleList:
    """The layers of the image tower of a CLIPModel."""
    return next(part for part in model.vision_model.modules() if isinstance(part, nn.ModuleList))


def transformers_config(folder: Path) -> dict[str, Any]:
    """The config.json in the folder of a CLIPModel. Raises ValueError if it is missing or of another model."""
    path = checkpoint_files.find(folder, "config.json")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if config.get("model_type") != "clip":
        raise ValueError(f"checkpoint {folder} holds a {config.get('model_type')} model: give a CLIPModel (clip)")
    return config


def _open_clip_model(config: dict[str, Any], tensors: dict[str, Tensor], path: Path) -> Any:
    with torch.device("meta"):
        model = _empty_open_clip(config)
    checkpoint_files.assign(model, tensors, path)
    text = getattr(model, "text", model)
    if text.attn_mask is not None:  # not in the file
        text.attn_mask = torch.full(text.attn_mask.shape, -torch.inf).triu(1)
    if any(buffer.is_meta for buffer in model.buffers()):
        model = _empty_open_clip(config)  # it computes further tables, which are not in the file
        model.load_state_dict(tensors, assign=True)
    return model


def _empty_open_clip(config: dict[str, Any]) -> Any:
    import open_clip

    sizes = json.loads(json.dumps(config))
    sizes["vision_cfg"]["timm_model_pretrained"] = False
    kind = open_clip.CustomTextCLIP if sizes.pop("custom_text", False) else open_clip.CLIP
    return kind(**sizes)


class _OpenClipTokens:
    def __init__(self, config: dict[str, Any]) -> None:
        from open_clip import SimpleTokenizer

        text = config["text_cfg"]
        self.context = text.get("context_length", 77)
        self._tokenizer = SimpleTokenizer(context_length=self.context, **text.get("tokenizer_kwargs", {}))
        self._warn = Truncation(self.context)

    def lengths(self, prompts: list[str]) -> list[int]:
        return [len(self._tokenizer.encode(prompt)) + 2 for prompt in prompts]

    def __call__(self, prompts: list[str]) -> tuple[Tensor, ...]:
        self._warn(self.lengths(prompts), prompts)
        return (self._tokenizer(prompts),)


class TransformersTokens:
    """The tokenizer in a folder: B texts -> ids and attention mask, Tensor[B, tokens] each.

    padding  True: up to the longest of the texts; "max_length": up to `context`

    Raises ValueError for files that transformers cannot read.
    """

    def __init__(self, folder: Path, context: int, padding: bool | str = True) -> None:
        from transformers import AutoTokenizer

        try:
            self._tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        except (OSError, ValueError, TypeError) as error:
            raise ValueError(f"checkpoint {folder}: its tokenizer cannot be read: {error}") from error
        self.context, self._padding = context, padding
        self._warn = Truncation(context)

    def lengths(self, prompts: list[str]) -> list[int]:
        return [len(tokens) for tokens in self._tokenizer(prompts, verbose=False).input_ids]

    def __call__(self, prompts: list[str]) -> tuple[Tensor, ...]:
        self._warn(self.lengths(prompts), prompts)
        batch = self._tokenizer(
            prompts, padding=self._padding, truncation=True, max_length=self.context, return_tensors="pt"
        )
        return batch.input_ids, batch.attention_mask


class _OpenClipText(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model.encode_text(tokens)


def transformers_model(folder: Path, tensors: dict[str, Tensor], path: Path) -> Any:
    """The CLIPModel of the config.json in `folder` with the tensors of the file `path`.

    Raises ValueError for tensors of another model.
    """
    from transformers import CLIPConfig, CLIPModel

    # Files from before transformers 4.31 also hold these constants.
    tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith(".position_ids")}
    loader: Any = CLIPModel
    try:
        model, report = loader.from_pretrained(
            None,
            config=CLIPConfig.from_pretrained(folder, local_files_only=True),
            state_dict=tensors,
            ignore_mismatched_sizes=True,  # refused below, listed by name together with all others
            output_loading_info=True,
        )
    except (OSError, RuntimeError, ValueError, TypeError) as error:
        raise ValueError(f"checkpoint {folder} cannot be loaded as a CLIPModel: {error}") from error
    checkpoint_files.refuse_unless_loaded(path, report)
    return model


class _TransformersImage(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.tower, self.projection = model.vision_model, model.visual_projection

    def forward(self, pixels: Tensor) -> Tensor:
        return self.projection(self.tower(pixel_values=pixels).pooler_output)


class _TransformersText(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.tower, self.projection = model.text_model, model.text_projection

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.projection(self.tower(input_ids=ids, attention_mask=mask).pooler_output)
