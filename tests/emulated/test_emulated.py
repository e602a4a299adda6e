"""Run the other files of this folder in separate processes, since an installed device stays in its process."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
TOOLS = HERE.parents[1] / "tools"


@pytest.mark.parametrize("cases", [["strictness"], ["mix_ups", "steps", "objectives"]], ids=" ".join)
def test_on_the_device(python: Callable[..., Any], tmp_path: Path, cases: list[str]) -> None:
    pytest_alone = ("-m", "pytest", "-p", "no:xdist", "-p", "no:cacheprovider", "--noconftest", "-o", "addopts=-q")
    path = os.pathsep.join([str(TOOLS), os.environ.get("PYTHONPATH", "")])
    outcome = python(*pytest_alone, *(str(HERE / f"{each}.py") for each in cases), folder=tmp_path, PYTHONPATH=path)
    assert outcome.code == 0, outcome.stdout[-6000:]
    assert " passed" in outcome.stdout
    assert " skipped" not in outcome.stdout
