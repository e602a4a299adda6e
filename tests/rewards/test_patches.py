import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dmdr_rewards.base.errors import MissingError
from dmdr_rewards.pictures.patches import Patches, from_folder
from PIL import Image

SHAPES = [(37, 90), (300, 120), (56, 56), (20, 31), (1400, 1300)]
CPU = torch.device("cpu")


def eight_bit(height: int, width: int) -> Image.Image:
    coarse = np.random.default_rng(height).integers(0, 256, (7, 9, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height))


@pytest.mark.parametrize("options", [{}, {"patch": 16, "smallest": 4096, "largest": 65536}])
def test_eight_bit_pictures_are_cut_as_by_transformers(options: dict[str, int]) -> None:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    patches = Patches(**{"largest": 200704, **options})
    processor = Qwen2VLImageProcessorPil(
        patch_size=patches.patch, min_pixels=patches.smallest, max_pixels=patches.largest
    )
    pictures = [eight_bit(*shape) for shape in SHAPES]
    expected = processor(images=pictures, return_tensors="pt")
    packed, grids = patches.packed(pictures, CPU, torch.float32)
    assert grids.tolist() == expected["image_grid_thw"].tolist()
    torch.testing.assert_close(packed, expected["pixel_values"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES[:3])
def test_floats_are_cut_as_by_transformers(shape: tuple[int, int]) -> None:
    from transformers import Qwen2VLImageProcessor

    pictures = torch.rand(2, 3, *shape, generator=torch.Generator().manual_seed(0))
    processor = Qwen2VLImageProcessor(max_pixels=200704, do_rescale=False)
    expected = processor(images=list(pictures), return_tensors="pt")
    packed, grids = Patches(largest=200704).packed(pictures, CPU, torch.float32)
    assert grids.tolist() == expected["image_grid_thw"].tolist()
    torch.testing.assert_close(packed, expected["pixel_values"], rtol=0, atol=1e-5)


def test_a_strip_is_refused() -> None:
    with pytest.raises(ValueError, match="a picture of 1x300 is more than 200 times as long as wide"):
        Patches().packed(torch.zeros(1, 3, 1, 300), CPU, torch.float32)


@pytest.mark.parametrize("area", [{"min_pixels": 3136, "max_pixels": 12845056}, {}])
def test_a_folder_defines_the_patches(tmp_path: Path, area: dict[str, Any]) -> None:
    size = {} if area else {"size": {"shortest_edge": 3136, "longest_edge": 12845056}}
    config = {"image_processor_type": "Qwen2VLImageProcessorFast", "patch_size": 16, "image_mean": [0.5] * 3}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({**config, **area, **size}))
    assert from_folder(tmp_path) == Patches(patch=16, smallest=3136, largest=12845056, mean=(0.5, 0.5, 0.5))


def test_folders_of_other_families_are_refused(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match=r"must be a folder with preprocessor_config\.json"):
        from_folder(tmp_path)
    for config in (
        {"image_processor_type": "ViTImageProcessor"},
        [],
        {"image_processor_type": "Qwen2VLImageProcessor"},
    ):
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match=r"preprocessor_config\.json: "):
            from_folder(tmp_path)
