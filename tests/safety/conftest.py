"""Trap files, which run code when unpickled or imported, and tiny real models in which they are hidden."""

import os
import pickle
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from dmdr_models import tiny


class Trojan:
    """A pickle that makes a folder when it is read."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.makedirs, (str(self.mark),)


@dataclass
class Trap:
    """Writes files whose code makes the folder `mark` when it runs."""

    mark: Path
    zipped: bool

    def __call__(self, path: Path) -> Path:
        """Write a pickle to `path`, in torch's format or a bare one; replace an existing file."""
        path.parent.mkdir(parents=True, exist_ok=True)
        content = {"weight": torch.zeros(2), "state_dict": Trojan(self.mark)}
        if self.zipped:
            torch.save(content, path)
        else:
            path.write_bytes(pickle.dumps(content))
        return path

    def module(self, path: Path) -> Path:
        """Write Python code to `path`, with the classes that a config may name."""
        path.write_text(f"import os\nos.makedirs({str(self.mark)!r})\nclass Evil: pass\n")
        return path


@pytest.fixture(params=[True, False], ids=["zip", "bare"])
def trap(request: pytest.FixtureRequest, tmp_path: Path) -> Trap:
    return Trap(tmp_path / "the-code-was-run", request.param)


@pytest.fixture
def code(tmp_path: Path) -> Trap:
    return Trap(tmp_path / "the-code-was-run", zipped=True)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return the folder of a tiny sit, sd3, sdxl or classifier; tests must not change it."""
    folder = tmp_path_factory.mktemp("models")

    def made(name: str) -> Path:
        if not (folder / name).exists():
            MAKERS[name](folder / name)
        return folder / name

    return made


@pytest.fixture
def copied(models: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    """Return a copy of a tiny model, which tests may change."""
    return lambda name: Path(shutil.copytree(models(name), tmp_path / "copies" / name))


MAKERS: dict[str, Callable[[Path], Any]] = {
    "sit": tiny.sit,
    "sd3": tiny.sd3,
    "sdxl": tiny.sdxl,
    "classifier": tiny.classifier,
}
