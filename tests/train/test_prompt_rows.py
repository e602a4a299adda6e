"""Tables of prompts as people have them: the right texts, or one line that names the line and the fix."""

import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pytest
from dmdr_train.base.errors import UserError
from dmdr_train.data.prompt_files import check_prompts, open_prompts
from dmdr_train.data.prompt_rows import batches_of
from dmdr_train.recipe.schema import Data
from pyarrow import parquet


@pytest.fixture(autouse=True)
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder, and a cache of datasets that is not the user's own."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def prompts_of(**data: Any) -> list[str]:
    """What a run would train on, which does not depend on how the file is read."""
    check_prompts(Data(**data))
    found, streamed = (
        [row["prompt"].strip() for row in open_prompts(Data(**data, streaming=streaming))]
        for streaming in (False, True)
    )
    assert found == streamed
    return found


def said_of(opened: bool = False, **data: Any) -> str:
    """The error about a file; of a folder, if `opened`."""
    with pytest.raises(UserError) as caught:
        open_prompts(Data(**data)) if opened else check_prompts(Data(**data))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def folder_of(name: str, content: str) -> str:
    """A folder with one data file, which the library reads as the split train."""
    Path("folder").mkdir()
    (Path("folder") / name).write_text(content)
    return "folder"


# -- tables of text

SPLIT = "prompt\na cat, asleep on a mat\na dog, awake in a yard\n"


@pytest.mark.parametrize(
    ("content", "line", "found", "expected"),
    [
        (SPLIT, 2, 2, 1),  # every row: pandas takes the first part for an index
        ("prompt\na cat\na dog, awake\n", 3, 2, 1),
        ("id,prompt\n1,a cat, asleep\n", 2, 3, 2),
        ("id,prompt\n\n1,a cat\n2,a dog, awake\n", 4, 3, 2),
        ("id,prompt\n1,a cat\nasleep\n", 3, 1, 2),  # a line end without quotes
        ('id,prompt\n1,"a\ncat"\n2,a dog, awake\n', 4, 3, 2),
    ],
)
def test_a_row_that_does_not_fit_the_header(content: str, line: int, found: int, expected: int) -> None:
    Path("p.csv").write_text(content)
    said = f"data.prompts: line {line} of p.csv has {found} fields and the header {expected}; put quotes around texts"
    assert said_of(prompts="p.csv").startswith(said)


def test_it_is_refused_in_a_folder_too() -> None:
    name = folder_of("train.csv", SPLIT)
    for streaming in (False, True):
        said = said_of(opened=True, prompts=name, streaming=streaming)
        assert said.startswith("data.prompts: line 2 of ")
        assert "train.csv has 2 fields and the header 1; put quotes" in said


@pytest.mark.parametrize(("content", "said"), [(SPLIT, "longer than their header"), ("id;prompt\n1;a\n", "no commas")])
@pytest.mark.parametrize("streaming", [False, True])
def test_it_is_refused_where_the_library_reads(content: str, said: str, streaming: bool) -> None:
    """In compressed files and on the hub."""
    import gzip

    Path("folder").mkdir()
    with gzip.open("folder/train.csv.gz", "wt") as file:
        file.write(content)
    assert said in said_of(opened=True, prompts="folder", streaming=streaming)


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize(("suffix", "delimiter"), [("csv", ","), ("csv", ";"), ("csv", "\t"), ("tsv", "\t")])
def test_what_separates_the_fields(suffix: str, delimiter: str, end: str) -> None:
    d = delimiter
    rows = [f'id{d}prompt{d}"note"', f'1{d}"a{d}b ""c"""{d}x', f"{d}{d}", "", f"2{d}plain.{d}", f'3{d} "two\nlines"{d}']
    Path(f"p.{suffix}").write_bytes(("\ufeff" + end.join(rows)).encode())
    assert prompts_of(prompts=f"p.{suffix}", column="prompt") == [f'a{d}b "c"', "plain.", "two\nlines"]


