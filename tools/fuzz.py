"""Give arbitrary and mutated input to every reader of users' files; it must be read or refused in one line.

    python tools/fuzz.py [TARGET …] [--examples 1000] [--seed 0]

An exception other than the reader's own error is a failure. An endless run is one, too, and so is a change to a file
outside the folder of the input. Needs hypothesis.
"""

import argparse
import copy
import io
import json
import os
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import yaml
from hypothesis import HealthCheck, Phase, given, seed, settings
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


# -- the targets: each has a strategy, and a function that reads an example in an empty folder

Target = tuple[SearchStrategy[Any], Callable[[Any, Path], None]]


def recipe_base() -> dict[str, Any]:
    from dmdr_train.recipe.load import BUILT_IN, load_recipe

    return load_recipe(str(BUILT_IN / "demo-t2i.yaml")).model_dump(mode="json")


def recipe() -> Target:
    """A recipe file, up to the checks before torch is imported."""
    from dmdr_train.recipe.load import dump_recipe, from_yaml, load_recipe, parse_recipe
    from dmdr_train.run import preflight

    def read(content: bytes, folder: Path) -> None:
        (folder / "recipe.yaml").write_bytes(content)
        found = load_recipe(str(folder / "recipe.yaml"))
        assert parse_recipe(from_yaml(dump_recipe(found))) == found
        assert found.stages
        preflight.check(found, 1, dry_run=True)

    return texts(recipe_base(), as_yaml), read


def override() -> Target:
    """`key=value` on the command line."""
    from dmdr_train.recipe.load import load_recipe

    def items(node: Any, prefix: str = "") -> list[tuple[str, Any]]:
        inner = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
        return [p for name, child in inner for p in ((f"{prefix}{name}", child), *items(child, f"{prefix}{name}."))]

    def written(tree: Any) -> str:
        return yaml.dump(tree, default_flow_style=True, width=10**9).removesuffix("\n...\n").strip()

    known = items(recipe_base())
    own = st.sampled_from([f"{key}={written(value)}" for key, value in known])
    key = st.sampled_from([key for key, _ in known])
    key |= st.builds("{}.{}".format, key, st.text(max_size=5)) | st.text(max_size=20)
    value = VALUES.map(written) | st.text(max_size=20)

    def read(text: str, folder: Path) -> None:
        load_recipe("demo-t2i", [text])

    return own | st.builds("{}={}".format, key, value) | st.text(max_size=30), read


def prompts() -> Target:
    """A file of prompts, up to the checks before large imports."""
    from dmdr_train.data.prompt_files import check_prompts
    from dmdr_train.recipe.schema import Data

    def read(example: tuple[str, bytes], folder: Path) -> None:
        path = folder / f"prompts{example[0]}"
        path.write_bytes(example[1])
        check_prompts(Data(prompts=str(path)))

    return prompt_file(), read


def prompt_file() -> SearchStrategy[tuple[str, bytes]]:
    rows = [{"prompt": "a cat", "n": 1}, {"prompt": "“ä”", "n": 2}]
    lines = changed(rows).map(lambda tree: b"\n".join(map(as_json, tree if isinstance(tree, list) else [tree])))
    content = {
        ".txt": damaged("a cat\nzwei Hündchen\n".encode()) | st.binary(max_size=60),
        ".csv": damaged(b'prompt,n\n"a cat, ""two""",1\na dog,2\n') | st.binary(max_size=60),
        ".jsonl": lines | damaged(b'{"prompt": "a cat"}\n{"prompt": "a dog"}\n') | st.just(b"[" * 100_000),
        ".parquet": damaged(parquet(rows)) | st.binary(max_size=60),
    }
    return st.one_of(st.tuples(st.just(ending), each) for ending, each in content.items())


