"""Rewards that ask a vision-language model in this process, without an endpoint and without a gradient."""

from os import PathLike
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from PIL import Image

from dmdr_rewards.interface.info import BUILT_IN
from dmdr_rewards.judges.endpoint import Answer
from dmdr_rewards.judges.judge import Judge
from dmdr_rewards.judges.reading import rating_after
from dmdr_rewards.networks.qwen_vl import ChatModel


class LocalModel:
    """A Qwen-VL that answers as an `Endpoint` does, one picture at a time. Options and errors are `ChatModel`'s."""

    def __init__(self, folder: Path, device: str | torch.device, dtype: torch.dtype) -> None:
        self.chat = ChatModel(folder, device, dtype)

    def ask(self, picture: Image.Image, question: str, request: dict[str, Any]) -> Answer:
        """The likeliest answer to a question about a picture, of at most request["max_tokens"] tokens."""
        return Answer(self.chat.answer(picture, question, request["max_tokens"]), [])


class UnifiedReward(Judge):
    """The number from 1 to 5 that a fine-tuned Qwen-VL writes behind "Final Score:".

    checkpoint  folder of UnifiedReward, or of another Qwen-VL, in the format of transformers
    template, fallback, on_failure, device  as in `Judge`

    Source: "Unified Reward Model for Multimodal Understanding and Generation", arXiv 2503.05236. The default template
    is the question of its release (MIT) for a single picture.

    Raises ValueError for files that are missing, damaged, unsafe or of another family.
    """

    template = (
        "You are given a text caption and a generated image based on that caption. Your task is to evaluate this image "
        "based on two key criteria:\n"
        "1. Alignment with the Caption: Assess how well this image aligns with the provided caption. Consider the "
        "accuracy of depicted objects, their relationships, and attributes as described in the caption.\n"
        "2. Overall Image Quality: Examine the visual quality of this image, including clarity, detail preservation, "
        "color accuracy, and overall aesthetic appeal.\n"
        "Extract key elements from the provided text caption, evaluate their presence in the generated image using the "
        "format: 'element (type): value' (where value=0 means not generated, and value=1 means generated), and assign "
        "a score from 1 to 5 after 'Final Score:'.\n"
        "Your task is provided as follows:\n"
        "Text Caption: [{prompt}]"
    )
    request: ClassVar[dict[str, Any]] = {"max_tokens": 512}
    info = BUILT_IN["unified-reward"]

    def __init__(
        self,
        checkpoint: str | PathLike[str],
        template: str | None = None,
        fallback: float | None = None,
        on_failure: Literal["stop", "skip"] = "stop",
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self._local = LocalModel(Path(checkpoint), device, dtype)
        super().__init__(self._local, template, 1, fallback, on_failure, device)

    def question(self, prompt: str) -> str:
        """The question. Raises ValueError for a prompt that holds a token with a meaning of its own."""
        self._local.chat.conversations.check([prompt])
        return super().question(prompt)

    def read(self, answer: str, logprobs: list[dict[str, Any]], prompt: str) -> float | None:
        return rating_after("Final Score:", answer, *self.info.range)
