import re
from pathlib import Path
from typing import Any

import pytest

README = Path(__file__).parents[2] / "packages" / "dmdr-rewards" / "README.md"


def test_the_examples_run(vit_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "classifier").symlink_to(vit_folder)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        exec(block, names)
    assert names["scores"].shape == (4,)
    assert names["images"].grad.abs().sum() > 0
    assert len(names["features"]) == len(names["logits"]) == 4