def opened_prompts() -> Target:
    """A file of prompts, opened to its rows."""
    from dmdr_train.data.prompt_files import check_prompts, open_prompts
    from dmdr_train.recipe.schema import Data

    def read(example: tuple[str, bytes], folder: Path) -> None:
        path = folder / f"prompts{example[0]}"
        path.write_bytes(example[1])
        check_prompts(Data(prompts=str(path)))
        found = open_prompts(Data(prompts=str(path)))
        assert all(text.strip() for text in found[:]["prompt"])

    return prompt_file(), read


def embeddings() -> Target:
    """The manifest of a cache of embeddings."""
    import datasets
    import numpy as np
    from dmdr_models import registry
    from dmdr_models.folder.fingerprints import text_fingerprint
    from dmdr_train.data.embedding_cache import EmbeddingCache, cache_folder, check_embeddings, made_with, prompt_hash
    from dmdr_train.data.encode import plan
    from dmdr_train.recipe.load import load_recipe
    from safetensors.numpy import save

    shard = save({"hash": np.array([prompt_hash("a cat")]), "states": np.zeros((1, 2), np.float32)})
    model = load_recipe("demo-t2i").model
    entry = {"prompts": 1, "bytes": len(shard), "sha256": "0" * 64}
    made = made_with(model)
    made["text_encoders"] = text_fingerprint(registry.find(model.family), model.path, made["max_tokens"])
    manifest = {**made, "shards": {"shard-00.safetensors": entry}, "prompts": 1}
    wanted = datasets.Dataset.from_dict({"prompt": ["a cat", "a dog"]})

    def read(content: bytes, folder: Path) -> None:
        cache = folder / "cache"
        cache.mkdir()
        (cache / "shard-00.safetensors").write_bytes(shard)
        (cache / "manifest.json").write_bytes(content)
        cache_folder("--output", cache).remove_damaged()
        plan(cache_folder("--output", cache), wanted, 1)
        check_embeddings(load_recipe("demo-t2i", [f"data.embeddings={cache}"]))
        assert EmbeddingCache(cache)(["a cat"])["states"].shape == (1, 2)

    return texts(manifest, as_json), read


def pairs() -> Target:
    """A folder of pairs: its manifest, and the metadata of a shard."""
    import numpy as np
    from dmdr_train.data.pairs import Pairs, check_pairs, made_with
    from dmdr_train.recipe.load import load_recipe
    from safetensors.numpy import save

    settings = load_recipe("demo-sdxl")
    rows = np.zeros((2, 4, 8, 8), np.float32)
    shape = list(rows.shape[1:])
    made = {**made_with(settings.model), "tensors": {"noise": shape, "x0": shape}}

    def read(example: tuple[bytes, bytes], folder: Path) -> None:
        content, prompts = example
        shard = save({"noise": rows, "x0": rows}, {"prompts": prompts.decode(errors="ignore")})
        entry = {"pairs": 2, "bytes": len(shard), "sha256": "0" * 64}
        (folder / "shard-00.safetensors").write_bytes(shard)
        (folder / "manifest.json").write_bytes(content.replace(b'"ENTRY"', as_json(entry)))
        given = settings.data.model_copy(update={"pairs": str(folder)})
        check_pairs(settings.model_copy(update={"data": given}))
        found = Pairs(folder, (4, 8, 8), 2)
        assert len(found.prompts) == len(found.places)

    manifest = {**made, "shards": {"shard-00.safetensors": "ENTRY"}, "pairs": 2}
    right = st.just(as_json(manifest)), st.just(b'["a", "b"]')
    return st.tuples(right[0] | texts(manifest, as_json), right[1] | texts(["a", "b"], as_json)), read


