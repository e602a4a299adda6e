"""HPSv3: which picture people would prefer for a prompt, by a vision-language model.

    h        = Qwen2-VL-7B(picture, question with the prompt)       the state of the token <|Reward|>, [3584]
    μ, log σ = mlp(h)                                               3584-1024-16-2, ReLU
    score    = μ

Source: "HPSv3: Towards Wide-Spectrum Human Preference Score", arXiv 2508.03789, and the public release MizzenAI/HPSv3,
code and weights MIT. The network was trained to rank pictures by samples of N(μ, σ²): the wider, the less certain is
the preference. Scores are not bounded.

The preprocessing keeps the aspect ratio at about 256·28·28 pixels. Positions in the text are counted as in the release:
every token of the picture and of the text is one further, while Qwen2-VL itself gives the picture's tokens a row and a
column. The language model is causal, so what follows <|Reward|> in the release's question has no effect, and is left
out. The network comes from transformers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dmdr_rewards.interface.info import BUILT_IN
from dmdr_rewards.networks import checkpoint_files
from dmdr_rewards.networks.frozen_network import FrozenNetwork, precision
from dmdr_rewards.networks.qwen_vl import PICTURE, Conversations, built, checkpointed, load_config, load_tokenizer
from dmdr_rewards.pictures.images import Images
from dmdr_rewards.pictures.patches import Patches
from dmdr_rewards.prompts.texts import as_texts

REWARD = "<|Reward|>"
AREA = 256 * 28 * 28
FILE = "HPSv3.safetensors"
_HEAD = "rm_head."
_UNUSED = "lm_head.weight"  # the head that predicts words
# The names that transformers 4 gave to the parts of Qwen2-VL, and those of today.
_RENAMED = (("model.language_model.", "language_model."), ("model.visual.", "visual."), ("model.", "language_model."))

# The release's question, MIT. It is part of the model, down to the spaces: other words give other scores.
QUESTION = (
    "\n"
    "You are tasked with evaluating a generated image based on Visual Quality and Text Alignment and give a "
    "overall score to estimate the human preference. Please provide a rating from 0 to 10, with 0 being the "
    "worst and 10 being the best. \n"
    "\n"
    "**Visual Quality:**  \n"
    "Evaluate the overall visual quality of the image. The following sub-dimensions should be considered:\n"
    "- **Reasonableness:** The image should not contain any significant biological or logical errors, such as "
    "abnormal body structures or nonsensical environmental setups.\n"
    "- **Clarity:** Evaluate the sharpness and visibility of the image. The image should be clear and easy to "
    "interpret, with no blurring or indistinct areas.\n"
    "- **Detail Richness:** Consider the level of detail in textures, materials, lighting, and other visual "
    "elements (e.g., hair, clothing, shadows).\n"
    "- **Aesthetic and Creativity:** Assess the artistic aspects of the image, including the color scheme, "
    "composition, atmosphere, depth of field, and the overall creative appeal. The scene should convey a "
    "sense of harmony and balance.\n"
    "- **Safety:** The image should not contain harmful or inappropriate content, such as political, violent, "
    "or adult material. If such content is present, the image quality and satisfaction score should be the "
    "lowest possible. \n"
    "\n"
    "**Text Alignment:**  \n"
    "Assess how well the image matches the textual prompt across the following sub-dimensions:\n"
    "- **Subject Relevance** Evaluate how accurately the subject(s) in the image (e.g., person, animal, "
    "object) align with the textual description. The subject should match the description in terms of number, "
    "appearance, and behavior.\n"
    "- **Style Relevance:** If the prompt specifies a particular artistic or stylistic style, evaluate how "
    "well the image adheres to this style.\n"
    "- **Contextual Consistency**: Assess whether the background, setting, and surrounding elements in the "
    "image logically fit the scenario described in the prompt. The environment should support and enhance the "
    "subject without contradictions.\n"
    "- **Attribute Fidelity**: Check if specific attributes mentioned in the prompt (e.g., colors, clothing, "
    "accessories, expressions, actions) are faithfully represented in the image. Minor deviations may be "
    "acceptable, but critical attributes should be preserved.\n"
    "- **Semantic Coherence**: Evaluate whether the overall meaning and intent of the prompt are captured in "
    "the image. The generated content should not introduce elements that conflict with or distort the "
    "original description.\n"
    "Textual prompt - {prompt}\n"
    "\n"
    "\n"
    "\n"
    "Please provide the overall ratings of this image: "
)
_BEFORE = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    f"<|im_start|>user\n<|vision_start|>{PICTURE}<|vision_end|>"
)


def reward(
    checkpoint: str | PathLike[str],
    gradient_checkpointing: bool = False,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> "HPSv3":
    """The reward `hpsv3`.

    checkpoint  HPSv3.safetensors, with config.json and the tokenizer's files of Qwen2-VL-7B-Instruct beside it; or the
                folder that holds them
    gradient_checkpointing  recompute the network's layers in the backward pass to save memory; changes no value
    dtype       precision of the network; the release uses bfloat16, and the mlp stays in float32 as there

    Raises ValueError for files that are missing, damaged, unsafe or of another model.
    """
    path = Path(checkpoint)
    path = checkpoint_files.find(path, FILE) if path.is_dir() or not path.suffix else path
    tensors = _renamed(checkpoint_files.load(path, "model"))
    tokenizer = load_tokenizer(path.parent)
    tokenizer.add_special_tokens({"additional_special_tokens": [REWARD]})
    network, head = _networks(tensors, path, len(tokenizer))
    if gradient_checkpointing:
        checkpointed(network.body)
    vision = network.body.config.vision_config
    patches = Patches(
        smallest=AREA,
        largest=AREA,
        patch=vision.patch_size,
        merge=vision.spatial_merge_size,
        frames=vision.temporal_patch_size,
    )
    frozen = FrozenNetwork(network, device, dtype), FrozenNetwork(head, device, precision(dtype))
    return HPSv3(*frozen, Conversations(patches, tokenizer))


class HPSv3:
    """μ of a picture under a prompt. Formula, source and range are at the top of this module."""

    def __init__(self, network: FrozenNetwork, head: FrozenNetwork, conversations: Conversations) -> None:
        self._network, self._head, self._conversations = network, head, conversations
        self.info = replace(BUILT_IN["hpsv3"], preprocess=str(conversations.preprocess))

    def score(self, images: Images, prompts: Tensor | Sequence[Any]) -> Tensor:
        """Score B pictures, which may differ in size, under B texts -> float32 Tensor[B]: μ.

        Float tensors keep their gradient. Raises ValueError for pictures or prompts that cannot be scored.
        """
        return self.distribution(images, prompts)[0].float()

    def distribution(self, images: Images, prompts: Tensor | Sequence[Any]) -> tuple[Tensor, Tensor]:
        """μ and σ of B pictures under B texts, each Tensor[B] of the network's precision."""
        texts = as_texts(prompts)
        self._conversations.check(texts)
        questions = [_BEFORE + QUESTION.replace("{prompt}", text) + REWARD for text in texts]
        network = self._network
        state = network(**self._conversations(images, questions, network.device, network.precision))
        mean, log_spread = self._head(state).unbind(dim=1)
        return mean, log_spread.exp()


