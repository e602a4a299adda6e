import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dmdr_rewards.pictures.images import TOLERANCE, as_images
from PIL import Image
from torch import Tensor

CPU = torch.device("cpu")


def images(given: Any, dtype: torch.dtype = torch.float32) -> Tensor:
    return as_images(given, CPU, dtype)


@pytest.fixture
def array() -> np.ndarray:
    """Two 8-bit pictures whose three axes cannot be mistaken for each other."""
    return np.random.default_rng(0).integers(0, 256, (2, 5, 4, 3), dtype=np.uint8)


@pytest.fixture
def expected(array: np.ndarray) -> Tensor:
    return torch.from_numpy(array.transpose(0, 3, 1, 2).astype(np.float32)) / 255


def test_a_float_tensor_keeps_its_gradient() -> None:
    given = torch.rand(2, 3, 4, 5, requires_grad=True)
    taken = images(given, torch.float64)
    assert taken.dtype == torch.float64
    taken.sum().backward()
    torch.testing.assert_close(given.grad, torch.ones_like(given))


def test_eight_bit_forms_agree(array: np.ndarray, expected: Tensor, tmp_path: Path) -> None:
    paths = [tmp_path / f"{index}.png" for index in range(len(array))]
    for path, picture in zip(paths, array, strict=True):
        Image.fromarray(picture).save(path)
    forms: dict[str, Any] = {
        "array": array,
        "list of arrays": list(array),
        "tensor": torch.from_numpy(array).permute(0, 3, 1, 2),
        "PIL": [Image.fromarray(picture) for picture in array],
        "paths": paths,
        "names": [str(path) for path in paths],
    }
    for form in forms.values():
        taken = images(form)
        assert not taken.requires_grad
        torch.testing.assert_close(taken, expected)


def test_a_list_of_float_tensors_keeps_their_gradient() -> None:
    given = [torch.rand(3, 4, 5, requires_grad=True) for _ in range(2)]
    taken = images(given)
    assert torch.equal(taken, torch.stack(given))
    taken.sum().backward()
    assert all(picture.grad is not None for picture in given)


def test_grey_and_transparent_pictures_become_rgb() -> None:
    taken = images([Image.new("L", (4, 4), 51), Image.new("RGBA", (4, 4), (51, 51, 51, 0))])
    torch.testing.assert_close(taken, torch.full((2, 3, 4, 4), 0.2))


GREYS = np.array([[0, 127, 128], [385, 40000, 65535]], np.uint16)
GREYS_IN_8_BITS = [[0, 0, 0], [1, 156, 255]]


@pytest.mark.parametrize("ending", ["png", "tif"])
def test_sixteen_bits_of_grey_are_scaled(ending: str, tmp_path: Path) -> None:
    """Pillow alone clips them at 255: almost every such picture is white."""
    Image.fromarray(GREYS).save(tmp_path / f"p.{ending}")
    big_endian = Image.frombytes("I;16B", (3, 2), GREYS.astype(">u2").tobytes())
    for form in (tmp_path / f"p.{ending}", Image.fromarray(GREYS), big_endian):
        taken = images([form])
        assert (taken[0] * 255).round().tolist() == [GREYS_IN_8_BITS] * 3


