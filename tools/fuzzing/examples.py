"""Arbitrary, changed and damaged input."""

import copy
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy

NAMES = st.sampled_from(
    ["../../outside", "/outside", "..", "", "a\0b", "x" * 300, "\ud800", "nan", "-1", "1e999", "&a [*a]", "2001-99-99"]
)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | NAMES
VALUES: SearchStrategy[Any] = st.recursive(
    SCALARS | st.just(10**30) | st.just(10**400),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8) | NAMES, inner, max_size=3),
    max_leaves=6,
)


@st.composite
def changed(draw: DrawFn, tree: Any) -> Any:
    """`tree` with one to three values replaced, removed or added."""
    tree = copy.deepcopy(tree)
    for _ in range(draw(st.integers(1, 3))):
        node, places = tree, []
        while isinstance(node, (dict, list)) and node:
            keys = sorted(node, key=str) if isinstance(node, dict) else list(range(len(node)))
            places.append((node, draw(st.sampled_from(keys))))
            node = node[places[-1][1]]
        if not places:
            return draw(VALUES)
        parent, key = draw(st.sampled_from(places))
        action = draw(st.sampled_from(["replace", "remove", "add"]))
        if action == "replace":
            parent[key] = draw(VALUES)
        elif action == "remove":
            del parent[key]
        elif isinstance(parent, dict):
            parent[draw(st.text(max_size=8) | NAMES)] = draw(VALUES)
        else:
            parent.insert(key, draw(VALUES))
    return tree


@st.composite
def damaged(draw: DrawFn, content: bytes) -> bytes:
    """Bytes with a part cut out, or with other bytes inserted."""
    start = draw(st.integers(0, len(content)))
    stop = draw(st.integers(start, min(len(content), start + 40)))
    return content[:start] + draw(st.binary(max_size=8)) + content[draw(st.sampled_from([start, stop, len(content)])) :]


def as_json(tree: Any) -> bytes:
    return json.dumps(tree).encode()


def as_yaml(tree: Any) -> bytes:
    return yaml.dump(tree, allow_unicode=False).encode()


def texts(tree: Any, write: Callable[[Any], bytes]) -> SearchStrategy[bytes]:
    """Files like `write(tree)`, changed and damaged ones, and arbitrary ones."""
    deep = st.sampled_from([b"[" * 100_000, b'{"a":' * 50_000, b"- " * 5_000, b"a: &a [*a]", BILLION])
    return st.just(write(tree)) | changed(tree).map(write) | damaged(write(tree)) | st.binary(max_size=60) | deep


BILLION = "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9 if i else ['x'])}]\n" for i in range(12)).encode()

Target = tuple[SearchStrategy[Any], Callable[[Any, Path], None]]
"""A strategy, and a function that reads an example in an empty folder."""


def as_safetensors(header: Any) -> bytes:
    text = as_json(header)
    return len(text).to_bytes(8, "little") + text + bytes(8)


def as_list(tree: Any) -> list[Any]:
    return tree if isinstance(tree, list) else [tree]


def parquet(rows: Sequence[dict[str, Any]]) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(list(rows)), sink)
    return sink.getvalue().to_pybytes()
