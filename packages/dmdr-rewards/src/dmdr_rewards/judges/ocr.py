"""The text in a picture, read by an OCR library in this process: no endpoint, no gradient.

RapidOCR's wheel holds its weights (PP-OCRv4 as ONNX files, Apache-2.0; Latin letters, digits and Chinese) and runs
without torch. EasyOCR and PaddleOCR download theirs at the first call.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dmdr_rewards.base.errors import MissingError
from dmdr_rewards.interface.info import BUILT_IN
from dmdr_rewards.judges.judge import without_gradient
from dmdr_rewards.judges.reading import quoted, share_read
from dmdr_rewards.pictures.images import Images
from dmdr_rewards.prompts.texts import as_texts


class LocalOCR:
    """The share of the prompt's quoted text that RapidOCR reads in the picture, in [0, 1]: `reading.share_read`.

    device  device of the scores; RapidOCR runs on the CPU
    dtype   ignored

    Raises ValueError if the library is not installed.
    """

    info = BUILT_IN["ocr-local"]

    def __init__(self, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> None:
        try:
            from rapidocr_onnxruntime import RapidOCR
        except ImportError as error:
            raise MissingError(f"reward 'ocr-local' needs a library that cannot be imported ({error})") from error
        self._engine = RapidOCR()
        self._device = torch.device(device)

    def score(self, images: Images, prompts: Tensor | Sequence[Any]) -> Tensor:
        """Score B pictures, which may differ in size, under B texts -> float32 Tensor[B], without gradient.

        Raises ValueError for pictures that cannot be scored or require a gradient, and for a prompt without text in
        double quotes.
        """
        pictures = without_gradient(images, self.info.name)
        texts = as_texts(prompts, len(pictures))
        for text in texts:
            quoted(text)
        scores = [share_read(text, self._read(picture)) for picture, text in zip(pictures, texts, strict=True)]
        return torch.tensor(scores, dtype=torch.float32, device=self._device)

    def _read(self, picture: Image.Image) -> str:
        lines, _ = self._engine(np.asarray(picture)[:, :, ::-1])  # the library reads BGR
        return " ".join(text for _, text, _ in lines or [])
