"""A short run of tools/soak.py, and tests that it finds differences; long runs are for maintainers."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save


@pytest.fixture(scope="module")
def tool() -> Any:
    """Import the module in a way that its fork server can import it, too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parents[2] / "tools"))
        import soak

        yield soak


def test_a_few_faults_of_each_kind_change_nothing(tool: Any, capsys: pytest.CaptureFixture[str]) -> None:
    faults = ["--kills", "2", "--signals", "1", "--damages", "1", "--second-runs", "1", "--full-disks", "1"]
    assert tool.main([*faults, "run.steps=8", "objectives.1.start=4"]) == 0
    out = capsys.readouterr().out
    rows = table(out)
    assert len(rows) == (10 if "no disk was filled" in out else 12)
    assert all(row.endswith(" | yes |") for row in rows)


def test_one_of_two_processes_dies_or_stands_still(tool: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """The other process names the lost one and ends, and the run resumes."""
    none = ["--signals", "0", "--damages", "0", "--second-runs", "0", "--full-disks", "0"]
    short = ["run.steps=8", "objectives.1.start=4", "run.timeout=6", "optim.zero_stage=2"]
    assert tool.main(["--processes", "2", "--kills", "2", "--hangs", "1", *none, *short]) == 0
    assert [row.split(" | ")[0] for row in table(capsys.readouterr().out)] == [
        "| kill -9",
        "| kill -9, aimed at a write",
        "| one process stands still",
    ]


def table(out: str) -> list[str]:
    return [line for line in out.partition("\n\n")[0].splitlines() if line.startswith("| ")][1:]


def test_what_differs_is_seen(tool: Any, tmp_path: Path) -> None:
    """Every difference counts except times, the order of scores, waiting rows, and checkpoints before the last."""

    def tensors(weight: float, **texts: str) -> str:
        return save({"weight": torch.tensor(weight)}, texts).decode("latin-1")

    def write(run: str, **changes: Any) -> dict[str, str]:
        files = {
            "metrics.jsonl": '{"step": 1, "loss": 0.5, "train_seconds": 7}\n',
            "evaluation.json": '{"real": 1, "joint": 2}',
            "samples/a.png": "picture",
            "checkpoints/step-00000001/generator.safetensors": tensors(1),
            "checkpoints/step-00000002/generator.safetensors": tensors(2),
            **changes,
        }
        shutil.rmtree(tmp_path / run, ignore_errors=True)
        for name, text in files.items():
            (tmp_path / run / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / run / name).write_text(text, encoding="latin-1")
        return tool.contents(tmp_path / run)

    expected = write("one")

    def differing(name: str, text: str) -> list[str]:
        return tool.differences(expected, write("two", **{name: text}))

    assert differing("metrics.jsonl", '{"step": 1, "loss": 0.5, "train_seconds": 8}\n') == []
    assert differing("evaluation.json", '{"joint": 2, "real": 1}') == []
    assert differing("checkpoints/step-00000001/generator.safetensors", tensors(3)) == []
    assert differing("run.lock", "process 1") == []
    assert differing("checkpoints/step-00000002/metrics.jsonl", '{"step": 2}\n') == []
    for name, text in {
        "metrics.jsonl": '{"step": 1, "loss": 0.50001, "train_seconds": 7}\n',
        "evaluation.json": '{"real": 1, "joint": 3}',
        "samples/a.png": "pictura",
        "samples/b.png": "one more",
        "checkpoints/step-00000002/generator.safetensors": tensors(3),
        "checkpoints/step-00000002/fake_score.safetensors": tensors(2),
    }.items():
        assert differing(name, text) == [name]


class Attempt:
    """A stand-in for an attempt that has ended."""

    def __init__(self, run: Path, text: str):
        self.run, self.log = run, run / "log"
        self.log.write_text(text)


def test_a_wrong_start_is_a_complaint(tool: Any, tmp_path: Path) -> None:
    newest, damaged = tmp_path / "out/checkpoints/step-00000002", Path("out/checkpoints/step-00000004/recipe.yaml")
    named = f"warning: run.resume: {damaged} is damaged; falling back to the checkpoint before\n"
    resumed = "resuming from out/checkpoints/step-00000002\n"

    def found(text: str, newest: list[Path], damaged: Path | None = None) -> int:
        return len(tool.complaints(Attempt(tmp_path, text), newest, damaged))

    assert found("", []) == found(resumed, [newest]) == found(named + resumed, [newest], damaged) == 0
    assert found("", [newest]) == found(resumed, []) == found(resumed, [newest], damaged) == 1
    assert found(resumed, [newest.with_name("step-00000003")]) == 1


def test_a_complaint_is_in_the_table_and_in_the_exit_code(tool: Any, tmp_path: Path, monkeypatch: Any) -> None:
    soak, places = tool.Soak(tmp_path, None, None), ["between checkpoints", "between checkpoints", tool.WRITING]
    soak.restarts = 3
    soak.events = [
        tool.Event("kill -9", "kill -9", f"run-{n}", place, [-9], n > 1) for n, place in enumerate(places, 1)
    ]
    monkeypatch.setattr(tool, "soaked", lambda options, folder: soak)
    for said, equal, code in (([], "yes", 0), (["generator.safetensors differs"], "no", 1)):
        soak.complaints = {"run-1": [], "run-2": said, "run-3": []}
        fell = f"between checkpoints: 2, {tool.WRITING}: 1"
        cells = f"3 | {fell} | a checkpoint: 2, the start: 1 | -9: 3 | {equal}"
        assert soak.table().splitlines()[2:] == [f"| kill -9 | {cells} |"]
        assert soak.counts().splitlines()[2] == f"| 3 | 1 | 0 | 0 | 0 | 0 | 0 | 3 | {code} |"
        assert tool.main([]) == code
