"""A tracker that writes a line for every thing that a run tells it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dmdr_train.extending import Section, Tracker


class Diary(Tracker):
    class Options(Section):
        file: str = "diary.txt"

    def __init__(self, folder: Path, recipe: Any, start: int, file: str):
        self.path = folder / file

    def write(self, text: str) -> None:
        with self.path.open("a", encoding="utf-8") as diary:
            print(text, file=diary)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.write(f"step {step}: {len(values)} values")

    def picture(self, step: int, name: str, image: Any) -> None:
        self.write(f"step {step}: the picture {name} of {image.width} x {image.height} pixels")

    def checkpoint(self, step: int, folder: Path) -> None:
        self.write(f"step {step}: the checkpoint {folder.name}")

    def warn(self, step: int, text: str) -> None:
        self.write(text)
