"""How a family draws for `dmdr-generate`. Imports no torch."""

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from dmdr_models.drawing.settings import Settings

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor


class Drawing(Protocol):
    """What `Layout.drawing` returns. Making one must not import torch.

    Attributes:
        options: the options of `dmdr-generate` that only some families take and this one does, such as "classes".
        defaults: the settings that a student's dmdr.json may hold, by the name of the option, each with its default;
            None is the model's own value.
    """

    options: tuple[str, ...]
    defaults: Mapping[str, Any]

    def said_by_scheduler(self, student: Path) -> tuple[Path, dict[str, Any]]:
        """What `scheduler/` in a student's folder says about how to draw from it, and the file that says it."""

    def run(self, args: argparse.Namespace, settings: Settings) -> "dict[Path, Image]":
        """Draw what the command line asks for: the pictures, by the files that they are to be written to.

        Raises:
            UsageError: an option, a setting or a file is wrong. What can be known without torch comes first.
        """

    def open(self, args: argparse.Namespace, settings: Settings, prompts: Sequence[Any]) -> "Callable[..., Tensor]":
        """Load the model, and return a function that draws with it: `draw(prompts, seed=0, **settings)`.

        The function returns one picture per prompt, `[B, 3, H, W]` in [0, 1] on the CPU. Its arguments replace the
        settings of this call. It raises a ValueError for a prompt or a setting that the model cannot take.

        Args:
            prompts: the first prompts, which are checked before the network is loaded; may be empty.

        Raises:
            UsageError: as `run` does.
        """
