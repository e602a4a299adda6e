import json
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dmdr_rewards.pictures.preprocess import Preprocess, chosen, from_folder
from PIL import Image
from torch import Tensor

NORMALISE = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.25]}


def parse(folder: Path, config: Any) -> Preprocess:
    (folder / "preprocessor_config.json").write_text(json.dumps(config))
    return from_folder(folder)


def test_nothing_to_do_changes_no_bit(pictures: Tensor) -> None:
    assert torch.equal(Preprocess(resize=(16, 16), crop=(16, 16))(pictures), pictures)
    assert torch.equal(Preprocess(resize=16)(pictures), pictures)


def test_normalisation() -> None:
    out = Preprocess(mean=(0.1, 0.2, 0.3), std=(0.5, 0.25, 0.125))(torch.full((1, 3, 1, 1), 0.6))
    torch.testing.assert_close(out.flatten(), torch.tensor([1.0, 1.6, 2.4]))


def test_the_crop_keeps_the_centre() -> None:
    picture = torch.arange(90.0).reshape(1, 3, 5, 6)
    assert torch.equal(Preprocess(crop=(3, 2))(picture), picture[..., 1:4, 2:4])
    with pytest.raises(ValueError, match="pictures of 5x6 are smaller than the crop of 6x6"):
        Preprocess(crop=(6, 6))(picture)


@pytest.mark.parametrize(("halves", "first"), [("down", [0, 1, 1, 2]), ("even", [0, 1, 2, 2])])
def test_half_a_pixel_goes_where_it_is_told(halves: Any, first: list[int]) -> None:
    crop = Preprocess(crop=(4, 4), halves=halves)
    assert [crop.plan(4, 4 + odd).box[0] for odd in (1, 2, 3, 4)] == first


@pytest.mark.parametrize(
    ("shape", "bars"), [((8, 16), (4, 4, 0, 0)), ((16, 9), (0, 0, 3, 4)), ((30, 32), (0, 1, 0, 0))]
)
def test_a_letterbox_has_bars_of_zeros(shape: tuple[int, int], bars: tuple[int, int, int, int]) -> None:
    letterbox = Preprocess(resize=16, side="longer", crop=(16, 16))
    top, bottom, left, right = bars
    for filled in (letterbox(torch.ones(1, 3, *shape))[0], letterbox.picture(np.full((*shape, 3), 255, np.uint8))):
        expected = torch.zeros(3, 16, 16)
        expected[:, top : 16 - bottom, left : 16 - right] = 1
        torch.testing.assert_close(filled, expected)
    assert letterbox.image_size == (16, 16)


KINDS = {
    "squash": Preprocess(resize=(16, 20)),
    "shorter": Preprocess(resize=16, crop=(16, 16)),
    "longer": Preprocess(resize=16, side="longer", crop=(16, 16)),
    "bilinear": Preprocess(resize=(16, 20), filter="bilinear"),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(40, 31), (31, 40), (9, 12)])
def test_eight_bits_and_floats_agree_where_nothing_is_clipped(kind: str, shape: tuple[int, int]) -> None:
    rows, columns = np.mgrid[0 : shape[0], 0 : shape[1]]
    picture = np.stack([np.uint8(128 + 80 * np.sin(rows / 5 + phase) * np.cos(columns / 6)) for phase in range(3)], -1)
    floats = torch.from_numpy(picture).permute(2, 0, 1)[None] / 255
    ours = KINDS[kind].picture(picture)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours[None], KINDS[kind](floats), atol=1.6 / 255, rtol=0)
    forms: Any = [picture, Image.fromarray(picture), torch.from_numpy(picture).permute(2, 0, 1)]
    batch = KINDS[kind].pixels(forms, torch.device("cpu"), torch.float64)
    assert batch.dtype == torch.float64
    assert torch.equal(batch, ours.double().expand(3, -1, -1, -1))
    assert torch.equal(KINDS[kind].pixels(picture[None], torch.device("cpu"), torch.float32)[0], ours)


def test_eight_bits_are_resized_by_pil() -> None:
    noise = np.random.default_rng(0).integers(0, 2, (40, 31, 3), dtype=np.uint8) * 255
    ours = KINDS["squash"].picture(noise)
    expected = np.asarray(Image.fromarray(noise).resize((20, 16), Image.Resampling.BICUBIC))
    assert torch.equal(ours, torch.tensor(expected).permute(2, 0, 1).float() / 255)
    floats = torch.tensor(noise).permute(2, 0, 1)[None] / 255
    assert torch.equal(replace(KINDS["squash"], eight_bit=False).picture(noise), KINDS["squash"](floats)[0])
    assert not torch.allclose(ours, KINDS["squash"](floats)[0], atol=0.01)


