"""VQAScore: how likely a vision-language model in this process says that the picture shows the prompt.

    score = Σ P(token | picture, question)        over the tokens that spell "yes", such as "Yes" and " yes"

Source: "Evaluating Text-to-Visual Generation with Image-to-Text Generation", arXiv 2404.01291, and its question. The
release linzhiqiu/t2v_metrics uses CLIP-FlanT5, or counts the token "Yes" of a Qwen-VL alone. The reward `vqascore` asks
the same question over HTTP; this one has a gradient.
"""

import re
from collections.abc import Sequence
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dmdr_rewards.interface.info import BUILT_IN
from dmdr_rewards.networks.qwen_vl import ChatModel
from dmdr_rewards.pictures.images import Images
from dmdr_rewards.prompts.texts import as_texts

QUESTION = 'Does this figure show "{prompt}"? Please answer yes or no.'


class VQAScore:
    """P("yes") in [0, 1], differentiable. The reward `vqascore-local`.

    checkpoint  folder of a Qwen2-VL, Qwen2.5-VL or Qwen3-VL in the format of transformers
    template    the question; {prompt} is replaced by the prompt
    gradient_checkpointing  recompute the network's layers in the backward pass to save memory; changes no value

    Raises ValueError for files that are missing, damaged, unsafe or of another family, a template without {prompt}, and
    a tokenizer without a token for "yes".
    """

    def __init__(
        self,
        checkpoint: str | PathLike[str],
        template: str = QUESTION,
        gradient_checkpointing: bool = False,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if "{prompt}" not in template:
            raise ValueError(f"template {template!r} must contain {{prompt}}")
        self._template = template
        self._chat = ChatModel(Path(checkpoint), device, dtype, gradient_checkpointing)
        tokenizer = self._chat.tokenizer
        likely = (token for name, token in tokenizer.get_vocab().items() if "yes" in name.lower())
        self._yes = [token for token in likely if re.sub(r"\W", "", tokenizer.decode([token])).lower() == "yes"]
        if not self._yes:
            raise ValueError(f"checkpoint {checkpoint}: its tokenizer has no token for yes")
        self.info = replace(BUILT_IN["vqascore-local"], preprocess=str(self._chat.conversations.preprocess))

    def score(self, images: Images, prompts: Tensor | Sequence[Any]) -> Tensor:
        """Score B pictures, which may differ in size, under B texts -> float32 Tensor[B].

        Float tensors keep their gradient. Raises ValueError for pictures or prompts that cannot be scored.
        """
        texts = as_texts(prompts)
        self._chat.conversations.check(texts)
        logits = self._chat.next_token(images, [self._template.replace("{prompt}", text) for text in texts])
        return logits.softmax(dim=1)[:, self._yes].sum(dim=1).float()
