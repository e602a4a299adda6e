import json
from pathlib import Path
from typing import Any

import pytest
from dmdr_rewards.base.errors import UserError
from dmdr_rewards.score.prompts import require, with_prompts
from dmdr_rewards.score.sources import find
from PIL import Image


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """b.png, deep/a.PNG and deep/er/c.png."""
    for name in ("b.png", "deep/a.PNG", "deep/er/c.png"):
        (tmp_path / "pictures" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (6, 4)).save(tmp_path / "pictures" / name)
    return tmp_path / "pictures"


def lines(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_prompts_come_from_one_text_a_table_or_side_cars(folder: Path) -> None:
    items = find(str(folder))
    assert {item.prompt for item in with_prompts(items, prompt="a cat")} == {"a cat"}

    (folder / "b.txt").write_text(" a dog\n", encoding="utf-8")
    assert [item.prompt for item in with_prompts(items)] == ["a dog", None, None]

    table = lines(
        folder / "p.jsonl", {"file_name": "deep/a.PNG", "prompt": "“q” &amp; é"}, {"file_name": "b.png", "label": 2}
    )
    listed = with_prompts(items, str(table))
    assert [(item.prompt, item.label) for item in listed] == [(None, 2), ("“q” &amp; é", None), (None, None)]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"name": "b.png", "prompt": "x"}], "must have rows with `file_name` and `prompt`"),
        ([{"file_name": "b.png", "text": "x"}], "must have rows with `file_name` and `prompt`"),
        ([], "must have rows with"),
        (["b.png"], "line 1: give one object"),
        (
            [{"file_name": "b.png", "prompt": "x"}, {"file_name": "b.png", "prompt": "y"}],
            "lists b.png twice, with .*x.*y",
        ),
        ([{"file_name": "b.png", "label": "cat"}], "label 'cat' of b.png is not an integer"),
    ],
)
def test_a_table_of_prompts_is_checked(rows: list[Any], message: str, folder: Path) -> None:
    with pytest.raises(UserError, match=f"^--prompts: .*{message}"):
        with_prompts(find(str(folder)), str(lines(folder / "p.jsonl", *rows)))


@pytest.mark.parametrize(("name", "text"), [("p.txt", "x"), ("p.jsonl", "{"), ("p.parquet", "x"), ("none.csv", None)])
def test_a_file_that_is_no_table_of_prompts(name: str, text: str | None, folder: Path) -> None:
    if text is not None:
        (folder / name).write_text(text)
    with pytest.raises(UserError, match=f"^--prompts: .*{name}"):
        with_prompts(find(str(folder)), str(folder / name))


def test_a_row_that_is_longer_than_the_header_is_refused_with_its_line(folder: Path) -> None:
    """Its prompt would end at the first comma, and nothing would say so."""
    table = folder / "p.csv"
    table.write_text('file_name,prompt\nb.png,"a cat, asleep"\nc.png,a dog, awake\n')
    with pytest.raises(
        ValueError, match=r"p.csv, line 3 has more fields than the header: put a text that holds commas"
    ):
        with_prompts(find(str(folder)), str(table))
    table.write_text('file_name,prompt\nb.png,"a cat, asleep"\n')
    assert "a cat, asleep" in [item.prompt for item in with_prompts(find(str(folder)), str(table))]


def test_what_a_reward_needs_is_required(folder: Path) -> None:
    items = with_prompts(find(str(folder)), prompt="3")
    assert [item.label for item in require(items, {"class-label": "class_label"})] == [3, 3, 3]
    assert [item.label for item in require(items, {"clip": "text"})] == [None, None, None]

    bare = find(str(folder))
    assert require(bare, {"own": "none"}) == bare
    with pytest.raises(UserError, match=r"^--prompts: picture b\.png has no prompt, which clip needs; give"):
        require(bare, {"clip": "text"})
    with pytest.raises(UserError, match=r"picture b\.png has no class label, which dinov2 needs"):
        require(bare, {"clip": "text", "dinov2": "class_label"})
    with pytest.raises(UserError, match=r"label 'a cat' of picture b\.png, for dinov2, is not an integer"):
        require(with_prompts(bare, prompt="a cat"), {"dinov2": "class_label"})


def test_half_a_surrogate_pair_does_not_reach_the_output(folder: Path) -> None:
    table = folder / "p.jsonl"
    table.write_text('{"file_name": "b.png", "prompt": "cut \\ud83d"}\n')
    assert with_prompts(find(str(folder)), str(table))[0].prompt == "cut ?"
