"""Folders of pictures."""

from pathlib import Path

PICTURES = {".png", ".jpg", ".jpeg", ".webp"}


def pictures_in(path: Path) -> list[Path]:
    """The picture files of a folder, sorted by name; sub-folders are not searched."""
    return sorted(p for p in path.iterdir() if p.suffix.lower() in PICTURES)
