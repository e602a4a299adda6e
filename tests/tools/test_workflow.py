"""The workflow of GitHub does what `.ci/run` does, and the Dockerfile copies and installs what there is."""

import re
from pathlib import Path

import tomllib
import yaml

ROOT = Path(__file__).parents[2]


def test_the_workflow_runs_the_same_checks() -> None:
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8"))
    (job,) = workflow["jobs"].values()
    assert [step["run"] for step in job["steps"] if "run" in step] == [".ci/run"]
    (python,) = [step["with"]["python-version"] for step in job["steps"] if "python" in step.get("uses", "")]
    types = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["mypy"]
    assert python == types["python_version"]


def test_the_image_has_every_package() -> None:
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    installed = re.findall(r"\./packages/([\w-]+)", text)
    assert sorted(installed) == sorted(path.parent.name for path in ROOT.glob("packages/*/pyproject.toml"))
    project = tomllib.loads((ROOT / "packages/dmdr-train/pyproject.toml").read_text(encoding="utf-8"))["project"]
    (extras,) = re.findall(r"^ARG EXTRAS=(.+)$", text, re.M)
    assert set(extras.split(",")) <= set(project["optional-dependencies"])
    assert [line for line in text.splitlines() if line.startswith("USER ")] == ["USER dmdr"]