def test_a_single_column_is_no_table_of_semicolons() -> None:
    Path("p.csv").write_text('prompt\na cat; asleep\n"a dog, awake"\nnull\n12\n')
    assert prompts_of(prompts="p.csv") == ["a cat; asleep", "a dog, awake", "null", "12"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('prompt\n"a cat\na dog\n', "line 3 of p.csv cannot be read: unexpected end of data; mend its quotes"),
        ('prompt\n"a" cat\n', "line 2 of p.csv cannot be read: ',' expected after '\"'; mend its quotes"),
        ("id;prompt,note\n1;a,b\n", "the header of p.csv has ',' and ';'; separate it by one of them"),
        ("prompt,prompt\na,b\n", "the header of p.csv names two columns 'prompt'; rename one"),
        ("id|prompt\n1|a cat\n", "the header of p.csv is separated by '|'; separate the columns by ','"),
    ],
)
def test_a_table_that_can_be_read_in_two_ways(content: str, said: str) -> None:
    Path("p.csv").write_text(content)
    assert said_of(prompts="p.csv") == f"data.prompts: {said}"


# -- JSON


def test_the_first_row_may_lack_the_field() -> None:
    rows = [{"id": 1}, {"id": 2, "prompt": None}, {"id": 3, "prompt": "a cat"}, {"prompt": "a dog", "more": [1]}]
    Path("p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert prompts_of(prompts="p.jsonl") == ["a cat", "a dog"]
    assert prompts_of(prompts="p.jsonl", column="prompt") == ["a cat", "a dog"]
    Path("folder").mkdir()
    Path("p.jsonl").rename("folder/train.jsonl")
    assert prompts_of(prompts="folder") == ["a cat", "a dog"]


def test_a_usual_name_counts_wherever_it_comes() -> None:
    for row in ('{"text": "page", "prompt": "a cat"}', '{"prompt": "a cat", "text": "page"}'):
        for rows in ('{"text": "page"}\n' * 3 + row, row):
            Path("p.jsonl").write_text(rows)
            assert prompts_of(prompts="p.jsonl") == ["a cat"]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"prompt": ["a"]}', "line 2 of p.jsonl has no text in prompt, but ['a']; give texts or null"),
        ('{"prompt": 7}', "line 2 of p.jsonl has no text in prompt, but 7; give texts or null"),
        ('{"prompt": "\\uD83D"}', "line 2 of p.jsonl cannot be UTF-8 (surrogates not allowed); mend it"),
        ('{"prompt": "b"', "line 2 of p.jsonl is not JSON (Expecting ',' delimiter); give one object per line"),
        ("[" * 100_000, "line 2 of p.jsonl is not JSON (maximum recursion depth exceeded"),
    ],
)
def test_a_row_that_holds_no_text(line: str, said: str) -> None:
    Path("p.jsonl").write_text(f'{{"prompt": "a"}}\n{line}\n')
    assert said_of(prompts="p.jsonl").startswith(f"data.prompts: {said}")


def test_other_fields_may_hold_anything() -> None:
    Path("p.jsonl").write_text('{"prompt": "a", "text": 1}\n{"prompt": "\\ud83d\\ude00\\u2028b", "text": "x"}\n')
    assert prompts_of(prompts="p.jsonl") == ["a", "\U0001f600\u2028b"]


# -- parquet

STRINGS = [pa.string(), pa.large_string(), pa.string_view()]
BYTES = [pa.binary(), pa.large_binary(), pa.binary_view()]


@pytest.mark.parametrize("kind", [*STRINGS, *BYTES, pa.dictionary(pa.int8(), pa.string())], ids=str)
def test_types_of_text(kind: Any) -> None:
    texts = pa.array(["ö cat", None, " ", "a dog\u2028", "ö cat"])
    column = texts.dictionary_encode().cast(kind) if pa.types.is_dictionary(kind) else texts.cast(kind)
    table = pa.table({"image": pa.array([b"\xff"] * 5, pa.binary()), "prompt": column})
    parquet.write_table(table, "p.parquet", row_group_size=2)
    assert prompts_of(prompts="p.parquet") == ["ö cat", "a dog", "ö cat"]
    Path("folder").mkdir()
    Path("p.parquet").rename("folder/train.parquet")
    assert prompts_of(prompts="folder") == ["ö cat", "a dog", "ö cat"]


def test_bytes_are_text_only_if_they_are_named() -> None:
    parquet.write_table(pa.table({"image": [b"\xff"], "words": [b"a cat"]}), "p.parquet")
    assert said_of(prompts="p.parquet").startswith("data.prompts: p.parquet has no text, only image, words")
    assert prompts_of(prompts="p.parquet", column="words") == ["a cat"]
    assert "p.parquet cannot be read: Invalid UTF8" in said_of(opened=True, prompts="p.parquet", column="image")


# -- folders


