"""Class labels: the prompts of class-conditional rewards."""

from collections.abc import Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor


def as_labels(prompts: Tensor | Sequence[Any], count: int, num_classes: int, device: torch.device) -> Tensor:
    """An integer Tensor[B] or a sequence of integers -> LongTensor[B] on `device`.

    count  number of pictures

    Raises ValueError for labels that are not integers, a rank other than 1, a number of labels other than `count`, and
    a label outside 0 to num_classes − 1.
    """
    labels = _as_tensor(prompts)
    if labels.ndim != 1:
        raise ValueError(f"class labels have shape {tuple(labels.shape)}: give one integer per picture, shape [B]")
    if len(labels) != count:
        raise ValueError(f"{count} images but {len(labels)} class labels: give one label per picture")
    low, high = torch.stack(torch.aminmax(labels)).tolist()
    if low < 0 or high >= num_classes:
        wrong = low if low < 0 else high
        raise ValueError(f"class label {wrong} is out of range: this classifier knows 0 to {num_classes - 1}")
    if device.type == "cuda" and labels.device.type == "cpu":
        labels = labels.pin_memory()  # then the CPU does not wait for the copy
    return labels.to(device, torch.long, non_blocking=device.type != "mps")


def _as_tensor(prompts: Tensor | Sequence[Any]) -> Tensor:
    if isinstance(prompts, Tensor):
        if prompts.is_floating_point() or prompts.is_complex() or prompts.dtype == torch.bool:
            raise ValueError(f"class labels have dtype {prompts.dtype}: give integers, for instance labels.long()")
        return prompts
    if isinstance(prompts, str):
        raise ValueError(f"prompts is the text {prompts!r}: this reward takes a list of integer class labels")
    labels = list(prompts)
    for label in labels:
        if not isinstance(label, Integral) or isinstance(label, bool):
            raise ValueError(f"class label {label!r} is a {type(label).__name__}: this reward takes integers")
    return torch.tensor([int(label) for label in labels], dtype=torch.long)
