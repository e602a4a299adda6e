"""Folders that are complete or as they were."""

from pathlib import Path

import pytest
from dmdr_train.base.atomic_files import write_folder


def content(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_a_folder_takes_the_place_of_another(tmp_path: Path) -> None:
    def write(new: Path) -> None:
        (new / "inner").mkdir()
        (new / "inner/b").write_text("new")

    (tmp_path / "made").mkdir()
    (tmp_path / "made/a").write_text("old")
    (tmp_path / ".made.partial").mkdir()
    (tmp_path / ".made.partial/c").write_text("left by a process that was killed")
    write_folder(tmp_path / "made", write)
    assert content(tmp_path) == {"made/inner/b": "new"}


def test_a_folder_that_cannot_be_written_stays_as_it_was(tmp_path: Path) -> None:
    def write(new: Path) -> None:
        (new / "a").write_text("half")
        raise OSError("No space left on device")

    (tmp_path / "made").mkdir()
    (tmp_path / "made/a").write_text("old")
    with pytest.raises(OSError, match="No space left"):
        write_folder(tmp_path / "made", write)
    assert content(tmp_path) == {"made/a": "old"}
    assert [path.name for path in tmp_path.iterdir()] == ["made"]
