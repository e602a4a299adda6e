"""What a picture shows, read from its pixels by code alone: colours, shapes, places and brightness. Nothing is learned.

Every pixel gets a cover, 0 on the ground and 1 on paint, and the nearest of the six colours. The two colours that fill
the most are the two things; each is compared with all four shapes at its own centre and size.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .captions import COLOURS, SHAPE_NAMES, parse
from .drawing import STEPS, coverage, palette, shape_area

MIN_AREA = 16.0  # in pixels; the smallest thing drawn covers 25
MIN_OVERLAP = 0.75  # of a thing with the shape it is taken for: intersection over union
# Soft corners make a square look like a circle, and nothing makes a circle look like a square: it has to win by this.
CIRCLE_HANDICAP = 0.04
MAX_STRAY = 0.12  # of the painted area may have neither of the two colours


def _cover(images: Tensor) -> Tensor:
    """Cover of every pixel, `[B, 32, 32]` in [0, 1]."""
    value = images.amax(dim=1)
    flat = value.flatten(1)
    ground = flat.median(dim=1).values
    paint = flat.quantile(0.95, dim=1)
    span = (paint - ground).clamp(min=0.15)
    cover = (value - ground[:, None, None]) / span[:, None, None]
    # Steeper than the picture, so that paint in the shade still counts as covered.
    return (0.5 + 1.6 * (cover - 0.5)).clamp(0, 1)


def check(images: Tensor, captions: Sequence[str]) -> Tensor:
    """Whether each picture shows what its caption says: colours, shapes and relation. The style word is not looked at.

    Args:
        images: `[B, 3, 32, 32]` in [0, 1].
        captions: one per picture.

    Returns:
        Booleans `[B]`.

    Raises:
        ValueError: the counts differ, or a caption is not one of ours.
    """
    scenes = [parse(caption) for caption in captions]
    if images.shape[1:] != (3, 32, 32) or len(images) != len(scenes):
        raise ValueError(f"images must be [{len(scenes)}, 3, 32, 32], one per caption, got {list(images.shape)}")
    images = images.detach().float().cpu()
    cover = _cover(images)
    tone = images / images.amax(dim=1, keepdim=True).clamp(min=1e-3)
    distance = (tone[:, None] - palette()[None, :, :, None, None]).square().sum(dim=2)
    nearest = torch.nn.functional.one_hot(distance.argmin(dim=1), len(COLOURS)).movedim(-1, 1)
    area = (nearest * (cover > 0.5)[:, None]).sum(dim=(2, 3)).float()

    colours = torch.tensor([[COLOURS.index(scene.first[0]), COLOURS.index(scene.second[0])] for scene in scenes])
    colours = colours.view(-1, 2)
    shapes = torch.tensor([[SHAPE_NAMES.index(scene.first[1]), SHAPE_NAMES.index(scene.second[1])] for scene in scenes])
    shapes = shapes.view(-1, 2)
    steps = torch.tensor([STEPS[scene.relation] for scene in scenes]).view(-1, 2)

    named = area.gather(1, colours)
    right = (area.sum(dim=1) - named.sum(dim=1) <= MAX_STRAY * area.sum(dim=1)) & (named >= MIN_AREA).all(dim=1)

    # Each pixel belongs to the nearer of the two colours named.
    pair = distance.gather(1, colours[:, :, None, None].expand(-1, -1, 32, 32))
    mine = torch.stack([pair[:, 0] <= pair[:, 1], pair[:, 0] > pair[:, 1]], dim=1)
    things = cover[:, None] * mine
    things = things * (things > 0.25)
    mass = things.sum(dim=(2, 3)).clamp(min=1e-3)
    pixel = torch.arange(32) + 0.5
    x = (things.sum(dim=2) * pixel).sum(dim=2) / mass
    y = (things.sum(dim=3) * pixel).sum(dim=2) / mass

    overlaps = []
    for shape in SHAPE_NAMES:
        template = coverage(shape, x, y, (mass / shape_area(shape)).sqrt())
        both, either = torch.minimum(template, things), torch.maximum(template, things)
        overlaps.append(both.sum(dim=(2, 3)) / either.sum(dim=(2, 3)))
    overlap = torch.stack(overlaps, dim=2)
    read = (overlap - CIRCLE_HANDICAP * torch.tensor([name == "circle" for name in SHAPE_NAMES])).argmax(dim=2)
    enough = overlap.gather(2, shapes[:, :, None])[:, :, 0] >= MIN_OVERLAP
    right &= ((read == shapes) & enough).all(dim=1)

    way = torch.stack([x[:, 1] - x[:, 0], y[:, 1] - y[:, 0]], dim=1)
    forward = (way * steps).sum(dim=1)
    sideways = (way * steps.flip(1)).sum(dim=1).abs()
    return right & (forward > sideways)


def brightness(images: Tensor) -> Tensor:
    """How brightly the things are painted: `[B, 3, 32, 32]` in [0, 1] to `[B]` in [0, 1].

    The mean over the painted pixels of the largest of red, green and blue.
    """
    images = images.detach().float().cpu()
    cover = _cover(images)
    painted = (cover > 0.75).float()
    return (images.amax(dim=1) * painted).sum(dim=(1, 2)) / painted.sum(dim=(1, 2)).clamp(min=1)
