"""Recipes, prompts, caches, pairs, runs and checkpoints."""

import io
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import yaml
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from fuzzing.examples import (
    VALUES,
    Target,
    as_json,
    as_yaml,
    changed,
    damaged,
    parquet,
    texts,
)


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

    base = recipe_base()
    base["model"]["resolution"] = [{"height": 32, "width": 32, "share": 0.75}, {"height": 16, "width": 64}]
    return texts(base, as_yaml), read


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