@pytest.mark.parametrize("streaming", [False, True])
def test_bytes_that_are_no_text_are_a_line_also_in_the_midst_of_a_stream(streaming: bool) -> None:
    kind = pa.binary()
    parquet.write_table(pa.table({"prompt": pa.array([*10_000 * [b"a cat"], b"a \xff cat"], kind)}), "p.parquet")
    with pytest.raises(UserError, match=r"^data.prompts: .*p.parquet cannot be read: .*; mend the file$"):
        list(open_prompts(Data(prompts="p.parquet", streaming=streaming)))


def test_two_columns_of_one_name_in_parquet() -> None:
    parquet.write_table(pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], ["text", "text"]), "p.parquet")
    assert said_of(prompts="p.parquet") == "data.prompts: the header of p.parquet names two columns 'text'; rename one"


# -- folders


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_a_file_of_a_folder_without_the_column_is_named(kind: str) -> None:
    Path("folder").mkdir()
    for name, column in (("a", "prompt"), ("b", "caption")):
        path = f"folder/{name}.{kind}"
        if kind == "parquet":
            parquet.write_table(pa.table({column: [name]}), path)
        else:
            Path(path).write_text(f"{column}\n{name}\n" if kind == "csv" else json.dumps({column: name}))
    said = said_of(opened=True, prompts="folder", streaming=True)
    assert f"b.{kind} has no column prompt, only caption; rename one" in said


def test_formats_that_the_library_would_leave_out_are_named() -> None:
    """Of a folder with several formats the library reads the one that most files have."""
    name = folder_of("a.jsonl", '{"prompt": "a cat"}\n')
    Path("folder/.cache").mkdir()
    Path("folder/.cache/note.txt").write_text("not a prompt\n")
    assert prompts_of(prompts=name) == ["a cat"]
    Path("folder/b.txt").write_text("a dog\n")
    fix = "give one file, or a folder with one format"
    assert said_of(opened=True, prompts=name) == (
        f"data.prompts: folder holds files of several formats, a.jsonl and b.txt; {fix}"
    )


def test_text_files_in_a_folder_are_read_as_alone() -> None:
    within = "a\u2028b\x85c"
    Path("folder").mkdir()
    for name in ("train-1.txt", "train-2.txt", "test.txt"):
        Path("folder", name).write_bytes(f"\ufeff{name} {within}\r\n\r\n".encode())
    assert prompts_of(prompts="folder") == [f"train-{i}.txt {within}" for i in (1, 2)]
    assert prompts_of(prompts="folder", split="test") == [f"test.txt {within}"]
    assert said_of(opened=True, prompts="folder", split="val").startswith("data.split: folder has no split 'val'")


def test_a_changed_file_is_read_again() -> None:
    for text in ("a cat", "a dog and more"):
        Path("p.txt").write_text(text)
        assert prompts_of(prompts="p.txt") == [text]


CONFIGURATIONS = """---
configs:
- {config_name: long, data_files: long/*.csv}
- {config_name: short, data_files: short/*.csv}
---
"""


def test_a_configuration_is_named() -> None:
    for name in ("long", "short"):
        Path("set", name).mkdir(parents=True)
        Path("set", name, "data.csv").write_text(f"prompt\na {name} one\n")
    Path("set/README.md").write_text(CONFIGURATIONS)
    assert prompts_of(prompts="set", name="short") == ["a short one"]
    assert prompts_of(prompts="set", name="long") == ["a long one"]
    several = "data.name: is null and set has the configurations long, short; name one"
    assert said_of(opened=True, prompts="set") == several
    unknown = "data.name: set has no configuration 'shrot'; valid are long, short"
    assert said_of(opened=True, prompts="set", name="shrot") == unknown


@pytest.mark.parametrize("saved", [False, True])
def test_what_has_no_configurations(saved: bool) -> None:
    datasets.Dataset.from_dict({"prompt": ["a"]}).save_to_disk("p")
    Path("p.txt").write_text("a")
    name = "p" if saved else "p.txt"
    assert said_of(prompts=name, name="x") == f"data.name: {name} has no configurations; leave it out"


# -- memory


def test_large_files_are_read_in_batches(in_folder: Path) -> None:
    Path("p.txt").write_text("\n".join(f" a{i} " for i in range(25)) + "\n\n")
    batches = batches_of(Path("p.txt"), "text", size=10)
    assert next(batches) == [f"a{i}" for i in range(10)]
    assert [len(batch) for batch in batches] == [10, 5]