def run() -> Target:
    """The rows and scores that a resumed run finds in its folder beside its checkpoints."""
    from dmdr_train.evaluation.scores import read_scores
    from dmdr_train.recipe.load import load_recipe
    from dmdr_train.reporting.summary import early_warning
    from dmdr_train.tracking.metrics_file import Rows, read_metrics

    settings = load_recipe("demo")
    row = {"step": 30, "loss/refl": 0.5, "watch/diversity": 0.1, "watch/teacher/diversity": 0.4}
    scores = dict.fromkeys(("frechet", "precision", "recall", "accuracy", "frechet_pixels"), 0.5)
    scores = {"joint": {"name": "joint", **scores, "inception": None, "more": {"reward": 1.0}}}

    def read(example: tuple[bytes, bytes], folder: Path) -> None:
        (folder / "metrics.jsonl").write_bytes(as_json(row) + b"\n" + example[0] + b"\n" + as_json({**row, "step": 60}))
        (folder / "evaluation.json").write_bytes(example[1])
        assert read_metrics(folder)[0]["step"] == 30
        early_warning(folder, settings)
        with redirect_stderr(io.StringIO()):
            Rows(folder / "metrics.jsonl").drop_after(100)
        assert all(isinstance(found.frechet, float) for found in read_scores(folder).values())

    return st.tuples(texts(row, as_json), st.just(as_json(scores)) | texts(scores, as_json)), read


def checkpoint() -> Target:
    """The manifest and the recipe of a checkpoint from which a run resumes."""
    from dmdr_rewards.base.safe_reading import from_json
    from dmdr_train.base.atomic_files import fingerprint
    from dmdr_train.checkpoint.find import find_checkpoint
    from dmdr_train.checkpoint.manifest import ALWAYS, read_manifest, signed
    from dmdr_train.recipe.load import dump_recipe, load_recipe

    settings = load_recipe("demo-t2i")
    tree = settings.model_dump(mode="json")
    manifest = {
        "step": 3, "world_size": 1, "weights": {"refl": [0.0, 1.5]}, "versions": {"torch": "2.10"},
        "files": {name: {} for name in ALWAYS},
    }  # fmt: skip

    def read(example: tuple[str, bytes], folder: Path) -> None:
        path = folder / "step-00000003"
        path.mkdir()
        for name in ALWAYS:
            (path / name).write_bytes(b"weights")
        (path / "recipe.yaml").write_text(dump_recipe(settings), encoding="utf-8")
        name, content = example
        if name == "recipe.yaml":  # an attacker may sign the changed file
            (path / name).write_bytes(content)
        made_of = {name: fingerprint(path / name) for name in manifest["files"]}
        (path / "manifest.json").write_bytes(as_json(signed({**manifest, "files": made_of})))
        if name == "manifest.json":
            (path / name).write_bytes(sign_again(content, made_of) if b"FILES" in content else content)
        run = {"resume": str(path), "output": str(folder / "run")}
        found = find_checkpoint(settings.model_copy(update={"run": settings.run.model_copy(update=run)}), len)
        assert found == path
        assert isinstance(read_manifest("run.resume", path)["step"], int)

    def sign_again(content: bytes, made_of: dict[str, Any]) -> bytes:
        content = content.replace(b'"FILES"', as_json(made_of))
        try:
            found = from_json(content)
        except ValueError:
            return content
        return as_json(signed(found)) if isinstance(found, dict) else content

    manifests = st.tuples(st.just("manifest.json"), texts({**manifest, "files": "FILES"}, as_json))
    return manifests | st.tuples(st.just("recipe.yaml"), texts(tree, as_yaml)), read


