"""Conditions that stand for class labels."""

from collections.abc import Sequence
from typing import Any

import torch
from dmdr_core.base.devices import on_device

from dmdr_models.families.protocols import Condition


class ClassLabels:
    """Gives a family `condition` and `null_condition` of class labels; stands before the family's base class.

    The network takes them as `class_labels`, `[B]` int64. The label `num_classes` is the null class.
    """

    num_classes: Any
    device: torch.device

    def condition(self, prompts: Sequence[Any]) -> Condition:
        try:
            labels = torch.as_tensor(prompts)
        except (TypeError, ValueError, RuntimeError):
            labels = torch.empty(0)
        if labels.dtype.is_floating_point or labels.dtype == torch.bool or labels.ndim != 1:
            raise ValueError(f"class labels must be a list of whole numbers, got {prompts!r}")
        wrong = labels[(labels < 0) | (labels >= self.num_classes)]
        if len(wrong):
            raise ValueError(f"class label {int(wrong[0])} is out of range; valid are 0 to {self.num_classes - 1}")
        return {"class_labels": on_device(labels.long(), self.device)}

    def null_condition(self, batch: int) -> Condition:
        return {"class_labels": torch.full((batch,), self.num_classes, device=self.device)}
