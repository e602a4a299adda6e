"""The README's code is run, and its reward is installed as a package into an environment."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from .conftest import TINY_CLIP

README = Path(__file__).parents[2] / "packages" / "dmdr-rewards" / "README.md"
SOURCE = README.parent / "src"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)


def test_the_examples_run(vit_folder: Path, clip_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "classifier").symlink_to(vit_folder)
    (tmp_path / "clip.pt").symlink_to(clip_file)
    (tmp_path / "clip.json").write_text(json.dumps(TINY_CLIP))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JUDGE_KEY", "sk-some-key")
    names: dict[str, Any] = {}
    assert len(blocks("python")) == 5
    for block in blocks("python"):
        exec(block, names)
    assert names["scores"].shape == (4,)
    assert names["images"].grad.abs().sum() > 0
    assert len(names["features"]) == len(names["logits"]) == 4
    assert list(names["parts"]) == ["clip", "relative(clip)"]
    assert names["total"].shape == (4,)
    assert names["loss"].requires_grad
    assert names["Sharpness"]().score(names["images"], [""] * 4).shape == (4,)


def test_a_package_with_a_reward_installs_and_is_found(tmp_path: Path) -> None:
    """A package of README's files, built and installed by pip without a network."""
    pytest.importorskip("hatchling", reason="builds the package")
    package, site = tmp_path / "package", tmp_path / "site"
    package.mkdir()
    [reward] = [block for block in blocks("python") if "class Sharpness" in block]
    assert len(reward.splitlines()) < 30
    (package / "sharpness.py").write_text(reward)
    (package / "pyproject.toml").write_text(blocks("toml")[0])
    offline = ["--no-deps", "--no-build-isolation", "--no-index", "--quiet", "--target", str(site)]
    subprocess.run([sys.executable, "-m", "pip", "install", *offline, str(package)], check=True)

    program = f"""
import sys; sys.path[:0] = [{str(site)!r}, {str(SOURCE)!r}]
import dmdr_rewards, torch
assert "sharpness" in dmdr_rewards.available()
assert dmdr_rewards.describe("sharpness").licence == "MIT"
pictures = torch.zeros(2, 3, 4, 4, requires_grad=True)
reward = dmdr_rewards.create("sharpness")
assert isinstance(reward, dmdr_rewards.Reward)
total, parts = dmdr_rewards.WeightedSum({{"sharpness": 2.0}}, device="cpu")(pictures + torch.eye(4), ["a", "b"])
assert torch.allclose(total, torch.full((2,), 2 * 6 / 12)) and parts["sharpness"].requires_grad
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