@pytest.mark.parametrize(("bits", "white_is_zero"), [(12, False), (16, False), (16, True)])
def test_greys_of_a_tiff_are_scaled_as_it_says(bits: int, white_is_zero: bool, tmp_path: Path) -> None:
    """A camera's 12 bits end at 4095, and 0 is white in some scans; Pillow reads both as 16 bits with black 0."""
    grey = np.array([[0, 409], [2048, 4095]], np.uint16)
    stored = 4095 - grey if white_is_zero else grey
    data = (stored.astype(np.uint32) * 65535 // 4095).astype("<u2").tobytes()
    if bits == 12:
        data = b"".join(bytes([a >> 4, (a & 15) << 4 | b >> 8, b & 255]) for a, b in stored.tolist())
    tags = {256: 2, 257: 2, 258: bits, 259: 1, 262: 1 - white_is_zero, 273: 8, 277: 1, 278: 2, 279: len(data)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    head = b"II*\0" + struct.pack("<I", 8 + len(data)) + data + struct.pack("<H", len(tags))
    (tmp_path / "p.tif").write_bytes(head + entries + bytes(4))

    taken = images([tmp_path / "p.tif"])[0, 0]

    torch.testing.assert_close(taken, torch.from_numpy(grey / 4095).float(), atol=1 / 255, rtol=0)


def test_every_mode_of_pillow_is_scaled_or_refused() -> None:
    """A bright grey stays a bright grey, in whatever mode: no mode is clipped."""
    refused = []
    for mode in Image.MODES:
        if mode.startswith("I;16"):
            picture = Image.frombytes(mode, (4, 4), np.full(16, 51 * 257, ">u2" if "B" in mode else "<u2").tobytes())
        elif mode in ("1", "LAB", "La"):  # Pillow converts no grey to these; L* of this one is 21 of 100
            picture = Image.new(mode, (4, 4), (54, 128, 128) if mode == "LAB" else 0)
        else:
            picture = Image.new("RGB", (4, 4), (51, 51, 51)).convert("RGBA" if mode == "RGBa" else "RGB").convert(mode)
        try:
            taken = images([picture])
        except ValueError:
            refused.append(mode)
        else:
            expected = torch.full((1, 3, 4, 4), 0.0 if mode == "1" else 0.2)
            torch.testing.assert_close(taken, expected, atol=0.01, rtol=0)
    assert refused == ["F", "I", "La"]


@pytest.mark.parametrize("mode", ["I", "F"])
def test_pixels_without_a_known_white_are_refused(mode: str, tmp_path: Path) -> None:
    Image.new(mode, (4, 4), 7).save(tmp_path / "p.tif")
    for form in (tmp_path / "p.tif", Image.new(mode, (4, 4), 7)):
        with pytest.raises(ValueError, match=r"whose white is unknown: save it with 8 or 16 bits per channel$"):
            images([form])


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_turned_upright(orientation: int, tmp_path: Path) -> None:
    """EXIF's number n stores the picture turned; a viewer, and a reward, see it upright."""
    upright = Image.fromarray(np.random.default_rng(0).integers(0, 256, (6, 4, 3), dtype=np.uint8))
    turns = [None, "FLIP_LEFT_RIGHT", "ROTATE_180", "FLIP_TOP_BOTTOM", "TRANSPOSE", "ROTATE_90", "TRANSVERSE"]
    turn = [*turns, "ROTATE_270"][orientation - 1]
    stored = upright if turn is None else upright.transpose(Image.Transpose[turn])
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "p.png", exif=exif)
    for form in (tmp_path / "p.png", Image.open(tmp_path / "p.png")):
        assert torch.equal(images([form]), images([upright]))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_damaged_exif_data_does_not_hide_the_pixels(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4), (51, 51, 51)).save(tmp_path / "p.png", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    torch.testing.assert_close(images([tmp_path / "p.png"]), torch.full((1, 3, 4, 4), 0.2))


def test_rounding_just_outside_the_range_is_let_through() -> None:
    edge = torch.tensor([-TOLERANCE / 2, 1 + TOLERANCE / 2]).repeat(6).reshape(1, 3, 2, 2)
    torch.testing.assert_close(images(edge), edge)


def spoiled(value: float) -> Tensor:
    picture = torch.full((2, 3, 4, 4), 0.5)
    picture[1, 2, 3, 0] = value
    return picture


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (spoiled(1.002), r"values span \[0.5, 1.002\], outside \[0, 1\]: clamp"),
        (spoiled(-0.002), r"values span \[-0.002, 0.5\], outside"),
        (spoiled(float("inf")), r"values span \[0.5, inf\], outside"),
        (spoiled(float("nan")), "images hold NaN"),
        (torch.rand(3, 4, 4), r"shape \(3, 4, 4\), rank 3: give \[B, 3, H, W\]"),
        (torch.rand(1, 4, 4, 4), r"shape \(1, 4, 4, 4\), with 4 channels: give 3 \(RGB\) as \[B, 3, H, W\]"),
        (torch.rand(1, 4, 4, 3), r"with 4 channels"),
        (torch.rand(0, 3, 4, 4), r"empty batch, shape \(0, 3, 4, 4\)"),
        (torch.rand(1, 3, 0, 4), r"empty batch"),
        (torch.zeros(1, 3, 4, 4, dtype=torch.long), r"dtype torch.int64: give floats in \[0, 1\], or uint8"),
        ([], "empty batch: give at least one"),
        (np.zeros((0, 4, 4, 3), np.uint8), "empty batch"),
        (np.zeros((1, 4, 4, 3), np.float32), "dtype float32: give uint8"),
        (np.zeros((1, 3, 4, 4), np.uint8), r"with 4 channels: give 3 \(RGB\) as \[B, H, W, 3\]"),
        (np.zeros((4, 4, 3), np.uint8), r"rank 3: give \[B, H, W, 3\]"),
        ([np.zeros((4, 4), np.uint8)], r"shape \(4, 4\), rank 2: give \[H, W, 3\]"),
        ([np.zeros((4, 4, 3), np.uint8), np.zeros((5, 4, 3), np.uint8)], r"differ in size, \[\(4, 4\), \(5, 4\)\]"),
        ([torch.rand(4, 4, 3)], r"shape \(4, 4, 3\), with 4 channels: give 3 \(RGB\) as \[3, H, W\]"),
        ([torch.full((3, 4, 4), 2.0)], r"values span \[2, 2\], outside"),
        (Image.new("RGB", (4, 4)), "images is one Image: give a list"),
        ("cat.png", "images is one str: give a list"),
        ([3], "a picture is a int: give paths, PIL"),
        (["no-such-file.png"], r"picture no-such-file.png cannot be read: .*No such file"),
    ],
)
def test_what_is_refused(given: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        images(given)


def test_a_file_that_is_no_picture_is_named(tmp_path: Path) -> None:
    path = tmp_path / "notes.png"
    path.write_text("not a picture")
    with pytest.raises(ValueError, match=r"notes\.png cannot be read: cannot identify"):
        images([path])
