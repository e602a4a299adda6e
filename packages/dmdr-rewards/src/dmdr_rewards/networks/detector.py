"""Object detectors of transformers: the objects in a picture, with their boxes, and with their masks by Mask2Former."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError

from dmdr_rewards.base.errors import MissingError
from dmdr_rewards.networks import checkpoint_files
from dmdr_rewards.networks.frozen_network import FrozenNetwork

Box = tuple[float, float, float, float]
"""Left, top, right and bottom in pixels."""


@dataclass(frozen=True)
class Found:
    """An object: its class, the detector's confidence in [0, 1], box, and mask, bool [height, width], if any."""

    name: str
    confidence: float
    box: Box
    mask: np.ndarray | None = None


class Detector:
    """A frozen detector.

    folder  a transformers Mask2Former for instances, or a model for object detection such as DETR: config.json with
            the names of its classes in id2label, *.safetensors, preprocessor_config.json

    Raises ValueError for files that are missing, damaged, unsafe or of another kind of model.
    """

    def __init__(self, folder: Path, device: str | torch.device, dtype: torch.dtype) -> None:
        model, self._processor, self._masks = _load(folder)
        self._names: dict[int, str] = model.config.id2label
        self._network = FrozenNetwork(model, device, dtype)

    @property
    def classes(self) -> set[str]:
        """The names of the classes that it knows."""
        return set(self._names.values())

    def __call__(self, picture: Image.Image, threshold: float) -> list[Found]:
        """The objects of a confidence above `threshold`, the most confident first."""
        inputs = self._processor(images=picture, return_tensors="pt").to(self._network.device)
        inputs["pixel_values"] = inputs["pixel_values"].to(self._network.precision)
        with torch.inference_mode(), self._network.autocast():
            outputs = self._network.module(**inputs)
        size = [(picture.height, picture.width)]
        found = self._instances(outputs, threshold, size) if self._masks else self._boxes(outputs, threshold, size)
        return sorted((each for each in found if each.confidence > threshold), key=lambda each: -each.confidence)

    def _boxes(self, outputs: Any, threshold: float, size: list[tuple[int, int]]) -> list[Found]:
        [result] = self._processor.post_process_object_detection(outputs, threshold=threshold, target_sizes=size)
        rows = (result[name].tolist() for name in ("labels", "scores", "boxes"))
        return [Found(self._names[label], score, tuple(box)) for label, score, box in zip(*rows, strict=True)]

    def _instances(self, outputs: Any, threshold: float, size: list[tuple[int, int]]) -> list[Found]:
        outputs.masks_queries_logits = outputs.masks_queries_logits.float()
        [result] = self._processor.post_process_instance_segmentation(
            outputs, threshold=threshold, target_sizes=size, return_binary_maps=True
        )
        segments = result["segments_info"]
        if not segments:
            return []
        masks = result["segmentation"].cpu().numpy() > 0
        return [
            Found(self._names[each["label_id"]], each["score"], _around(mask), mask)
            for each, mask in zip(segments, masks, strict=True)
        ]


def _around(mask: np.ndarray) -> Box:
    """The smallest box that holds a mask; the mask is not empty."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)


def _load(folder: Path) -> tuple[Any, Any, bool]:
    """The model, its processor, and whether it gives masks."""
    if not folder.is_dir():
        raise MissingError(f"checkpoint {folder}: no such folder; give a local one in the format of save_pretrained")
    needed = ("config.json", "preprocessor_config.json")
    if not all((folder / name).is_file() for name in needed) or not any(folder.glob("*.safetensors")):
        raise MissingError(f"checkpoint {folder} must hold {', '.join(needed)} and *.safetensors")

    from transformers import AutoImageProcessor, AutoModelForObjectDetection, AutoModelForUniversalSegmentation

    try:
        masks = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type") == "mask2former"
        loader: Any = AutoModelForUniversalSegmentation if masks else AutoModelForObjectDetection
        model, report = loader.from_pretrained(
            folder,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # refused below, listed by name together with all others
            output_loading_info=True,
        )
        processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, RuntimeError, ValueError, AttributeError, SafetensorError) as error:
        raise ValueError(f"checkpoint {folder} cannot be loaded as an object detector: {error}") from error
    checkpoint_files.refuse_unless_loaded(folder, report)
    return model, processor, masks
