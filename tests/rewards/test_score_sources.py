import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from dmdr_rewards.base.errors import UserError
from dmdr_rewards.score import cells
from dmdr_rewards.score.prompts import with_prompts
from dmdr_rewards.score.sources import ENDINGS, Item, find, open_picture
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


def test_links_to_folders_count_a_picture_once(folder: Path) -> None:
    """A link to a parent folder leads round and round, two of them in ever more ways."""
    expected = ["b.png", "deep/a.PNG", "deep/er/c.png"]
    (folder / "deep" / "up").symlink_to("..")
    (folder / "deep" / "er" / "round").symlink_to(folder)
    (folder / "again").symlink_to("deep")
    assert [item.file_name for item in find(str(folder))] == expected
    assert [item.file_name for item in find(f"{folder}/**/*")] == expected
    assert [item.file_name for item in find(f"{folder}/d*/**/*.png")] == ["deep/er/c.png"]


def test_a_link_to_another_folder_is_followed(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "d.png").write_bytes(encoded(4))
    (folder / "link").symlink_to(tmp_path / "elsewhere")
    (folder / "e.png").symlink_to(tmp_path / "elsewhere" / "d.png")
    names = ["b.png", "deep/a.PNG", "deep/er/c.png", "e.png", "link/d.png"]
    assert [item.file_name for item in find(str(folder))] == names
    assert [item.file_name for item in find(f"{folder}/**/*.*")] == names


def test_hidden_files_are_left_out(folder: Path) -> None:
    (folder / "._b.png").write_bytes(b"a Mac's notes")
    (folder / ".cache").mkdir()
    (folder / ".cache" / "x.png").write_bytes(encoded(9))
    for images in (str(folder), f"{folder}/**/*", f"{folder}/*"):
        assert "b.png" in [item.file_name for item in find(images)]
        assert all(not part.startswith(".") for item in find(images) for part in item.file_name.split("/"))


def test_other_endings_of_the_same_formats_are_read_and_the_rest_is_told(folder: Path) -> None:
    for name in ("d.jfif", "e.JPE", "f.apng", "g.dib"):
        (folder / name).write_bytes(encoded(4))
    for name in ("h.heic", "i.JXL"):
        (folder / name).write_bytes(b"?")
    with pytest.warns(UserWarning, match=r"pictures left out: 2, such as h\.heic \(\.heic, \.jxl\)"):
        items = find(str(folder))
    assert {"d.jfif", "e.JPE", "f.apng", "g.dib"} < {item.file_name for item in items}
    assert shade(next(item for item in items if item.file_name == "d.jfif")) == 4


def test_a_row_group_is_read_a_few_pictures_at_a_time(tmp_path: Path) -> None:
    """A file of one row group may hold gigabytes, and every worker reads it."""
    pictures = [bytes([number]) * 50_000 for number in range(200)]
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table({"image": pictures}), path, row_group_size=200, write_batch_size=1, use_dictionary=False)
    del pictures
    items = find(str(path))
    before = pa.total_allocated_bytes()
    for number in (0, 3, 9, 150, 199, 2):  # forward, and once back
        assert items[number].source.value() == bytes([number]) * 50_000  # type: ignore[union-attr]
        assert pa.total_allocated_bytes() - before < 2_500_000  # of ten million


def shards(folder: Path) -> None:
    for name, start in (("train-00000", 0), ("train-00001", 3)):
        structs = [{"bytes": encoded(start + i), "path": f"{i}.png"} for i in range(3)]
        captions = [f"c{start + i}" for i in range(3)]
        pq.write_table(pa.table({"image": structs, "caption": captions}), folder / f"{name}.parquet")


