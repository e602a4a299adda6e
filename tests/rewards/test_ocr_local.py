"""A stand-in plays RapidOCR, whose wheel is an optional dependency."""

import sys
from types import ModuleType
from typing import Any

import dmdr_rewards
import numpy as np
import pytest
import torch
from dmdr_rewards.base.errors import MissingError
from PIL import Image

RED, WHITE = (255, 0, 0), (255, 255, 255)
BOX = [[0.0, 0.0], [9.0, 0.0], [9.0, 9.0], [0.0, 9.0]]


class RapidOCR:
    """Reads two lines in a red picture and none in others: the forms that rapidocr-onnxruntime 1.4.4 returns."""

    def __call__(self, picture: np.ndarray) -> tuple[Any, Any]:
        assert picture.shape == (20, 30, 3)
        if picture[0, 0].tolist() == [0, 0, 255]:  # BGR
            return [[BOX, "Hello", 0.99], [BOX, "Wor1d", 0.7]], [0.1, 0.1, 0.1]
        return None, None


@pytest.fixture
def reward(monkeypatch: pytest.MonkeyPatch) -> Any:
    module = ModuleType("rapidocr_onnxruntime")
    module.RapidOCR = RapidOCR  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "rapidocr_onnxruntime", module)
    return dmdr_rewards.create("ocr-local")


def test_the_score_is_the_share_of_the_quoted_text_that_is_read(reward: Any) -> None:
    pictures = [Image.new("RGB", (30, 20), colour) for colour in (RED, WHITE, RED)]
    scores = reward.score(pictures, ['a sign "hello World"', 'a sign "hello"', "“LO” on a wall"])
    torch.testing.assert_close(scores, torch.tensor([0.9, 0.0, 1.0]))


def test_what_cannot_be_scored_is_refused(reward: Any) -> None:
    picture = Image.new("RGB", (30, 20))
    with pytest.raises(ValueError, match=r"quotes no text"):
        reward.score([picture], ["a sign"])
    with pytest.raises(ValueError, match=r"'ocr-local' is not differentiable"):
        reward.score(torch.zeros(1, 3, 20, 30, requires_grad=True), ['"a"'])


def test_without_the_library_the_error_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rapidocr_onnxruntime", None)
    with pytest.raises(MissingError, match=r"'ocr-local' needs .*; the official weights: pip install .*\[ocr\]"):
        dmdr_rewards.create("ocr-local")
