"""What `dmdr-generate` is asked for: options over what a student says about itself over defaults."""

import argparse
import json
import math
from pathlib import Path
from typing import Any

from dmdr_models.folder.contents import PARTS, network_part

STUDENT_FILE = "dmdr.json"
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
"""Torch's names of what `--dtype` takes."""


class UsageError(ValueError):
    """The user's; the message is one line with the option, its value and the fix."""


class Settings(dict[str, Any]):
    """The settings in force, each with where it comes from."""

    def __init__(self, defaults: dict[str, Any], student: dict[str, Any], source: Path, args: argparse.Namespace):
        given = {name: getattr(args, name) for name in defaults if getattr(args, name) is not None}
        said = {name: student[name] for name in defaults if name in student}
        super().__init__({**defaults, **said, **given})
        self.said, self.source = said.keys() - given.keys(), source

    def origin(self, name: str) -> str:
        """`--steps 0`, or `steps 0 in student/dmdr.json`."""
        if name in self.said:
            return f"{name} {self[name]} in {self.source}"
        return f"--{name.replace('_', '-')} {self[name]}"

    def check_count(self, name: str) -> None:
        check_count(self.origin(name), self[name])

    def check_one_of(self, name: str, valid: tuple[str, ...]) -> None:
        if self[name] not in valid:
            raise UsageError(f"{self.origin(name)} is unknown: give one of {', '.join(valid)}")

    def check_finite(self, name: str, none: str) -> None:
        if not _is_finite(self[name]):
            raise UsageError(f"{self.origin(name)} is not a finite number: give {none}")

    def check_positive(self, name: str, none: str) -> None:
        if not _is_finite(self[name]) or self[name] <= 0:
            raise UsageError(f"{self.origin(name)} is not a positive number: give {none}")


def student_folder(place: Path) -> Path:
    """The folder of a student that was given as this folder, its network's folder, or a file with its network."""
    return place.parent if place.is_file() or place.name in {network_part(name) for name in PARTS} else place


def read_student(folder: Path) -> tuple[Path, dict[str, Any]]:
    """The file that an export leaves in a student's folder, and what it holds; nothing if there is none."""
    path = folder / STUDENT_FILE
    return path, read_json(path, "export the student again") if path.is_file() else {}


def read_json(path: Path, fix: str) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read: {error}; {fix}") from error
    if not isinstance(content, dict):
        raise UsageError(f"{path} is not a JSON object: {fix}")
    return content


def check_count(shown: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UsageError(f"{shown} is not a whole number of at least 1: give 1 or more")


def check_device(device: str) -> None:
    import torch

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device {device} is not available: give cpu ({str(error).splitlines()[0]})") from error


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
