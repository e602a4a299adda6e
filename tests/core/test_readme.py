"""The README's example runs as printed, and its table is complete."""

import re
from pathlib import Path

import dmdr_core
import pytest
import torch

README = (Path(__file__).parents[2] / "packages/dmdr-core/README.md").read_text()


def test_the_example_distils(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib").use("Agg")
    monkeypatch.setenv("STEPS", "250")
    monkeypatch.chdir(tmp_path)
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    scope = {}
    with torch.random.fork_rng():
        exec(example, scope)

    assert (tmp_path / "mixture.png").read_bytes().startswith(b"\x89PNG")
    # The shortened run has found the ring; less than half of the student's initial noise lies there.
    radius = scope["x"].norm(dim=1)
    assert ((radius > 1.25) & (radius < 2.75)).float().mean() > 0.75
    counts = torch.cdist(scope["x"], scope["centres"]).argmin(dim=1).bincount(minlength=8)
    assert counts.min() > 4000 / 8 / 2


def test_the_table_names_everything():
    table = README[README.index("## What is in it") :]
    assert [name for name in dmdr_core.__all__ if f"`{name}" not in table and name != "Rollout"] == []
    assert "`Rollout`" in table
