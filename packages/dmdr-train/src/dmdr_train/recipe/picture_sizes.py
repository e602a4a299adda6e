"""The sizes of pictures in a recipe: a side, height and width, or several sizes with the share of each."""

from typing import Annotated, Any, NamedTuple

from pydantic import Discriminator, Field, Tag

from dmdr_train.recipe.fields import Positive, Section


class PictureSize(Section):
    """In pixels."""

    height: Positive
    width: Positive


class SharedSize(PictureSize):
    share: Annotated[float, Field(gt=0, le=1e6)] = Field(
        default=1.0, description="of the updates, in proportion to the other sizes' shares"
    )


def _form(resolution: Any) -> str:
    if isinstance(resolution, list):
        return "sizes"
    return "size" if isinstance(resolution, dict | PictureSize) else "side"


AnyResolution = Annotated[
    Annotated[Positive, Tag("side")]
    | Annotated[PictureSize, Tag("size")]
    | Annotated[list[SharedSize], Field(min_length=1), Tag("sizes")],
    Discriminator(_form),
]


class Size(NamedTuple):
    """Height and width in pixels, and the share of the updates that have this size, in (0, 1]."""

    height: int
    width: int
    share: float = 1.0

    @property
    def shape(self) -> tuple[int, int]:
        """(height, width)."""
        return self.height, self.width


def sizes_of(resolution: int | PictureSize | list[SharedSize] | None) -> list[Size]:
    """The sizes that `model.resolution` gives, with shares whose sum is 1; empty for null, the model's own size."""
    if resolution is None:
        return []
    if isinstance(resolution, int):
        return [Size(resolution, resolution)]
    if isinstance(resolution, PictureSize):
        return [Size(resolution.height, resolution.width)]
    whole = sum(each.share for each in resolution)
    return [Size(each.height, each.width, each.share / whole) for each in resolution]
