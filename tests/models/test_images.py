import numpy as np
import pytest
import torch
from dmdr_models.drawing.images import grid, save_png
from PIL import Image


def test_pictures_lie_row_by_row_on_white():
    images = torch.zeros(5, 3, 2, 4)
    images[1, 0] = 1.0
    images[4, 2] = 0.5
    sheet = np.asarray(grid(images, columns=2, padding=1))
    assert sheet.shape == (3 * 2 + 4, 2 * 4 + 3, 3)
    assert (sheet[1:3, 1:5] == 0).all()
    assert (sheet[1:3, 6:10] == [255, 0, 0]).all()
    assert (sheet[7:9, 1:5] == [0, 0, 128]).all()
    assert (sheet[7:9, 6:10] == 255).all(), "the empty place"
    for line in (0, 3, 6, 9):
        assert (sheet[line] == 255).all()
    for line in (0, 5, 10):
        assert (sheet[:, line] == 255).all()


def test_scale_makes_squares():
    images = torch.rand(1, 3, 2, 3)
    small = np.asarray(grid(images, columns=1, padding=0))
    large = np.asarray(grid(images, columns=1, padding=0, scale=3))
    assert (large == small.repeat(3, axis=0).repeat(3, axis=1)).all()
    padded = grid(images, columns=1, padding=2, scale=3)
    assert padded.size == (3 * 3 + 4, 2 * 3 + 4)


def test_values_are_rounded_once():
    values = torch.arange(256) / 255
    images = values.reshape(1, 1, 16, 16).expand(1, 3, 16, 16)
    assert np.asarray(grid(images, 1, padding=0))[..., 0].flatten().tolist() == list(range(256))
    low = torch.full((1, 3, 1, 1), 0.25, dtype=torch.bfloat16, requires_grad=True)
    assert np.asarray(grid(low, 1, padding=0)).max() == 64


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(3, 8, 8), "give \\[B, 3, H, W\\]"),
        (torch.zeros(1, 1, 8, 8), "give \\[B, 3, H, W\\]"),
        (torch.zeros(0, 3, 8, 8), "at least one"),
        (torch.full((1, 3, 2, 2), -0.1), "give values in"),
        (torch.full((1, 3, 2, 2), 1.1), "give values in"),
        (torch.full((1, 3, 2, 2), torch.nan), "give values in"),
    ],
)
def test_what_is_no_picture(images, message):
    with pytest.raises(ValueError, match=message):
        grid(images, 1)


def test_wrong_layouts():
    for wrong in ({"columns": 0}, {"columns": 1, "padding": -1}, {"columns": 1, "scale": 0}):
        with pytest.raises(ValueError, match="give at least 1, 0 and 1"):
            grid(torch.zeros(1, 3, 2, 2), **wrong)


def test_a_file_is_complete_or_untouched(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    picture = grid(torch.rand(1, 3, 8, 8), 1)
    save_png(picture, path)
    assert (np.asarray(Image.open(path)) == np.asarray(picture)).all()
    before = path.read_bytes()
    targets = []
    save = Image.Image.save

    def watched(self, target, format):
        targets.append(target)
        save(self, target, format=format)
        if len(targets) == 1:
            raise OSError("disk full")

    monkeypatch.setattr(Image.Image, "save", watched)
    other = grid(torch.rand(1, 3, 8, 8), 1)
    with pytest.raises(OSError, match="disk full"):
        save_png(other, path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["a.png"]
    save_png(other, path)
    assert path.read_bytes() != before
    assert path not in targets, "a reader never sees a half-written file"
