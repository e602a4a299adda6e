"""Small modules stand in several packages, which do not import each other: they are the same everywhere."""

import ast
from pathlib import Path

import pytest

PACKAGES = Path(__file__).parents[1] / "packages"
MODELS, REWARDS = "dmdr-models/src/dmdr_models", "dmdr-rewards/src/dmdr_rewards"


def functions(path: Path) -> dict[str, str]:
    source = path.read_text(encoding="utf-8")
    nodes = [node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)]
    return {node.name: ast.get_source_segment(source, node) or "" for node in nodes}


@pytest.mark.parametrize("name", ["write_whole", "settle", "settle_names"])
def test_files_are_written_whole_in_the_same_way(name: str) -> None:
    found = {path.parts[-3]: functions(path) for path in PACKAGES.glob("*/src/*/base/atomic_files.py")}
    assert {"dmdr_models", "dmdr_rewards"} <= found.keys()
    assert len({each[name] for each in found.values() if name in each}) == 1


@pytest.mark.parametrize("name", ["text_lines", "text_prompts", "_reason"])
def test_text_files_are_read_in_the_same_way(name: str) -> None:
    found = [functions(PACKAGES / f"{path}/base/text_files.py")[name] for path in (MODELS, REWARDS)]
    assert found[0] == found[1]
