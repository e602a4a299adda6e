"""A run gives the same numbers however its batch is split."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

Rows = Callable[[Path], list[dict[str, float]]]
WEIGHTS = ("generator", "student", "fake_score")


SPLITS = {
    "2 processes x 2 x 1": ({"processes": 2}, 2, 0),
    "2 processes x 1 x 2, ZeRO 2": ({"processes": 2}, 1, 2),
    "one process, 4 x 1": ({}, 4, 0),
    "one process, 1 x 4": ({}, 1, 0),
}


@pytest.mark.parametrize("split", SPLITS)
def test_a_batch_may_be_split(finished: Any, workshop: Any, read_rows: Rows, split: str) -> None:
    """The run equals one process with 2 x 2 up to rounding."""
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
