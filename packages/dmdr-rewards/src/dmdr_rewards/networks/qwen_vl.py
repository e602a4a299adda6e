"""Vision-language models of the Qwen-VL family, from transformers: a picture and a text in, the last state out.

Weights are frozen; gradients reach the pictures, which are resized, normalised and cut into patches in torch.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from dmdr_rewards.base.errors import MissingError
from dmdr_rewards.networks import checkpoint_files
from dmdr_rewards.networks.frozen_network import FrozenNetwork, recompute
from dmdr_rewards.pictures.images import Images, Picture
from dmdr_rewards.pictures.patches import Patches, from_folder

PICTURE = "<|image_pad|>"
"""The token that stands for a picture in a text."""


class Conversations:
    """Pictures and texts -> a model's inputs.

    preprocess  how pictures are cut into patches
    tokenizer   the model's, from `load_tokenizer`
    """

    def __init__(self, preprocess: Patches, tokenizer: Any) -> None:
        self.preprocess, self.tokenizer = preprocess, tokenizer
        self._picture = tokenizer.convert_tokens_to_ids(PICTURE)

    def check(self, prompts: Sequence[str]) -> None:
        """Raise ValueError for a prompt that holds a token with a meaning of its own, such as <|im_end|>."""
        for prompt in prompts:
            found = next((token for token in self.tokenizer.get_added_vocab() if token in prompt), None)
            if found is not None:
                raise ValueError(f"prompt {prompt[:60]!r} holds the model's own token {found!r}: leave it out")

    def __call__(
        self, images: Images, texts: Sequence[str], device: torch.device, dtype: torch.dtype
    ) -> dict[str, Tensor]:
        """B pictures, and B texts that name `PICTURE` once -> inputs of the model, padded at the left.

        So the last state of a row is that of its last token. Raises ValueError for pictures that cannot be read.
        """
        patches, grids = self.preprocess.packed(images, device, dtype)
        if len(grids) != len(texts):
            raise ValueError(f"{len(grids)} images but {len(texts)} prompts: give one prompt per picture")
        counts = (grids.prod(dim=1) // self.preprocess.merge**2).tolist()
        spelled = [text.replace(PICTURE, PICTURE * count, 1) for text, count in zip(texts, counts, strict=True)]
        batch = self.tokenizer(
            spelled, padding=True, padding_side="left", add_special_tokens=False, return_tensors="pt"
        )
        ids = batch["input_ids"].to(device)
        return {
            "input_ids": ids,
            "attention_mask": batch["attention_mask"].to(device),
            "mm_token_type_ids": (ids == self._picture).long(),
            "pixel_values": patches,
            "image_grid_thw": grids,
        }


class ChatModel:
    """A model of the family with its language head, in the format of transformers' `save_pretrained`.

    folder  config.json, *.safetensors, preprocessor_config.json, and the tokenizer's files with its chat template
    gradient_checkpointing  recompute the network's layers in the backward pass to save memory; changes no value

    Raises ValueError for files that are missing, damaged, unsafe or of another family.
    """

    def __init__(
        self, folder: Path, device: str | torch.device, dtype: torch.dtype, gradient_checkpointing: bool = False
    ) -> None:
        config = load_config(folder)
        self.conversations = Conversations(from_folder(folder), load_tokenizer(folder))
        self.tokenizer = self.conversations.tokenizer
        if not self.tokenizer.chat_template:
            raise MissingError(f"checkpoint {folder} has no chat template: copy the model's chat_template.jinja there")
        model = load_model(folder, config)
        if gradient_checkpointing:
            checkpointed(model.model)
        self.network = FrozenNetwork(_NextToken(model), device, dtype)

    def next_token(self, images: Images, questions: Sequence[str]) -> Tensor:
        """Logits of the first token of the answers to B questions about B pictures: Tensor[B, vocabulary].

        Float tensors keep their gradient.
        """
        return self.network(**self._inputs(images, questions))

    @torch.inference_mode()
    def answer(self, picture: Picture, question: str, longest: int) -> str:
        """The likeliest answer, token by token, of at most `longest` tokens."""
        from transformers import GenerationConfig

        model: Any = self.network.module.model
        ends = model.generation_config.eos_token_id
        greedy = GenerationConfig(
            do_sample=False,
            repetition_penalty=1.0,
            max_new_tokens=longest,
            eos_token_id=self.tokenizer.eos_token_id if ends is None else ends,
            pad_token_id=self.tokenizer.pad_token_id,
        )
        inputs = self._inputs([picture], [question])
        with self.network.autocast():
            [tokens] = model.generate(**inputs, generation_config=greedy)
        return self.tokenizer.decode(tokens[inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    def _inputs(self, images: Images, questions: Sequence[str]) -> dict[str, Tensor]:
        texts = [self._spelled(question) for question in questions]
        return self.conversations(images, texts, self.network.device, self.network.precision)

    def _spelled(self, question: str) -> str:
        content = [{"type": "image"}, {"type": "text", "text": question}]
        return self.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )


class _NextToken(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **inputs: Tensor) -> Tensor:
        return self.model(**inputs, logits_to_keep=1, use_cache=False).logits[:, -1]


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer in a folder: tokenizer.json, or vocab.json and merges.txt. Raises ValueError if there is none."""
    if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        raise MissingError(f"checkpoint {folder} must hold the model's tokenizer.json, or vocab.json and merges.txt")
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the library raises any exception for a malformed file
        raise ValueError(f"checkpoint {folder}: its tokenizer cannot be read: {error}") from error
    if PICTURE not in tokenizer.get_vocab():
        raise ValueError(f"checkpoint {folder}: its tokenizer has no {PICTURE}, so it is not of the family Qwen-VL")
    return tokenizer


