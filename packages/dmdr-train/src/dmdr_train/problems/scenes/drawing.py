"""Pictures for the captions of [captions.py](captions.py): two bright shapes on a dark ground.

A picture is 32 x 32 RGB in [0, 1]. Places, sizes, ground, light and the exact tone of the paint are random.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..shapes.drawing import SHAPES, SIZE, _hsv
from .captions import COLOURS, SHAPE_NAMES, parse

# Hue of each colour; white is the one without saturation.
HUES = {"red": 0.0, "yellow": 0.16, "green": 0.34, "blue": 0.62, "purple": 0.8, "white": 0.0}
# The paint's value by style word; without one it is anything between.
VALUES = {"bright": (0.85, 1.0), "dull": (0.45, 0.6), "": (0.45, 1.0)}
# Where the second thing stands, seen from the first: step in x and in y, rows counted downwards.
STEPS = {"above": (0, 1), "below": (0, -1), "left of": (1, 0), "right of": (-1, 0)}


def coverage(shape: str, centre_x: Tensor, centre_y: Tensor, radius: Tensor) -> Tensor:
    """How far a shape covers each pixel: centre and radius `[...]` in pixels to `[..., 32, 32]` in [0, 1]."""
    pixel = torch.arange(SIZE) + 0.5
    centre_x, centre_y, radius = (value[..., None, None] for value in (centre_x, centre_y, radius))
    x, y = (pixel[None, :] - centre_x) / radius, (pixel[:, None] - centre_y) / radius
    return (0.5 - SHAPES[shape](x, y) * radius).clamp(0, 1)


def draw(captions: Sequence[str], generator: torch.Generator | None = None) -> Tensor:
    """Draw one picture per caption: `[B, 3, 32, 32]` in [0, 1], float32.

    Raises:
        ValueError: a caption is not one of ours.
    """
    scenes = [parse(caption) for caption in captions]
    batch = len(scenes)

    def uniform(low: float | Tensor, high: float | Tensor, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(batch, *shape, generator=generator)

    step = torch.tensor([STEPS[scene.relation] for scene in scenes]).view(batch, 2).float()
    radius = uniform(4.8, 6.2, 2)
    # Along the step the two are apart; across it each stands where it likes, while the relation stays plain.
    reach = radius.sum(dim=1)
    room = SIZE - 2 - 2 * reach
    apart = reach + 0.5 + (room - 0.5) * uniform(0, 1)
    start = radius + 1 + ((SIZE - 2 - reach - apart)[:, None] * uniform(0, 1, 1))
    forward = torch.stack([start[:, 0], start[:, 0] + apart], dim=1)
    backward = torch.stack([start[:, 1] + apart, start[:, 1]], dim=1)
    along = torch.where(step.sum(dim=1, keepdim=True) > 0, forward, backward)
    first = radius[:, 0] + 1 + (SIZE - 2 - 2 * radius[:, 0]) * uniform(0, 1)
    limit = 0.7 * apart
    low = torch.maximum(first - limit, radius[:, 1] + 1)
    high = torch.minimum(first + limit, SIZE - 1 - radius[:, 1])
    across = torch.stack([first, uniform(low, high)], dim=1)
    horizontal = step[:, :1] != 0
    centre_x, centre_y = torch.where(horizontal, along, across), torch.where(horizontal, across, along)

    # The ground runs from one dark tone to another, and light falls on the things from one side.
    pixel = (torch.arange(SIZE) + 0.5) / (SIZE / 2) - 1
    slopes = []
    for angle in (uniform(-math.pi, math.pi), uniform(-math.pi, math.pi)):
        cos, sin = angle.cos()[:, None, None], angle.sin()[:, None, None]
        slopes.append(((cos * pixel[None, None, :] + sin * pixel[None, :, None]) / 2 + 0.5).clamp(0, 1)[:, None])
    ends = [_hsv(uniform(0, 1), uniform(0.3, 0.8), uniform(0.03, 0.2)) for _ in range(2)]
    picture = ends[0] + (ends[1] - ends[0]) * slopes[0]
    light = 1 - uniform(0, 0.25)[:, None, None, None] * slopes[1]

    darkest, brightest = torch.tensor([VALUES[scene.style] for scene in scenes]).view(batch, 2).T
    value = uniform(darkest, brightest)
    for i in range(2):
        things = [(scene.first, scene.second)[i] for scene in scenes]
        hue = torch.tensor([HUES[colour] for colour, _ in things]) + uniform(-0.02, 0.02)
        white = torch.tensor([colour == "white" for colour, _ in things], dtype=torch.bool)
        paint = _hsv(hue % 1, torch.where(white, uniform(0, 0.1), uniform(0.8, 1)), value)
        cover = torch.empty(batch, 1, SIZE, SIZE)
        for shape in SHAPE_NAMES:
            chosen = torch.tensor([name == shape for _, name in things], dtype=torch.bool)
            cover[chosen, 0] = coverage(shape, centre_x[chosen, i], centre_y[chosen, i], radius[chosen, i])
        picture = picture * (1 - cover) + paint * light * cover
    return picture


def palette() -> Tensor:
    """The colours at full value, `[6, 3]`."""
    hues = torch.tensor([HUES[colour] for colour in COLOURS])
    saturation = torch.tensor([0.05 if colour == "white" else 0.9 for colour in COLOURS])
    return _hsv(hues, saturation, torch.ones(len(COLOURS)))[:, :, 0, 0]


def shape_area(shape: str) -> float:
    """Pixels that a shape of radius 1 covers, from a drawing of radius 8."""
    centre = torch.tensor(SIZE / 2)
    return float(coverage(shape, centre, centre, torch.tensor(8.0)).sum()) / 64
