from typing import Any

import numpy as np
import pytest
import torch
from dmdr_rewards.prompts.labels import as_labels

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "given", [[0, 6], (0, 6), torch.tensor([0, 6]), torch.tensor([0, 6], dtype=torch.int32), np.array([0, 6])]
)
def test_integers_in_any_form(given: Any) -> None:
    labels = as_labels(given, 2, 7, CPU)
    assert labels.dtype == torch.long
    assert labels.tolist() == [0, 6]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([0, 7], r"class label 7 is out of range: this classifier knows 0 to 6"),
        (torch.tensor([-1, 3]), r"class label -1 is out of range"),
        ([1], "2 images but 1 class labels: give one"),
        ([], "2 images but 0 class labels"),
        ([1, 2.0], "class label 2.0 is a float"),
        ([1, True], "class label True is a bool"),
        (["cat", "dog"], "class label 'cat' is a str: this reward takes integers"),
        ("ab", "prompts is the text 'ab'"),
        (torch.tensor([0.0, 1.0]), "class labels have dtype torch.float32"),
        (torch.tensor([True, False]), "class labels have dtype torch.bool"),
        (torch.tensor([[0], [1]]), r"class labels have shape \(2, 1\)"),
        (torch.tensor(3), r"class labels have shape \(\)"),
    ],
)
def test_what_is_refused(given: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        as_labels(given, 2, 7, CPU)
