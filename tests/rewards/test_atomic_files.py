import os
import subprocess
import sys
from pathlib import Path

import pytest
from dmdr_rewards.base.atomic_files import settle_names, write_whole


def test_a_file_is_replaced_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "scores.csv"
    path.write_text("old")
    write_whole(path, lambda partial: partial.write_text("new"))
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == {"scores.csv": "new"}


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "scores.csv"
    path.write_text("old")

    def write(partial: Path) -> None:
        partial.write_text("ne")
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        write_whole(path, write)
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == {"scores.csv": "old"}


def test_the_content_is_on_disk_before_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: calls.append("fsync") or fsync(file))
    monkeypatch.setattr(os, "replace", lambda *paths: calls.append("replace") or replace(*paths))
    write_whole(tmp_path / "scores.csv", lambda partial: partial.write_text("new"))
    assert calls == ["fsync", "replace"]
    settle_names(tmp_path)
    assert calls == ["fsync", "replace", "fsync"]
    settle_names(tmp_path / "no such folder")


def test_the_module_imports_no_torch() -> None:
    program = "import sys, dmdr_rewards.base.atomic_files; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
