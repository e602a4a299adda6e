"""A short run of tools/fuzz.py with the same examples each time; long runs are for maintainers."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("hypothesis")
TOOL = Path(__file__).parents[2] / "tools/fuzz.py"
EXAMPLES = {
    "recipe": 60,
    "override": 60,
    "prompts": 80,
    "opened-prompts": 8,
    "embeddings": 40,
    "pairs": 40,
    "run": 60,
    "checkpoint": 50,
    "model": 80,
    "scores": 80,
    "tables": 80,
}


@pytest.fixture(scope="module")
def tool(tmp_path_factory: pytest.TempPathFactory) -> Any:
    import datasets

    spec = importlib.util.spec_from_file_location("fuzz", TOOL)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        yield module


def test_every_target_is_tried(tool: Any) -> None:
    assert EXAMPLES.keys() == tool.TARGETS.keys()


@pytest.mark.parametrize("target", EXAMPLES)
def test_any_input_is_read_or_refused_in_one_line(tool: Any, target: str) -> None:
    outcomes = tool.fuzz(target, EXAMPLES[target])
    assert outcomes["read"], "nothing is read: the examples are no use"
    assert outcomes["refused"]