def model() -> Target:
    """A model's folder and an adapter, up to the checks before torch is imported."""
    from dmdr_models import registry
    from dmdr_models.folder.checks import check_adapter
    from dmdr_models.folder.contents import describe
    from dmdr_train.base.errors import naming

    home = Path(recipe_base()["model"]["path"])
    files = [path for path in home.rglob("*") if path.is_file()]
    names = [str(path.relative_to(home)) for path in files if path.suffix == ".json" and "tokenizer" not in path.name]
    network = "transformer/diffusion_pytorch_model.safetensors"
    adapter = {"adapter_config.json": {"peft_type": "LORA", "r": 4}, "adapter_model.safetensors": ADAPTER}
    index = {"metadata": {}, "weight_map": {"a": "shard.safetensors"}}
    content = {
        **{name: texts(json.loads((home / name).read_bytes()), as_json) for name in names},
        f"{network}.index.json": texts(index, as_json),
        network: texts(ADAPTER, as_safetensors),
        "adapter_config.json": texts(adapter["adapter_config.json"], as_json),
        "adapter_model.safetensors": texts(ADAPTER, as_safetensors),
    }

    def read(example: tuple[str, bytes], folder: Path) -> None:
        for path in files:
            target = folder / path.relative_to(home)
            target.parent.mkdir(exist_ok=True)
            target.symlink_to(path)
        (folder / "adapter_config.json").write_bytes(as_json(adapter["adapter_config.json"]))
        (folder / "adapter_model.safetensors").write_bytes(as_safetensors(ADAPTER))
        (folder / example[0]).unlink(missing_ok=True)
        (folder / example[0]).write_bytes(example[1])
        with naming("--model"):
            describe(registry.find("sd3"), folder, resolution=32)
            check_adapter(folder, None)

    return st.one_of(st.tuples(st.just(name), each) for name, each in content.items()), read


ADAPTER = {
    f"base_model.model.to_q.{side}.weight": {"dtype": "F32", "shape": [1, 1], "data_offsets": [0, 4]}
    for side in ("lora_A", "lora_B")
}


def as_safetensors(header: Any) -> bytes:
    text = as_json(header)
    return len(text).to_bytes(8, "little") + text + bytes(8)


ROW = {
    "file_name": "a.png", "prompt": "a cat", "label": None, "clip": 0.5, "total": 0.5, "error": None,
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
    text = b"file_name,prompt,label,clip,total,error,dtype,clip.sha256\na.png,a cat,,0.5,0.5,,float32,00\n"
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


def as_list(tree: Any) -> list[Any]:
    return tree if isinstance(tree, list) else [tree]


def parquet(rows: Sequence[dict[str, Any]]) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(list(rows)), sink)
    return sink.getvalue().to_pybytes()


TARGETS: dict[str, Callable[[], Target]] = {
    "recipe": recipe,
    "override": override,
    "prompts": prompts,
    "opened-prompts": opened_prompts,
    "embeddings": embeddings,
    "pairs": pairs,
    "run": run,
    "checkpoint": checkpoint,
    "model": model,
    "scores": scores,
    "tables": tables,
}


def fuzz(name: str, examples: int, number: int | None = None) -> Counter[str]:
    """Run a target on a number of examples; return how many were read and how many were refused.

    Args:
        number: the seed; without a seed the examples are the same each time.
    """
    from dmdr_rewards.base import errors as score_errors
    from dmdr_train.base import errors as train_errors

    refusals = (train_errors.UserError, score_errors.UserError)
    strategy, read = TARGETS[name]()
    outcomes: Counter[str] = Counter()

    @settings(
        max_examples=examples,
        deadline=None,
        derandomize=number is None,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.shrink],
    )
    @given(strategy)
    def try_it(example: Any) -> None:
        with tempfile.TemporaryDirectory() as root:
            folder, bystander = Path(root) / "in" / "side", Path(root) / "outside"
            folder.mkdir(parents=True)
            bystander.write_text("untouched")
            try:
                read(example, folder)
                outcomes["read"] += 1
            except refusals:
                outcomes["refused"] += 1
            assert bystander.read_text() == "untouched"

    (try_it if number is None else seed(number)(try_it))()
    return outcomes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"any of {', '.join(TARGETS)} (default: all)")
    parser.add_argument("--examples", type=int, default=1000, help="number for each target (default: 1000)")
    parser.add_argument("--seed", type=int, help="seed (default: a new one each time)")
    options = parser.parse_args()
    number = options.seed if options.seed is not None else random.SystemRandom().randrange(1 << 32)
    for name in options.targets or TARGETS:
        if name not in TARGETS:
            parser.error(f"no target {name}; valid are {', '.join(TARGETS)}")
        outcomes = fuzz(name, options.examples, number)
        print(f"{name}: {outcomes['read']} read, {outcomes['refused']} refused in one line, seed {number}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