def load_config(folder: Path) -> Any:
    """The configuration in a folder's config.json. Raises ValueError for a model outside of the family."""
    path = checkpoint_files.find(folder, "config.json")
    from transformers import AutoConfig

    try:
        kind = str(json.loads(path.read_text(encoding="utf-8"))["model_type"])
        if not (kind.startswith("qwen") and "_vl" in kind):
            raise ValueError(f"model_type {kind!r} is not of the family Qwen-VL")
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (KeyError, OSError, TypeError, ValueError) as error:
        raise ValueError(f"{path} cannot be used: {error}") from error


def built(kind: Any, config: Any, tensors: Mapping[str, Tensor], path: Path) -> Any:
    """A transformers model of this class and configuration that holds exactly these tensors, from the file `path`.

    Raises ValueError that lists the differences.
    """
    return _loaded(
        path,
        lambda **options: kind.from_pretrained(None, config=config, state_dict=dict(tensors), **options),
        get_dtype(tensors),
    )


def load_model(folder: Path, config: Any) -> Any:
    """The model with a language head in a folder: config.json and *.safetensors. Raises ValueError as `built` does."""
    if not any(folder.glob("*.safetensors")):
        raise MissingError(f"checkpoint {folder} must hold *.safetensors; pickled weights are not read")
    from transformers import AutoModelForImageTextToText

    def load(**options: Any) -> Any:
        return AutoModelForImageTextToText.from_pretrained(
            folder, config=config, use_safetensors=True, local_files_only=True, trust_remote_code=False, **options
        )

    return _loaded(folder, load, "auto")


def get_dtype(tensors: Mapping[str, Tensor]) -> torch.dtype:
    """The dtype of most floats in a file."""
    kinds = [tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()]
    return max(set(kinds), key=kinds.count, default=torch.float32)


def checkpointed(body: Any) -> None:
    """Gradient checkpointing of a Qwen-VL model without its language head."""
    recompute(body.visual.blocks)
    recompute(body.language_model.layers)


def _loaded(path: Path, load: Callable[..., Any], dtype: Any) -> nn.Module:
    try:
        # Differences are refused below, listed by name together.
        model, report = load(dtype=dtype, ignore_mismatched_sizes=True, output_loading_info=True)
    except (OSError, RuntimeError, TypeError, ValueError, SafetensorError) as error:
        raise ValueError(f"checkpoint {path} cannot be loaded as a model of the family Qwen-VL: {error}") from error
    checkpoint_files.refuse_unless_loaded(path, report)
    return model.eval()
