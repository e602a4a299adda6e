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
        ([{"file_name": "b.png", "words": "x"}], "must have rows with `file_name` and `prompt`"),
        ([], "must have rows with"),
        (["b.png"], "line 1: give one object"),
        ([{"file_name": "b.png", "label": "cat"}], "label 'cat' of b.png is not an integer"),
    ],
)
def test_a_table_of_prompts_is_checked(rows: list[Any], message: str, folder: Path) -> None:
    with pytest.raises(UserError, match=f"^--prompts: .*{message}"):
        with_prompts(find(str(folder)), str(lines(folder / "p.jsonl", *rows)))


@pytest.mark.filterwarnings("ignore:IMAGES")
@pytest.mark.parametrize(("name", "text"), [("p.xlsx", "x"), ("p.jsonl", "{"), ("p.parquet", "x"), ("none.csv", None)])
def test_a_file_that_is_no_table_of_prompts(name: str, text: str | None, folder: Path) -> None:
    if text is not None:
        (folder / name).write_text(text)
    with pytest.raises(UserError, match=f"^--prompts: .*{name}"):
        with_prompts(find(str(folder)), str(folder / name))


@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_tables_of_every_separator_mark_and_line_end(separator: str, mark: str, end: str, folder: Path) -> None:
    rows = [["file_name", "prompt"], ["b.png", '"a cat, a; b\tc\u2028d"']]
    text = mark + end.join(separator.join(row) for row in rows) + end
    for name in ("p.csv", "p.tsv") if separator == "\t" else ("p.csv",):
        (folder / name).write_bytes(text.encode())
        assert with_prompts(find(str(folder)), str(folder / name))[0].prompt == "a cat, a; b\tc\u2028d"


def test_jsonl_and_json_hold_the_same(folder: Path) -> None:
    rows = [{"file_name": "b.png", "prompt": "a\u2028b"}, {"file_name": "deep/a.PNG", "caption": "c", "text": "d"}]
    (folder / "p.json").write_text("\ufeff" + json.dumps(rows, ensure_ascii=False, indent=1), encoding="utf-8")
    (folder / "p.jsonl").write_text(
        "\ufeff" + "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8"
    )
    for name in ("p.json", "p.jsonl"):
        found = with_prompts(find(str(folder)), str(folder / name))
        assert [item.prompt for item in found] == ["a\u2028b", "c", None]


@pytest.mark.parametrize(
    ("row", "fields"), [("c.png,a dog, awake", "3 fields and the header 2"), ("c.png", "1 fields and the header 2")]
)
def test_a_row_that_does_not_fit_its_header_is_refused_with_its_line(row: str, fields: str, folder: Path) -> None:
    """The prompt of a longer row would end at its first comma."""
    table = folder / "p.csv"
    table.write_text(f'file_name,prompt\nb.png,"a cat, asleep"\n{row}\n')
    with pytest.raises(UserError, match=rf"^--prompts: line 3 of .*p\.csv has {fields}; put quotes"):
        with_prompts(find(str(folder)), str(table))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("p.csv", "file_name;prompt,x\n", "header of .*p.csv has ',' and ';'; separate it by one of them"),
        ("p.csv", "file_name,prompt,prompt\n", "names two columns 'prompt'"),
        ("p.csv", 'file_name,prompt\nb.png,"a\n', "cannot be read: .*; mend its quotes"),
        ("p.json", '{"b.png": "x"}', "p.json holds no list: give a list of objects"),
        ("p.json", '["x", 1]', "p.json, entry 1: give one object"),
        ("p.jsonl", '{"file_name": "b.png", "prompt": "x"}\n{', "p.jsonl, line 2 is not JSON"),
    ],
)
def test_a_table_that_cannot_be_read_says_where(name: str, text: str, message: str, folder: Path) -> None:
    (folder / name).write_text(text)
    with pytest.raises(UserError, match=f"^--prompts: .*{message}"):
        with_prompts(find(str(folder)), str(folder / name))


