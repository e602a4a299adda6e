"""The same run, whether interrupted or not, and however its batch is split."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

Rows = Callable[[Path], list[dict[str, float]]]
WEIGHTS = ("generator", "student", "fake_score")


def interrupted(source: Path, target: Path, step: int) -> None:
    """The folder of a run that was killed some time after `step`."""
    shutil.copytree(source, target)
    for checkpoint in (target / "checkpoints").iterdir():
        if checkpoint.name != f"step-{step:08d}":
            shutil.rmtree(checkpoint)
    for name in ("student", "summary.md", "curves.png", "before_after.png", "evaluation.json"):
        path = target / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    (target / "checkpoints/.step-00000009.partial").mkdir()


def assert_same_run(first: Path, second: Path, read_rows: Rows) -> None:
    """To the last bit: losses, weights, and all that DeepSpeed keeps."""
    assert read_rows(first) == read_rows(second)
    last = "checkpoints/step-00000005"
    for name in WEIGHTS:
        a, b = (load_file(run / last / f"{name}.safetensors") for run in (first, second))
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a), name
    for path in sorted((first / last).rglob("*.pt")):
        a, b = (
            _tensors(torch.load(run / last / path.relative_to(first / last), weights_only=False))
            for run in (first, second)
        )
        assert len(a) == len(b) > 0
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True)), path
    names = [sorted(p.name for p in (run / "samples").iterdir()) for run in (first, second)]
    assert names[0] == names[1]
    assert all((first / "samples" / n).read_bytes() == (second / "samples" / n).read_bytes() for n in names[0])


def _tensors(node: Any) -> list[torch.Tensor]:
    if isinstance(node, torch.Tensor):
        return [node]
    children = node.values() if isinstance(node, dict) else node if isinstance(node, list | tuple) else []
    return [tensor for child in children for tensor in _tensors(child)]


def test_resumed_equals_uninterrupted(finished: Any, workshop: Any, read_rows: Rows) -> None:
    """From before the reward joins in, to the end; with accumulation, an average, a cosine schedule, both dynamics."""
    whole, _ = finished
    workshop.recipe = json.loads(json.dumps(whole.recipe))
    interrupted(whole.folder / "out", workshop.folder / "out", step=2)
    (workshop.folder / "out/samples/student-joint.png").unlink()
    workshop.run("--resume").check()
    assert_same_run(whole.folder / "out", workshop.folder / "out", read_rows)
    scores = [json.loads((w.folder / "out/evaluation.json").read_text()) for w in (whole, workshop)]
    assert scores[0] == scores[1]


def test_resumed_equals_uninterrupted_with_zero_2(workshop: Any, read_rows: Rows) -> None:
    workshop.recipe["optim"]["zero_stage"] = 2
    workshop.run("run.output=whole").check()
    interrupted(workshop.folder / "whole", workshop.folder / "out", step=4)
    workshop.run("run.resume=auto").check()
    assert_same_run(workshop.folder / "whole", workshop.folder / "out", read_rows)


SPLITS = {
    "2 processes x 2 x 1": ({"processes": 2}, 2, 0),
    "2 processes x 1 x 2, ZeRO 2, by torchrun": ({"processes": 2, "launcher": "torchrun"}, 1, 2),
    "one process, 4 x 1": ({}, 4, 0),
    "one process, 1 x 4": ({}, 1, 0),
}


@pytest.mark.parametrize("split", SPLITS)
def test_a_batch_may_be_split(finished: Any, workshop: Any, read_rows: Rows, split: str) -> None:
    """To rounding the same as one process with 2 x 2."""
    whole, _ = finished
    started, accumulation, stage = SPLITS[split]
    settings = (f"optim.accumulation={accumulation}", f"optim.zero_stage={stage}")
    workshop.run(*settings, "tracking.samples.every=0", **started).check()
    expected, found = read_rows(whole.folder / "out"), read_rows(workshop.folder / "out")
    assert len(found) == 5
    for row, row_expected in zip(found, expected, strict=True):
        shared = row.keys() & row_expected.keys()
        assert {"loss/fake_score", "loss/distribution_matching", "lr/generator"} <= shared
        assert {k: row[k] for k in shared} == pytest.approx({k: row_expected[k] for k in shared}, rel=1e-3, abs=1e-7)
    for name in WEIGHTS:
        a, b = (load_file(w.folder / f"out/checkpoints/step-00000005/{name}.safetensors") for w in (whole, workshop))
        difference = max((a[key] - b[key]).abs().max().item() for key in a)
        assert difference < 2e-5, name  # five updates of 1e-3 moved it by up to 5e-3