def test_a_folder_of_shards_with_captions(tmp_path: Path) -> None:
    """The hub's layout. Names in two shards may agree, so the shard stands before each."""
    (tmp_path / "data").mkdir()
    shards(tmp_path / "data")
    pq.write_table(pa.table({"file_name": ["x.png"], "total": [1.0]}), tmp_path / "scores.parquet")
    for images, prefix in ((tmp_path, "data/"), (f"{tmp_path}/data/train-*.parquet", "")):
        items = find(str(images))
        assert [item.file_name for item in items[2:4]] == [f"{prefix}train-00000/2.png", f"{prefix}train-00001/0.png"]
        assert [(shade(item), item.prompt) for item in items] == [(i, f"c{i}") for i in range(6)]
    (tmp_path / "logo.png").write_bytes(encoded(9))
    with pytest.warns(UserWarning, match=r"pictures left out: 2, such as data/train-00000\.parquet"):
        assert [item.file_name for item in find(str(tmp_path))] == ["logo.png"]
    (tmp_path / "logo.png").unlink()
    (tmp_path / "data" / "train-00001.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"^IMAGES: .*train-00001\.parquet"):
        find(str(tmp_path))


def archive(path: Path, members: dict[str, bytes], **kinds: bytes) -> Path:
    mode: Any = "w" if path.suffix == ".tar" else "w:gz"
    with tarfile.open(path, mode) as file:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
        for name, kind in kinds.items():
            info = tarfile.TarInfo(f"{name}.png")
            info.type, info.linkname = kind, "/etc/passwd"
            file.addfile(info)
    return path


def test_an_archive_in_the_layout_of_webdataset(tmp_path: Path) -> None:
    members = {
        "00/a.png": encoded(1),
        "00/a.txt": "\ufeffa cat\n".encode(),
        "00/a.json": b'{"caption": "other", "label": 3, "width": 6}',
        "b.b.PNG": b"no picture by webdataset's rule: its ending is b.PNG",
        "c.json": b'{"caption": ["x", "y"]}',
        "c.PNG": encoded(2),
        "d.cls": b"4\n",
        "d.jpg": encoded(3),
        "../e.png": encoded(4),
        "._a.png": b"a Mac's notes",
    }
    path = archive(tmp_path / "s.tar", members, link=tarfile.SYMTYPE, hard=tarfile.LNKTYPE, fifo=tarfile.FIFOTYPE)
    items = find(str(path))
    assert [(item.file_name, item.prompt, item.label, shade(item)) for item in items] == [
        ("00/a.png", "a cat", 3, 1),
        ("c.PNG", "x", None, 2),
        ("c.PNG", "y", None, 2),
        ("d.jpg", None, 4, 3),
        ("../e.png", None, None, 4),
    ]
    assert list(tmp_path.iterdir()) == [path]  # nothing is unpacked
    archive(tmp_path / "t.tar", {"a.png": encoded(5)})
    assert [item.file_name for item in find(str(tmp_path))][-2:] == ["s/../e.png", "t/a.png"]


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"a.txt": b"x" * (1 << 20) + b"x"}, r"a\.txt: 1048577 bytes are too long for a prompt"),
        ({"a.txt": b"caf\xe9"}, r"a\.txt is not UTF-8"),
        ({"a.json": b"{"}, r"a\.json is not JSON"),
        ({"a.json": b"[]"}, r"a\.json: give one object"),
        ({"a.cls": b"cat"}, r"label 'cat' of a\.png is not an integer"),
    ],
)
def test_an_archive_with_a_mistake_names_it(members: dict[str, bytes], message: str, tmp_path: Path) -> None:
    path = archive(tmp_path / "s.tar", {"a.png": encoded(1), **members})
    with pytest.raises(UserError, match=f"^IMAGES: .*{message}"):
        find(str(path))


def test_a_damaged_archive_is_refused(tmp_path: Path) -> None:
    path = archive(tmp_path / "s.tar", {"a.png": encoded(1)})
    cell = find(str(path))[0].source
    path.write_bytes(path.read_bytes()[:520])
    with pytest.raises(ValueError, match="ends before the end of this picture"):
        open_picture(cell)
    path.write_bytes(b"no archive")
    with pytest.raises(UserError, match=r"^IMAGES: .*s\.tar"):
        find(str(path))
    with tarfile.open(tmp_path / "s.tar", "w:gz"):
        pass
    with pytest.raises(UserError, match=r"^IMAGES: .*s\.tar"):
        find(str(path))