@pytest.mark.parametrize("name", ["p.csv", "p.jsonl", "p.json", "b.txt"])
def test_text_that_is_no_utf_8_is_refused(name: str, folder: Path) -> None:
    (folder / name).write_bytes("file_name,prompt\n".encode("utf-16"))
    with pytest.raises(UserError, match=rf"{name} is UTF-16 or UTF-32; save it as UTF-8$"):
        with_prompts(find(str(folder)), None if name == "b.txt" else str(folder / name))


def test_a_table_beside_the_pictures_needs_no_name(folder: Path) -> None:
    """As dmdr-generate writes it. Its names are those in its own folder, and it comes before the .txt of a picture."""
    lines(folder / "deep" / "prompts.jsonl", {"file_name": "a.PNG", "prompt": "a fox"}, {"file_name": "b.png"})
    lines(folder / "prompts.jsonl", {"prompt": "for training"}, {"file_name": "b.png", "label": 3})
    (folder / "deep" / "a.txt").write_text("a dog")
    found = with_prompts(find(str(folder)))
    assert [(item.prompt, item.label) for item in found] == [(None, 3), ("a fox", None), (None, None)]
    assert {item.prompt for item in with_prompts(find(str(folder)), prompt="a cat")} == {"a cat"}


def test_a_side_car_keeps_its_lines(folder: Path) -> None:
    (folder / "b.txt").write_bytes("\ufeffa cat\r\nand a\u2028dog\r\n".encode())
    assert with_prompts(find(str(folder)))[0].prompt == "a cat\nand a\u2028dog"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("p.jsonl", '{"file_name": "b.png", "caption": ["x", "y", "x"]}'),
        ("p.csv", "file_name,prompt\nb.png,x\nb.png,y\nb.png,x\n"),
    ],
)
def test_a_picture_with_two_prompts_comes_twice(name: str, text: str, folder: Path) -> None:
    (folder / name).write_text(text)
    found = [(item.file_name, item.prompt) for item in with_prompts(find(str(folder)), str(folder / name))]
    assert found == [("b.png", "x"), ("b.png", "y"), ("deep/a.PNG", None), ("deep/er/c.png", None)]


@pytest.mark.parametrize(("name", "text"), [("p.txt", "\ufeffx\n\ny\r\nz"), ("p.json", '["x", "y", "z"]')])
def test_texts_without_names_follow_the_order_of_the_pictures(name: str, text: str, folder: Path) -> None:
    (folder / name).write_text(text, encoding="utf-8")
    assert [item.prompt for item in with_prompts(find(str(folder)), str(folder / name))] == ["x", "y", "z"]
    (folder / "er.png").write_bytes((folder / "b.png").read_bytes())
    with pytest.raises(UserError, match=rf"^--prompts: .*{name} has 3 prompts for 4 pictures: give one for each"):
        with_prompts(find(str(folder)), str(folder / name))


def test_texts_without_names_need_numbers_of_equal_length(tmp_path: Path) -> None:
    """2.png comes after 10.png as a text: every prompt from there on would be another picture's."""
    for name in ("1.png", "2.png", "10.png"):
        Image.new("RGB", (6, 4)).save(tmp_path / name)
    (tmp_path / "p.txt").write_text("one\ntwo\nten\n")
    with pytest.raises(UserError, match=r"10\.png comes before 2\.png: write the numbers .* with equal lengths"):
        with_prompts(find(str(tmp_path)), str(tmp_path / "p.txt"))
    for name in ("1", "2"):
        (tmp_path / f"{name}.png").rename(tmp_path / f"0{name}.png")
    assert [item.prompt for item in with_prompts(find(str(tmp_path)), str(tmp_path / "p.txt"))] == ["one", "two", "ten"]


def test_names_that_are_no_pictures_are_told(folder: Path) -> None:
    table = lines(folder / "p.jsonl", {"file_name": "b.png", "prompt": "x"}, {"file_name": "B.png", "prompt": "y"})
    with pytest.warns(UserWarning, match=r"p\.jsonl lists names that are no picture's: 1, such as B\.png"):
        assert with_prompts(find(str(folder)), str(table))[0].prompt == "x"
    table = lines(folder / "p.jsonl", {"file_name": "pictures/b.png", "prompt": "x"})
    with pytest.raises(UserError, match=r"lists pictures/b\.png, and the first picture is called b\.png: not one name"):
        with_prompts(find(str(folder)), str(table))


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