def test_sizes_may_differ_only_if_one_comes_out() -> None:
    pictures: Any = [np.zeros((8, 9, 3), np.uint8), torch.zeros(3, 12, 5)]
    assert KINDS["longer"].pixels(pictures, torch.device("cpu"), torch.float32).shape == (2, 3, 16, 16)
    with pytest.raises(ValueError, match=r"end up in several sizes, \[\(8, 9\), \(12, 5\)\]"):
        Preprocess().pixels(pictures, torch.device("cpu"), torch.float32)


def test_a_line_of_pixels_stays_one() -> None:
    assert KINDS["longer"].picture(np.full((1, 2000, 3), 255, np.uint8)).sum() > 0


def test_it_travels_to_workers() -> None:
    assert pickle.loads(pickle.dumps(KINDS["longer"])) == KINDS["longer"]
    assert len(set(KINDS.values())) == len(KINDS)


def test_dmdr_squashes() -> None:
    reference = Preprocess(resize=16, side="longer", crop=(16, 16), mean=(0.1, 0.2, 0.3), std=(1.0, 2.0, 3.0))
    assert chosen("reference", reference) is reference
    assert chosen("dmdr", reference) == Preprocess(resize=(16, 16), mean=(0.1, 0.2, 0.3), std=(1.0, 2.0, 3.0))


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("ViTImageProcessor", {"size": {"height": 24, "width": 20}, "resample": 2}),
        ("ViTImageProcessor", {"size": {"height": 40, "width": 48}, "resample": 3}),
        (
            "BitImageProcessor",
            {
                "size": {"shortest_edge": 20},
                "resample": 3,
                "do_center_crop": True,
                "crop_size": {"height": 16, "width": 18},
            },
        ),
        ("ConvNextImageProcessor", {"size": {"shortest_edge": 21}, "crop_pct": 0.875, "resample": 3}),
        ("ConvNextImageProcessor", {"size": {"shortest_edge": 384}, "crop_pct": 1.0, "resample": 2}),
        ("ViTImageProcessor", {"do_resize": False, "do_normalize": False}),
    ],
)
@pytest.mark.parametrize("shape", [(32, 32), (40, 31), (31, 40)])
def test_agrees_with_transformers(kind: str, config: dict[str, Any], shape: tuple[int, int], tmp_path: Path) -> None:
    pytest.importorskip("torchvision", reason="transformers' image processors need it")
    import transformers

    # Smooth and away from black and white: 8-bit rounding and clipping, which are theirs alone, stay below a step.
    rows, columns = np.mgrid[0 : shape[0], 0 : shape[1]]
    waves = [np.sin(rows / 5 + phase) * np.cos(columns / (6 + phase)) for phase in range(3)]
    picture = np.stack([np.uint8(128 + 80 * wave) for wave in waves], axis=-1)

    config = {**NORMALISE, **config}
    theirs = getattr(transformers, kind)(**config)(picture, return_tensors="pt")["pixel_values"]
    pixels = torch.from_numpy(picture).permute(2, 0, 1)[None] / 255
    preprocess = parse(tmp_path, config)
    ours = preprocess(pixels)
    assert ours.shape == theirs.shape
    if preprocess.image_size is not None:
        assert preprocess.image_size == tuple(ours.shape[-2:])
    torch.testing.assert_close(ours, theirs, atol=1.6 / 255 / min(NORMALISE["image_std"]), rtol=0)


def test_old_files_give_the_size_as_a_number(tmp_path: Path) -> None:
    assert parse(tmp_path, {**NORMALISE, "size": 24}).resize == (24, 24)
    assert parse(tmp_path, {**NORMALISE, "size": 24, "crop_pct": 0.75}) == Preprocess(
        resize=32, crop=(24, 24), mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.25)
    )


def test_without_the_file_pictures_stay_as_they_are_and_it_is_said(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"preprocessor_config\.json is missing: pictures enter .* as they are"):
        assert from_folder(tmp_path) == Preprocess()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({**NORMALISE, "do_rescale": False}, "only pixels rescaled by 1/255"),
        ({**NORMALISE, "rescale_factor": 1 / 127.5}, "only pixels rescaled by 1/255"),
        ({**NORMALISE, "resample": 1}, "resample 1 is not supported"),
        ({"size": {"height": 8, "width": 8}}, "image_mean"),
        ({**NORMALISE, "size": {"longest_edge": 8}}, "height"),
        ({**NORMALISE, "do_center_crop": True}, "crop_size"),
    ],
)
def test_what_is_refused(config: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"preprocessor_config\.json: .*{message}"):
        parse(tmp_path, config)


def test_it_says_what_it_does() -> None:
    text = str(Preprocess(resize=256, crop=(224, 224)))
    assert text.startswith("shorter side to 256, bicubic, antialias; centre crop 224x224; mean")
    assert str(KINDS["longer"]).startswith("longer side to 16, bicubic, antialias; zero pad to 16x16; mean")
    assert str(Preprocess(resize=(8, 9), filter="bilinear")).startswith("squash to 8x9, bilinear")