def test_an_archive_without_its_end_is_refused(tmp_path: Path) -> None:
    """Python's tarfile takes a cut or damaged header for the end, so the pictures behind it would be passed over."""
    path = archive(tmp_path / "s.tar", {"a.png": encoded(1), "b.png": encoded(2)})
    second = find(str(path))[1].source
    assert isinstance(second, cells.TarCell)
    first = path.read_bytes()[: second.offset - tarfile.BLOCKSIZE]
    path.write_bytes(first + bytes(tarfile.BLOCKSIZE))  # the least that an end can be
    assert len(find(str(path))) == 1
    for rest in (b"", b"b.png", b"b.png" + bytes(2 * tarfile.BLOCKSIZE)):
        path.write_bytes(first + rest)
        with pytest.raises(UserError, match=r"^IMAGES: .*s\.tar has no end after 1 pictures: it is cut off or damaged"):
            find(str(path))


@pytest.mark.parametrize("ending", sorted(ENDINGS))
def test_every_ending_that_is_scored_can_be_read(ending: str, tmp_path: Path) -> None:
    kind = Image.registered_extensions().get(ending, "JPEG")
    Image.new("RGB", (6, 4), (200, 0, 0)).save(tmp_path / f"a{ending}", kind)
    (item,) = find(str(tmp_path))
    assert shade(item) == pytest.approx(200, abs=3)


def test_why_a_cell_holds_no_picture(tmp_path: Path) -> None:
    """The reasons are the same in every run: a file's output is."""
    pq.write_table(pa.table({"image": [None, b"", b"no picture"]}), tmp_path / "t.parquet")
    reasons = ["nothing is there", "nothing is there", "it is damaged, or none of PNG, JPEG"]
    for item, reason in zip(find(str(tmp_path / "t.parquet")), reasons, strict=True):
        with pytest.raises(ValueError, match=f"^cannot be read: {reason}"):
            open_picture(item.source)


@pytest.mark.parametrize("name", ["s.tar.gz", "s.TGZ"])
def test_a_compressed_archive_is_read_from_its_start(name: str, tmp_path: Path) -> None:
    path = archive(tmp_path / name, {f"{i}.png": encoded(i) for i in range(4)} | {"2.txt": b"a cat"})
    items = find(str(path))
    assert [(item.file_name, item.prompt) for item in items][1:3] == [("1.png", None), ("2.png", "a cat")]
    assert [shade(items[i]) for i in (0, 3, 1, 2)] == [0, 3, 1, 2]  # backwards, too
    assert list(tmp_path.iterdir()) == [path]
    archive(tmp_path / "t.tar", {"a.png": encoded(5)})
    assert {item.file_name for item in find(str(tmp_path))} == {*(f"s/{i}.png" for i in range(4)), "t/a.png"}


def test_a_compressed_archive_may_not_fill_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cells, "_LARGEST", 10_000)
    path = archive(tmp_path / "s.tar.gz", {"a.png": encoded(1), "b.png": bytes(10_001)})
    large = find(str(path))[1].source
    with pytest.raises(ValueError, match="10,001 bytes are too many for a picture"):
        open_picture(large)
    info = tarfile.TarInfo("a.png")
    info.pax_headers = {"comment": "x" * 20_000}
    with tarfile.open(tmp_path / "p.tar.gz", "w:gz", format=tarfile.PAX_FORMAT) as file:
        file.addfile(info)
    with pytest.raises(UserError, match=r"p\.tar\.gz asks for 20,\d+ bytes at once"):
        find(str(tmp_path / "p.tar.gz"))


