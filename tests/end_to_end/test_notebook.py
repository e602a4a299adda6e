"""The notebook of the manual runs from top to bottom, in one process, shortened."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dmdr_train.tracking.metrics_file import read_metrics

NOTEBOOK = Path(__file__).parents[2] / "docs/first_steps.ipynb"


def test_first_steps(python: Callable[..., Any], tmp_path: Path) -> None:
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    program = "\n\n".join(code)
    for long, short in (("STEPS = 60", "STEPS = 6"), ("pictures=200", "pictures=100"), ("[4, 1]", "[1]")):
        assert program.count(long) == 1
        program = program.replace(long, short)
    (tmp_path / "first_steps.py").write_text(program, encoding="utf-8")
    done = python("first_steps.py", folder=tmp_path, MPLBACKEND="agg").check()
    assert "optim.batchsize: unknown key; did you mean optim.batch_size?" in done.stdout
    assert "Fréchet distance " in done.stdout
    assert [row["step"] for row in read_metrics(tmp_path / "runs/demo")] == [6, 8]
    assert (tmp_path / "student.safetensors").is_file()
    assert (tmp_path / "runs/demo/student/dmdr.json").is_file()


def test_the_notebook_is_kept_without_results() -> None:
    for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]:
        assert cell.get("outputs", []) == []
        assert cell.get("execution_count") is None
