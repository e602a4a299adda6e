"""The settings of `dmdr-generate`: options come before what a student says about itself, and that before defaults."""

import argparse
import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from dmdr_models.base.errors import UsageError
from dmdr_models.base.json_files import read_json
from dmdr_models.base.picture_size import size_text

STUDENT_FILE = "dmdr.json"
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
"""Torch's names of the values of `--dtype`."""


class Settings(dict[str, Any]):
    """The settings in force, by name; `origin` tells where one comes from.

    Args:
        defaults: the names, and the values that hold unless something else says them.
        student: what a student says about itself.
        source: the file that says it.
        args: the command line.
    """

    def __init__(self, defaults: Mapping[str, Any], student: Mapping[str, Any], source: Path, args: argparse.Namespace):
        given = {name: getattr(args, name) for name in defaults if getattr(args, name) is not None}
        said = {name: student[name] for name in defaults if name in student}
        super().__init__({**defaults, **said, **given})
        self.said, self.source = said.keys() - given.keys(), source

    def origin(self, name: str) -> str:
        """`--steps 0`, or `steps 0 in student/dmdr.json`."""
        value = size_text(self[name]) if _is_pair(self[name]) else self[name]
        if name in self.said:
            return f"{name} {value} in {self.source}"
        return f"--{name.replace('_', '-')} {value}"

    def check_count(self, name: str) -> None:
        check_count(self.origin(name), self[name])

    def check_size(self) -> None:
        """Check the setting `size`: None, a side, or height and width."""
        if self["size"] is not None:
            for side in self["size"] if _is_pair(self["size"]) else [self["size"]]:
                check_count(self.origin("size"), side)

    def check_one_of(self, name: str, valid: tuple[str, ...]) -> None:
        if self[name] not in valid:
            raise UsageError(f"{self.origin(name)} is unknown: give one of {', '.join(valid)}")

    def check_finite(self, name: str, none: str) -> None:
        if not _is_finite(self[name]):
            raise UsageError(f"{self.origin(name)} is not a finite number: give {none}")

    def check_positive(self, name: str, none: str) -> None:
        if not _is_finite(self[name]) or self[name] <= 0:
            raise UsageError(f"{self.origin(name)} is not a positive number: give {none}")


def adapters(given: Sequence[str] | None) -> list[tuple[str, float]]:
    """The places of the LoRAs that `--adapter PLACE[=STRENGTH]` gives, each with its strength; 1 if it gives none.

    Raises:
        UsageError: a strength is not a finite number.
    """
    found = []
    for text in given or []:
        place, equals, strength = text.rpartition("=")
        if not equals or Path(text).exists():
            found.append((text, 1.0))
            continue
        try:
            value = float(strength)
        except ValueError:
            value = math.nan
        if not place or not math.isfinite(value):
            raise UsageError(f"--adapter {text}: {strength!r} is not a finite number: give PLACE=0.8")
        found.append((place, value))
    return found


def student_of(args: argparse.Namespace, network_parts: Collection[str]) -> Path:
    """The folder of the student among the LoRAs, the weights and the model of the command line.

    Raises:
        UsageError: two LoRAs are students, so that it is open whose settings hold.
    """
    places = [student_folder(Path(place), network_parts) for place, _ in adapters(args.adapter)]
    students = [place for place in places if (place / STUDENT_FILE).is_file()]
    if len(set(students)) > 1:
        raise UsageError(
            f"--adapter {students[0]} and --adapter {students[1]} both hold a {STUDENT_FILE}: rename that of the one "
            "whose settings are not to hold"
        )
    return (students or places or [student_folder(Path(args.weights or args.model), network_parts)])[0]


def student_folder(place: Path, network_parts: Collection[str]) -> Path:
    """The folder of a student, given as this folder, the folder of its network, or the file with its network.

    Args:
        network_parts: the names that the folder of a network may have.
    """
    return place.parent if place.is_file() or place.name in network_parts else place


def read_student(folder: Path) -> tuple[Path, dict[str, Any]]:
    """The file that an export leaves in a student's folder, and its content; nothing if there is no such file."""
    path = folder / STUDENT_FILE
    return path, read_object(path, "export the student again") if path.is_file() else {}


def read_object(path: Path, fix: str) -> dict[str, Any]:
    """Read a file that holds a JSON object.

    Raises:
        UsageError: it cannot be read, or holds something else.
    """
    try:
        return read_json(path)
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read: {error}; {fix}") from error


def check_count(shown: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UsageError(f"{shown} is not a whole number of at least 1: give 1 or more")


def check_device(device: str) -> None:
    import torch

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device {device} is not available: give cpu ({str(error).splitlines()[0]})") from error


def _is_pair(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) == 2


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
