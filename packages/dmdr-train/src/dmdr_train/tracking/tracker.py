"""What a tracker or a callback is: an object that receives what a run logs, draws and saves."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image


class Tracker:
    """Receives what a run logs, draws and saves, on the first process. Override the methods that you need.

    If a method raises an exception, the run says so and goes on without the tracker.
    """

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Receive the values of a step, by names such as "loss/refl"."""

    def picture(self, step: int, name: str, image: "Image.Image") -> None:
        """Receive a picture, such as a sheet of samples with their prompts, called "student-00000100"."""

    def checkpoint(self, step: int, folder: Path) -> None:
        """Receive the folder of a complete checkpoint. The run may remove it later, as `run.keep_last` says."""

    def warn(self, step: int, text: str) -> None:
        """Receive an alarm of early warning."""

    def close(self) -> None:
        """The run ends: write what is not written yet."""


def series(step: int, name: str) -> str:
    """The name under which a picture is shown beside those of other steps: "samples/student" for "student-00000100"."""
    return f"samples/{name.removesuffix(f'-{step:08d}')}"