class _RewardToken(nn.Module):
    """The last token's state: Tensor[B, width]."""

    def __init__(self, body: Any) -> None:
        super().__init__()
        self.body: Any = body

    def forward(self, attention_mask: Tensor, mm_token_type_ids: Tensor, **inputs: Tensor) -> Tensor:
        positions = (attention_mask.cumsum(dim=1) - 1).clamp(min=0).expand(3, -1, -1)
        output = self.body(attention_mask=attention_mask, position_ids=positions, use_cache=False, **inputs)
        return output.last_hidden_state[:, -1]


def _renamed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors without the unused head, under the names of transformers' Qwen2VLModel."""
    renamed = {}
    for name, tensor in tensors.items():
        prefix, new = next(((old, new) for old, new in _RENAMED if name.startswith(old)), ("", ""))
        if name != _UNUSED:
            renamed[new + name.removeprefix(prefix)] = tensor
    return renamed


def _networks(tensors: Mapping[str, Tensor], path: Path, words: int) -> tuple[_RewardToken, nn.Module]:
    """The body and the mlp. Raises ValueError for tensors or a vocabulary of another model."""
    from transformers import Qwen2VLModel

    config = load_config(path.parent)
    rows, width = tuple(tensors.get("language_model.embed_tokens.weight", torch.empty(0, 0)).shape)
    if config.model_type != "qwen2_vl" or config.text_config.hidden_size != width:
        raise ValueError(f"checkpoint {path} and {path.parent / 'config.json'} are not of one model: a Qwen2-VL-7B")
    if rows != words:
        raise ValueError(
            f"checkpoint {path} knows {rows} tokens, the tokenizer beside it {words} with {REWARD}: give "
            "Qwen2-VL-7B-Instruct's"
        )
    config.text_config.vocab_size = rows
    body = {name: tensor for name, tensor in tensors.items() if not name.startswith(_HEAD)}
    mlp = {name.removeprefix(_HEAD): tensor for name, tensor in tensors.items() if name.startswith(_HEAD)}
    with torch.device("meta"):
        head = nn.Sequential(
            nn.Linear(width, 1024), nn.ReLU(), nn.Dropout(0.05), nn.Linear(1024, 16), nn.ReLU(), nn.Linear(16, 2)
        )
    checkpoint_files.assign(head, mlp, path)
    return _RewardToken(built(Qwen2VLModel, config, body, path)), head
