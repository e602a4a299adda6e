import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from dmdr_rewards.base.errors import UserError
from dmdr_rewards.score.output import ENDINGS, Columns, Row, ScoreTable, by_key

COLUMNS = Columns(("r",), ("r.sha256", "r.preprocess"))
MADE_BY: dict[str, str | None] = {"r.sha256": "ab", "r.preprocess": "squash"}


def row(name: str, score: float | None = 0.1 + 0.2, **changes: Any) -> Row:
    error = None if score is not None else "cannot be read"
    identity = {"file_name": name, "prompt": 'a, "b"\nc é', "label": None}
    return {**identity, "r": score, "total": score, "error": error, "note": None, **MADE_BY, **changes}


def write(path: Path, *rows: Row) -> None:
    ScoreTable(path, COLUMNS).finish(rows)


@pytest.mark.parametrize("ending", ENDINGS)
def test_every_format_gives_back_what_was_written(ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"s{ending}"
    rows = [row("a"), row("b", 1e-9, label=3), row("c", **{"r.sha256": None}), row("d", prompt=None)]
    write(path, *rows)
    assert list(ScoreTable(path, COLUMNS).done.values()) == rows
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_a_parquet_has_its_types_where_all_is_missing(tmp_path: Path) -> None:
    write(tmp_path / "s.parquet", row("a", None))
    types = {field.name: str(field.type) for field in pq.read_schema(tmp_path / "s.parquet")}
    assert types["r"] == types["total"] == "double"
    assert types["label"] == "int64"
    assert types["r.sha256"] == types["error"] == "string"


def test_rows_survive_in_the_journal_and_a_torn_line_does_not(tmp_path: Path) -> None:
    path = tmp_path / "s.csv"
    table = ScoreTable(path, COLUMNS)
    table.append(by_key([row("a"), row("b", None)]))
    table.append(by_key([row("c")]))
    with table.journal.open("a") as file:
        file.write('[{"file_name": "d"')

    table = ScoreTable(path, COLUMNS)
    assert list(table.done.values()) == [row("a"), row("b", None), row("c")]
    table.append(by_key([row("d")]))  # behind the line before, not into the torn one
    table = ScoreTable(path, COLUMNS)
    assert [each["file_name"] for each in table.done.values()] == ["a", "b", "c", "d"]
    table.finish(list(table.done.values()))
    assert [file.name for file in tmp_path.iterdir()] == ["s.csv"]


def test_the_journal_stays_until_the_output_is_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = ScoreTable(tmp_path / "s.csv", COLUMNS)
    table.append(by_key([row("a")]))
    found = []
    monkeypatch.setattr("dmdr_rewards.score.output.settle_names", lambda folder: found.extend(folder.iterdir()))
    table.finish([row("a")])
    assert {file.name for file in found} == {"s.csv", "s.csv.partial.jsonl"}
    assert [file.name for file in tmp_path.iterdir()] == ["s.csv"]


def test_a_finished_failure_is_tried_again_and_a_journal_wins(tmp_path: Path) -> None:
    path = tmp_path / "s.jsonl"
    write(path, row("a", 1.0), row("b", None))
    table = ScoreTable(path, COLUMNS)
    assert [each["file_name"] for each in table.done.values()] == ["a"]
    table.append(by_key([row("a", 2.0)]))  # as if killed between the output's appearance and the journal's end
    assert [each["r"] for each in ScoreTable(path, COLUMNS).done.values()] == [2.0]


def test_a_write_that_fails_leaves_the_output_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "s.jsonl"
    write(path, row("a"))
    before = path.read_bytes()
    with pytest.raises(TypeError):
        ScoreTable(path, COLUMNS).finish([row("a"), row("b", prompt=object())])

    def fail(*_: Path) -> None:
        raise OSError("no space")

    table = ScoreTable(path, COLUMNS)
    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="no space"):
        table.finish([row("b")])
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["s.jsonl"]


@pytest.mark.parametrize("finished", [True, False])
def test_an_output_of_something_else_is_refused(finished: bool, tmp_path: Path) -> None:
    path = tmp_path / "s.jsonl"
    if finished:
        write(path, row("a"))
    else:
        ScoreTable(path, COLUMNS).append(by_key([row("a")]))
    table = ScoreTable(path, COLUMNS)
    table.refuse_unless_made_by(MADE_BY)
    table.refuse_unless_among(by_key([row("a"), row("b")]))

    found = rf"^--output: .*s\.jsonl{'' if finished else '.partial.jsonl'} "
    with pytest.raises(
        UserError, match=found + r"was made with r\.sha256 ab; this run has cd; give another -o, or --ov"
    ):
        table.refuse_unless_made_by({"r.sha256": "cd"})
    with pytest.raises(UserError, match=found + "scores a under prompt 'a.*c é', which is not among"):
        table.refuse_unless_among(by_key([row("a", prompt="other")]))
    other = ScoreTable(path, Columns(("other",), ()))
    with pytest.raises(UserError, match=found + "has the columns file_name, .*; this run has file_name, .*other"):
        other.refuse_unless_made_by({})
    assert ScoreTable(path, COLUMNS, overwrite=True).done == {}
    assert path.exists() == finished  # until there is something to put in its place
    assert not table.journal.exists()


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    for name, text in (("s.parquet", "x"), ("s.jsonl", "{"), ("s.csv", "file_name,r\na,x\n")):
        (tmp_path / name).write_text(text)
        with pytest.raises(UserError, match=r"^--output: "):
            ScoreTable(tmp_path / name, COLUMNS)
    (tmp_path / "t.csv.partial.jsonl").write_text("{]\n" + json.dumps([row("a")]) + "\n")
    with pytest.raises(UserError, match=r"t\.csv\.partial\.jsonl is damaged: remove it, or give --overwrite"):
        ScoreTable(tmp_path / "t.csv", COLUMNS)


@pytest.mark.parametrize("row", ["a,x,0.5,surplus", "a,x"])
def test_a_row_that_does_not_fit_its_header_is_refused(row: str, tmp_path: Path) -> None:
    (tmp_path / "s.csv").write_text(f"file_name,prompt,r\na,x,0.5\n{row}\n")
    with pytest.raises(UserError, match=r"s\.csv .*: line 3 has another number of fields than the header"):
        ScoreTable(tmp_path / "s.csv", COLUMNS)


@pytest.mark.parametrize("ending", [".jsonl", ".csv"])
def test_a_byte_order_mark_is_left_out(ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"s{ending}"
    write(path, row("a", prompt=" a\r\n\u2028b"))
    path.write_bytes("\ufeff".encode() + path.read_bytes())
    assert list(ScoreTable(path, COLUMNS).done.values()) == [row("a", prompt=" a\r\n\u2028b")]


def test_ending_and_folder_are_checked(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^--output: .*s\.xlsx must end in \.parquet, \.jsonl, \.csv"):
        ScoreTable(tmp_path / "s.xlsx", COLUMNS)
    with pytest.raises(UserError, match=r"^--output: .*nowhere: no such folder"):
        ScoreTable(tmp_path / "nowhere" / "s.csv", COLUMNS)


def test_pictures_that_come_again_are_told_apart() -> None:
    rows = [row("a"), row("a"), row("a", prompt="x"), row("a", label=1), row("a", prompt=""), row("a", prompt=None)]
    assert list(by_key(rows).values()) == rows
