"""Captions of the scenes: two things, how one stands to the other, and at most one style word.

"a red circle above a blue square", "a bright red circle above a blue square". The style word says how brightly the
whole scene is painted. The two colours always differ.

Some things are missing from the training captions in some relations: no green triangle stands above or below anything
there, but it does stand left and right. So the held-out captions ask for known words in a new combination.
"""

import re
from dataclasses import dataclass
from itertools import product

COLOURS = ("red", "yellow", "green", "blue", "purple", "white")
SHAPE_NAMES = ("circle", "square", "triangle", "cross")
RELATIONS = ("above", "below", "left of", "right of")
STYLES = ("", "bright", "dull")

VERTICAL, HORIZONTAL = RELATIONS[:2], RELATIONS[2:]
HELD_OUT = {
    ("green", "triangle"): VERTICAL,
    ("purple", "square"): VERTICAL,
    ("blue", "circle"): HORIZONTAL,
    ("yellow", "cross"): HORIZONTAL,
}

_PATTERN = re.compile(
    "a (?:(bright|dull) )?({c}) ({s}) ({r}) a ({c}) ({s})".format(
        c="|".join(COLOURS), s="|".join(SHAPE_NAMES), r="|".join(RELATIONS)
    )
)


@dataclass(frozen=True)
class Scene:
    """What a caption says; `first` and `second` are (colour, shape)."""

    first: tuple[str, str]
    relation: str
    second: tuple[str, str]
    style: str = ""

    @property
    def caption(self) -> str:
        style = f"{self.style} " if self.style else ""
        return f"a {style}{' '.join(self.first)} {self.relation} a {' '.join(self.second)}"

    @property
    def held_out(self) -> bool:
        return any(self.relation in HELD_OUT.get(thing, ()) for thing in (self.first, self.second))


def parse(caption: str) -> Scene:
    """The scene that a caption describes.

    Raises:
        ValueError: it is not one of ours.
    """
    match = _PATTERN.fullmatch(caption)
    if not match or match[2] == match[5]:
        raise ValueError(
            f'caption: {caption!r} is not of the form "a [bright|dull] COLOUR SHAPE RELATION a COLOUR SHAPE" '
            f"with two different colours of {', '.join(COLOURS)}; shapes {', '.join(SHAPE_NAMES)}; "
            f"relations {', '.join(RELATIONS)}"
        )
    return Scene((match[2], match[3]), match[4], (match[5], match[6]), match[1] or "")


def _scenes() -> list[Scene]:
    things = list(product(COLOURS, SHAPE_NAMES))
    return [
        Scene(first, relation, second, style)
        for style, first, relation, second in product(STYLES, things, RELATIONS, things)
        if first[0] != second[0]
    ]


def all_captions() -> list[str]:
    """Every caption, 5,760 of them, in a fixed order."""
    return [scene.caption for scene in _scenes()]


def training_captions() -> list[str]:
    """The captions that a run may train on: all but the held-out ones."""
    return [scene.caption for scene in _scenes() if not scene.held_out]


def held_out_captions() -> list[str]:
    """The captions with a thing in a relation that no training caption shows it in, about a sixth of all."""
    return [scene.caption for scene in _scenes() if scene.held_out]
