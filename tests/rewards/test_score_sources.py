import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from dmdr_rewards.base.errors import UserError
from dmdr_rewards.score.prompts import with_prompts
from dmdr_rewards.score.sources import Item, find, open_picture
from PIL import Image


def encoded(shade: int) -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (6, 4), (shade, 0, 0)).save(data, "PNG")
    return data.getvalue()


def shade(item: Item) -> int:
    picture = open_picture(item.source)
    assert (picture.mode, picture.size) == ("RGB", (6, 4))
    return picture.getpixel((0, 0))[0]  # type: ignore[index]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """b.png, a.JPG-named deeper, and files that are no pictures."""
    root = tmp_path / "pictures"
    (root / "deep" / "er").mkdir(parents=True)
    (root / "b.png").write_bytes(encoded(1))
    (root / "deep" / "a.PNG").write_bytes(encoded(2))
    (root / "deep" / "er" / "c.png").write_bytes(encoded(3))
    (root / "notes.md").write_text("no picture")
    return root


def lines(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_a_folder_is_searched_in_the_order_of_names(folder: Path) -> None:
    items = find(str(folder))
    assert [item.file_name for item in items] == ["b.png", "deep/a.PNG", "deep/er/c.png"]
    assert [shade(item) for item in items] == [1, 2, 3]


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("pictures/*", ["b.png"]),
        ("pictures/**/*", ["b.png", "deep/a.PNG", "deep/er/c.png"]),
        ("pictures/deep/*/*.png", ["er/c.png"]),
        ("p*s/*.png", ["pictures/b.png"]),
        ("pictures/b.png", ["b.png"]),
    ],
)
def test_a_glob_names_from_its_first_wildcard(
    pattern: str, names: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder.parent)
    for form in (pattern, str(folder.parent / pattern)):
        items = find(form)
        assert [item.file_name for item in items] == names
        assert all(open_picture(item.source) for item in items)


def test_wildcards_in_an_existing_folder_are_its_name(tmp_path: Path) -> None:
    (tmp_path / "run[1]").mkdir()
    (tmp_path / "run[1]" / "a*.png").write_bytes(encoded(5))
    assert [item.file_name for item in find(str(tmp_path / "run[1]"))] == ["a*.png"]


@pytest.mark.parametrize("images", ["nowhere", "nowhere/*.png", "empty"])
def test_no_picture_is_an_error(images: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=f"^IMAGES: .*{images.split('/')[0]}.*: no picture there"):
        find(str(tmp_path / images))


@pytest.mark.parametrize("ending", ["jsonl", "csv", "parquet"])
@pytest.mark.parametrize("column", ["file_name", "image"])
def test_a_table_of_paths(ending: str, column: str, folder: Path) -> None:
    rows = [{column: "deep/a.PNG", "prompt": "x, y", "label": 3}, {column: "b.png", "prompt": "z", "label": 4}]
    path = folder / f"table.{ending}"
    if ending == "jsonl":
        lines(path, *rows)
    elif ending == "csv":
        path.write_text(f'{column},prompt,label\ndeep/a.PNG,"x, y",3\nb.png,z,4\n')
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    items = with_prompts(find(str(path)))
    assert [(item.file_name, item.prompt, item.label) for item in items] == [
        ("deep/a.PNG", "x, y", 3),
        ("b.png", "z", 4),
    ]
    assert [shade(item) for item in items] == [2, 1]


def test_a_parquet_of_pictures_over_row_groups(tmp_path: Path) -> None:
    structs = [{"bytes": encoded(i), "path": f"{i}.png"} for i in range(5)]
    rows = {"image": structs, "prompt": [f"p{i}" for i in range(5)]}
    pq.write_table(pa.table(rows), tmp_path / "t.parquet", row_group_size=2)
    items = find(str(tmp_path / "t.parquet"))
    assert [item.file_name for item in items] == [f"{i}.png" for i in range(5)]
    assert [(shade(item), item.prompt) for item in reversed(items)] == [(i, f"p{i}") for i in (4, 3, 2, 1, 0)]

    pq.write_table(pa.table({"image": [encoded(7), encoded(8)]}), tmp_path / "b.parquet")
    items = find(str(tmp_path / "b.parquet"))
    assert [(item.file_name, shade(item)) for item in items] == [("row-000000", 7), ("row-000001", 8)]


def test_a_dataset_on_disk(tmp_path: Path) -> None:
    import datasets

    features = datasets.Features(
        {"image": datasets.Image(), "prompt": datasets.Value("string"), "label": datasets.ClassLabel(names=["a", "b"])}
    )
    rows = {
        "image": [{"bytes": encoded(i), "path": f"{i}.png"} for i in range(3)],
        "prompt": ["x", "y", "z"],
        "label": [0, 1, 0],
    }
    dataset = datasets.Dataset.from_dict(rows, features=features)
    dataset.save_to_disk(tmp_path / "one")
    items = with_prompts(find(str(tmp_path / "one")))
    assert [(item.file_name, item.prompt, item.label, shade(item)) for item in items] == [
        ("0.png", "x", 0, 0),
        ("1.png", "y", 1, 1),
        ("2.png", "z", 0, 2),
    ]

    datasets.DatasetDict({"train": dataset, "test": dataset}).save_to_disk(tmp_path / "both")
    with pytest.raises(UserError, match=r"both holds several datasets: give one of train, test as .*both/NAME"):
        find(str(tmp_path / "both"))
    assert len(find(str(tmp_path / "both" / "test"))) == 3


def test_what_is_no_picture_says_why(tmp_path: Path) -> None:
    (tmp_path / "cut.png").write_bytes(encoded(1)[:40])
    (tmp_path / "text.png").write_text("text")
    for name in ("cut.png", "text.png", "gone.png"):
        with pytest.raises(ValueError, match=r"cannot be read: .+"):
            open_picture(tmp_path / name)