def test_an_array_of_pictures(tmp_path: Path) -> None:
    pictures = np.arange(3 * 4 * 5 * 3, dtype=np.uint8).reshape(3, 4, 5, 3)
    np.savez(tmp_path / "samples.npz", pictures, np.array([7, 8, 9]))
    items = find(str(tmp_path / "samples.npz"))
    assert [(item.file_name, item.label) for item in items] == [("000000", 7), ("000001", 8), ("000002", 9)]
    for item, picture in zip(items, pictures, strict=True):
        assert np.array_equal(np.asarray(open_picture(item.source)), picture)
    np.savez(tmp_path / "plain.npz", pictures)
    assert {item.label for item in find(str(tmp_path / "plain.npz"))} == {None}


SQUARES = np.zeros((2, 4, 4, 3), np.uint8)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"mu": np.zeros(3)}, "has no array arr_0, only mu"),
        ({"arr_0": np.zeros((2, 4, 4, 3))}, r"arr_0 is float64 \[2, 4, 4, 3\]: give uint8"),
        ({"arr_0": np.zeros((2, 3, 4, 4), np.uint8)}, r"arr_0 is uint8 \[2, 3, 4, 4\]"),
        (
            {"arr_0": np.zeros((2, 4, 4, 3), np.uint8), "arr_1": np.zeros(3, int)},
            r"arr_1 is int64 \[3\]: give an integer",
        ),
        (
            {"arr_0": np.zeros((2, 4, 4, 3), np.uint8), "arr_1": np.array([None, {}])},
            r"cannot be loaded when allow_pickle",
        ),
    ],
)
def test_an_array_of_another_form_is_refused(arrays: Any, message: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(UserError, match=f"^IMAGES: .*{message}"):
        find(str(tmp_path / "a.npz"))


def test_a_compressed_or_damaged_array_is_refused(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "a.npz", SQUARES)
    with pytest.raises(UserError, match=r"arr_0 is compressed, .* write it with numpy.savez"):
        find(str(tmp_path / "a.npz"))
    (tmp_path / "a.npz").write_bytes(b"no archive")
    with pytest.raises(UserError, match=r"a\.npz is no \.npz"):
        find(str(tmp_path / "a.npz"))


def structs(start: int = 0) -> list[dict[str, Any]]:
    return [{"bytes": encoded(start + i), "path": f"{i}.png"} for i in range(3)]


def test_the_only_column_of_pictures_is_found_whatever_its_name(tmp_path: Path) -> None:
    boxes = [{"left": i} for i in range(3)]
    pq.write_table(pa.table({"boxes": boxes, "photo": structs(4), "text": list("abc")}), tmp_path / "t.parquet")
    for images in (tmp_path / "t.parquet", tmp_path):
        items = find(str(images))
        assert [(item.file_name, item.prompt, shade(item)) for item in items] == [
            ("0.png", "a", 4), ("1.png", "b", 5), ("2.png", "c", 6),
        ]  # fmt: skip
    plain = [each["bytes"] for each in structs(7)]
    pq.write_table(pa.table({"jpg": plain, "text": list("abc")}), tmp_path / "t.parquet")
    assert [shade(item) for item in find(str(tmp_path / "t.parquet"), "jpg")] == [7, 8, 9]
    with pytest.raises(UserError, match=r"has the columns jpg, text: one must be `image` or .*, or give --column"):
        find(str(tmp_path / "t.parquet"))


def test_one_of_several_columns_of_pictures_is_chosen(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table({"before": structs(1), "after": structs(5)}), path)
    with pytest.raises(UserError, match="several columns of pictures: give one of before, after as --column"):
        find(str(path))
    assert [shade(item) for item in find(str(path), "after")] == [5, 6, 7]
    with pytest.raises(UserError, match=r"^--column: .*t.parquet has no column image2, only before, after"):
        find(str(path), "image2")


def test_a_dataset_with_another_column(tmp_path: Path) -> None:
    import datasets

    features = datasets.Features({"photo": datasets.Image(), "text": datasets.Value("string")})
    datasets.Dataset.from_dict({"photo": structs(3), "text": list("abc")}, features=features).save_to_disk(
        tmp_path / "d"
    )
    assert [(item.prompt, shade(item)) for item in find(str(tmp_path / "d"))] == [("a", 3), ("b", 4), ("c", 5)]
