"""Tables of dmdr-score."""

import io
import os
import tarfile
from contextlib import redirect_stdout, suppress
from pathlib import Path

from hypothesis import strategies as st

from fuzzing.examples import (
    Target,
    as_json,
    as_list,
    changed,
    damaged,
    parquet,
    texts,
)

ROW = {
    "file_name": "a.png", "prompt": "a cat", "label": None, "clip": 0.5, "total": 0.5, "error": None, "note": None,
    "dtype": "float32", "clip.sha256": "00",
}  # fmt: skip


def scores() -> Target:
    """An output of dmdr-score that a later call continues, and its journal."""
    from dmdr_rewards.score.output import Columns, ScoreTable
    from dmdr_rewards.score.page import write_page
    from dmdr_rewards.score.reward_arguments import parse_rewards
    from dmdr_rewards.score.sources import Item
    from dmdr_rewards.score.summary import print_summary

    columns = Columns(("clip",), ("dtype", "clip.sha256"))
    asked = parse_rewards(["clip"], [])
    lines = changed([ROW, ROW]).map(lambda tree: b"".join(as_json(row) + b"\n" for row in as_list(tree)))
    text = b"file_name,prompt,label,clip,total,error,note,dtype,clip.sha256\na.png,a cat,,0.5,0.5,,,float32,00\n"
    content = {
        "s.jsonl": lines | damaged(as_json(ROW) + b"\n") | st.just(b"[" * 100_000 + b"\n"),
        "s.jsonl.partial.jsonl": texts([ROW, ROW], as_json).map(lambda line: line + b"\n"),
        "s.csv": damaged(text) | st.binary(max_size=60),
        "s.parquet": damaged(parquet([ROW])) | st.binary(max_size=60),
    }

    def read(example: tuple[str, bytes], folder: Path) -> None:
        (folder / example[0]).write_bytes(example[1])
        table = ScoreTable(folder / example[0].removesuffix(".partial.jsonl"), columns)
        table.refuse_unless_made_by({"dtype": "float32"})
        rows = list(table.done.values())
        table.finish(rows)
        if rows:
            with redirect_stdout(io.StringIO()):
                print_summary(table.path, rows, asked, 0, None)
            items = [Item("a.png", folder / "a.png")] * len(rows)
            write_page(folder / "page.html", "page", rows, items, ["clip"], 10)

    return st.one_of(st.tuples(st.just(name), each) for name, each in content.items()), read


def archive(members: dict[str, bytes]) -> bytes:
    """A .tar file."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as file:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
    return data.getvalue()


def tables() -> Target:
    """A table of pictures or of prompts for dmdr-score."""
    from dmdr_rewards.score.prompts import require, with_prompts
    from dmdr_rewards.score.sources import find, open_picture

    rows = [{"file_name": "a.png", "prompt": "a cat", "label": 1}, {"image": "b/c.png", "prompt": "ä", "label": "2"}]
    lines = changed(rows).map(lambda tree: b"\n".join(map(as_json, as_list(tree))))
    arrow = [
        {"image": {"bytes": b"GIF89a", "path": "a.gif"}, "prompt": "a"},
        {"image": {"bytes": None, "path": "../x"}},
    ]
    content = {
        ".jsonl": lines | st.binary(max_size=60) | st.just(b"[" * 100_000),
        ".csv": damaged(b"file_name,prompt,label\na.png,a cat,1\nb.png,,\n") | st.binary(max_size=60),
        ".tsv": damaged(b"file_name\tcaption\na.png\ta cat\n") | st.binary(max_size=60),
        ".json": changed(rows).map(as_json) | st.binary(max_size=60),
        ".txt": st.binary(max_size=60),
        ".tar": damaged(archive({"a.png": b"GIF89a", "a.txt": b"a cat", "a.json": b'{"label": 1}'})),
        ".parquet": damaged(parquet(arrow)) | damaged(parquet([rows[0]])) | st.binary(max_size=60),
    }

    def read(example: tuple[str, str, bytes], folder: Path) -> None:
        role, ending, content = example
        table = folder / f"table{ending}"
        table.write_bytes(content)
        (folder / "a.png").write_bytes(b"no picture")
        items = find(str(table if role == "pictures" else folder / "a.png"))
        items = require(with_prompts(items, str(table) if role == "prompts" else None), {"clip": "none"})
        for item in items:
            assert not isinstance(item.source, Path) or folder in Path(os.path.abspath(item.source)).parents
            with suppress(ValueError):
                open_picture(item.source)

    role = st.sampled_from(["pictures", "prompts"])
    return st.one_of(st.tuples(role, st.just(ending), each) for ending, each in content.items()), read
