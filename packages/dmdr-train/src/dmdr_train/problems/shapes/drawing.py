"""Pictures of ten shapes, drawn by code: the data of the built-in problem.

A picture is 32 x 32 RGB in [0, 1]: one bright shape on a dark ground, with random place, size, colour, shading and
rotation of up to 22 degrees either way. Some classes are close on purpose (square and diamond, pentagon and hexagon,
hexagon and circle), so that a generator makes mistakes which a reward can mend.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

SIZE = 32
MAX_ROTATION = math.radians(22)

# A shape is the signed distance to its outline, negative inside; it fills about the unit circle.


def _circle(x: Tensor, y: Tensor) -> Tensor:
    return torch.hypot(x, y) - 0.85


def _ring(x: Tensor, y: Tensor) -> Tensor:
    return (torch.hypot(x, y) - 0.72).abs() - 0.2


def _box(x: Tensor, y: Tensor, half_width: float, half_height: float) -> Tensor:
    return torch.maximum(x.abs() - half_width, y.abs() - half_height)


def _square(x: Tensor, y: Tensor) -> Tensor:
    return _box(x, y, 0.74, 0.74)


def _diamond(x: Tensor, y: Tensor) -> Tensor:
    return _box((x + y) / math.sqrt(2), (x - y) / math.sqrt(2), 0.74, 0.74)


def _star_polygon(x: Tensor, y: Tensor, points: int, inner: float) -> Tensor:
    """Polygon whose corners alternate between radius 1 and `inner`, with a corner pointing up."""
    sector = math.pi / points
    angle = torch.atan2(x, -y)
    angle = (angle - 2 * sector * torch.round(angle / (2 * sector))).abs()
    radius = torch.hypot(x, y)
    u, v = radius * torch.cos(angle), radius * torch.sin(angle)
    edge_u, edge_v = inner * math.cos(sector) - 1.0, inner * math.sin(sector)
    return ((u - 1.0) * edge_v - v * edge_u) / math.hypot(edge_u, edge_v)


def _polygon(corners: int) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda x, y: _star_polygon(x, y, corners, inner=math.cos(math.pi / corners))


def _star(x: Tensor, y: Tensor) -> Tensor:
    return _star_polygon(x, y, 5, inner=0.45)


def _cross(x: Tensor, y: Tensor) -> Tensor:
    return torch.minimum(_box(x, y, 0.28, 0.9), _box(x, y, 0.9, 0.28))


def _crescent(x: Tensor, y: Tensor) -> Tensor:
    return torch.maximum(torch.hypot(x, y) - 0.9, 0.72 - torch.hypot(x - 0.45, y))


SHAPES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "circle": _circle,
    "ring": _ring,
    "square": _square,
    "diamond": _diamond,
    "triangle": _polygon(3),
    "pentagon": _polygon(5),
    "hexagon": _polygon(6),
    "star": _star,
    "cross": _cross,
    "crescent": _crescent,
}
CLASSES = tuple(SHAPES)


def _hsv(hue: Tensor, saturation: Tensor, value: Tensor) -> Tensor:
    """Hue, saturation, value `[B]` in [0, 1] to RGB `[B, 3, 1, 1]`."""
    k = (hue[:, None] * 6 + torch.tensor([5.0, 3.0, 1.0])) % 6
    rgb = value[:, None] * (1 - saturation[:, None] * torch.minimum(k, 4 - k).clamp(0, 1))
    return rgb[:, :, None, None]


def draw(labels: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Draw one picture per label: `[B]` integers below 10 to `[B, 3, 32, 32]` in [0, 1], float32.

    Raises:
        ValueError: a label is outside [0, 9].
    """
    if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < len(CLASSES):
        raise ValueError(f"labels must lie in [0, {len(CLASSES) - 1}], got {labels.tolist()}")
    batch = len(labels)

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(batch, generator=generator)

    radius = uniform(9.5, 13.0)
    margin = SIZE / 2 - radius - 1
    centre_x = SIZE / 2 + margin * uniform(-1, 1)
    centre_y = SIZE / 2 + margin * uniform(-1, 1)
    turn = uniform(-MAX_ROTATION, MAX_ROTATION)
    ground = _hsv(uniform(0, 1), uniform(0.2, 0.7), uniform(0.06, 0.22))
    paint = _hsv(uniform(0, 1), uniform(0.45, 0.95), uniform(0.75, 1.0))
    light, shade = uniform(-math.pi, math.pi), uniform(0.05, 0.25)

    pixel = torch.arange(SIZE) + 0.5
    y, x = torch.meshgrid(pixel, pixel, indexing="ij")
    x = (x - centre_x[:, None, None]) / radius[:, None, None]
    y = (y - centre_y[:, None, None]) / radius[:, None, None]
    cos, sin = turn.cos()[:, None, None], turn.sin()[:, None, None]
    u, v = cos * x + sin * y, cos * y - sin * x

    distance = torch.empty(batch, SIZE, SIZE)
    for label, name in enumerate(CLASSES):
        chosen = labels == label
        distance[chosen] = SHAPES[name](u[chosen], v[chosen])
    cover = (0.5 - distance * radius[:, None, None]).clamp(0, 1)[:, None]
    slope = (light.cos()[:, None, None] * x + light.sin()[:, None, None] * y).clamp(-1, 1)
    shading = (1 - shade[:, None, None] * (1 - slope))[:, None].clamp(0, 1)
    return ground * (1 - cover) + paint * shading * cover
