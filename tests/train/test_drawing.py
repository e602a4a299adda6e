import pytest
import torch
from dmdr_train.problems.shapes.drawing import CLASSES, SIZE, draw

LABELS = torch.arange(10).repeat(20)


def drawn(seed: int = 0) -> torch.Tensor:
    return draw(LABELS, torch.Generator().manual_seed(seed))


def test_pictures() -> None:
    pictures = drawn()
    assert pictures.shape == (200, 3, SIZE, SIZE)
    assert pictures.dtype == torch.float32
    assert pictures.min() >= 0
    assert pictures.max() <= 1
    assert torch.isfinite(pictures).all()


def test_the_same_generator_draws_the_same_pictures() -> None:
    before = torch.get_rng_state()
    assert torch.equal(drawn(), drawn())
    assert not torch.equal(drawn(), drawn(1))
    assert torch.equal(torch.get_rng_state(), before)


def test_every_class_shows_a_shape_of_its_own() -> None:
    """One shape per picture, brighter than its ground, inside the frame; and no two classes share their mean shape."""
    pictures = drawn()
    light = pictures.amax(dim=1)
    ground = light[:, 0, 0]
    shape = light > 1.5 * ground[:, None, None]
    assert len(CLASSES) == 10
    for label in range(10):
        share = shape[label == LABELS].float().mean(dim=(1, 2))
        assert share.min() > 0.05
        assert share.max() < 0.6
    border = torch.cat([shape[:, 0], shape[:, -1], shape[:, :, 0], shape[:, :, -1]], dim=1)
    assert not border.any()


def test_classes_differ_when_all_else_is_the_same() -> None:
    """The same random numbers for every class: only the shape differs."""
    one_each = torch.cat([draw(torch.tensor([label]), torch.Generator().manual_seed(4)) for label in range(10)])
    for a in range(10):
        for b in range(a):
            assert ((one_each[a] - one_each[b]).abs().amax(dim=0) > 0.1).sum() >= 15


@pytest.mark.parametrize("labels", [[10], [-1, 3]])
def test_a_label_that_is_no_shape(labels: list[int]) -> None:
    with pytest.raises(ValueError, match=r"labels must lie in \[0, 9\]"):
        draw(torch.tensor(labels))


def test_no_pictures() -> None:
    assert draw(torch.empty(0, dtype=torch.long)).shape == (0, 3, SIZE, SIZE)
