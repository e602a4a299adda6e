"""The cache of embeddings: the numbers of encoding on the spot, whole or not there, and never another model's."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import pytest
import safetensors.torch
import torch
import yaml
from dmdr_train.base.errors import UserError
from dmdr_train.base.random_draws import named_generator
from dmdr_train.cli import main
from dmdr_train.data import shard_folder
from dmdr_train.data.embedding_cache import EmbeddingCache, cache_folder, check_embeddings, prepare, prompt_hash
from dmdr_train.data.encode import plan, write_cache
from dmdr_train.data.prompt_files import evaluation_prompts
from dmdr_train.data.shard_folder import MANIFEST
from dmdr_train.recipe.load import load_recipe
from dmdr_train.recipe.schema import Recipe
from dmdr_train.run import preflight
from torch import Tensor

TEXTS = [f"a picture of {i} things" for i in range(23)]
MADE = {"format": 1, "family": "stub", "max_tokens": 5, "text_encoders": "abc", "dtype": "fp32"}


class Encoder:
    """Numbers that depend on the prompt alone; it counts what it is asked, and can be made to fail."""

    def __init__(self, fails_after: int = 10**9):
        self.asked: list[str] = []
        self.fails_after = fails_after

    def __call__(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        if len(self.asked) + len(prompts) > self.fails_after:
            raise KeyboardInterrupt
        self.asked += prompts
        draws = [named_generator(0, prompt) for prompt in prompts]
        return {
            "encoder_hidden_states": torch.stack([torch.randn(3, 4, generator=g) for g in draws]),
            "pooled_projections": torch.stack([torch.randn(2, generator=g) for g in draws]),
            "lengths": torch.tensor([len(prompt) for prompt in prompts]),
        }


def texts(prompts: Sequence[str] = TEXTS) -> datasets.Dataset:
    return datasets.Dataset.from_dict({"prompt": [*prompts, ""]})


def begin(folder: Path) -> Path:
    folder.mkdir()
    (folder / MANIFEST).write_text(json.dumps(MADE | {"shards": {}}))
    return folder


def write(folder: Path, encoder: Any = None, prompts: Sequence[str] = TEXTS, **options: Any) -> Path:
    """A cache in shards of five prompts, encoded three at a time."""
    if not folder.exists():
        begin(folder)
    options = {"dtype": torch.float32, "batch_size": 3, "shard_size": 5, **options}
    write_cache(folder, texts(prompts), encoder or Encoder(), **options)
    return folder


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name], value), name


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished cache; tests must not change it."""
    return write(tmp_path_factory.mktemp("cache") / "cache")


# -- what is in it


def test_it_holds_what_encoding_gives(cache: Path) -> None:
    asked = [TEXTS[17], "", TEXTS[2], TEXTS[17], *TEXTS]
    assert_equal(EmbeddingCache(cache)(asked), Encoder()(asked))
    assert len(EmbeddingCache(cache)) == 24
    assert all(text in EmbeddingCache(cache) for text in asked)
    assert "a text of no row" not in EmbeddingCache(cache)


def test_it_casts_numbers_only(cache: Path, tmp_path: Path) -> None:
    expected = {name: t.bfloat16() if t.is_floating_point() else t for name, t in Encoder()(TEXTS).items()}
    assert_equal(EmbeddingCache(cache, dtype=torch.bfloat16)(TEXTS), expected)
    half = write(tmp_path / "half", dtype=torch.bfloat16)
    assert_equal(EmbeddingCache(half)(TEXTS), expected)
    widened = EmbeddingCache(half, "cpu", torch.float32)(TEXTS)
    assert torch.equal(widened["pooled_projections"], expected["pooled_projections"].float())


def test_white_space_around_a_prompt_is_no_part_of_it(cache: Path, tmp_path: Path) -> None:
    assert_equal(EmbeddingCache(cache)([f" {TEXTS[3]}\n"]), Encoder()([TEXTS[3]]))
    encoder = Encoder()
    write(tmp_path / "cache", encoder, [" a\r", "a", "a "])
    assert sorted(encoder.asked[1:]) == ["", "a"]  # the first one asks for the size of an embedding


def test_an_unknown_prompt_is_named(cache: Path) -> None:
    for unknown in ("a dog", "zebra", TEXTS[0].upper()):
        with pytest.raises(ValueError, match=f"prompt '{unknown}' is not in .*add it with dmdr-train encode -o"):
            EmbeddingCache(cache)([TEXTS[0], unknown])


def test_the_manifest_tells_what_is_there(cache: Path) -> None:
    manifest = json.loads((cache / MANIFEST).read_text())
    assert MADE.items() <= manifest.items()
    assert manifest["prompts"] == 24
    assert manifest["tensors"] == {
        "encoder_hidden_states": [3, 4],
        "hash": [],
        "lengths": [],
        "pooled_projections": [2],
    }
    assert {path.name for path in cache.iterdir()} == {MANIFEST, *manifest["shards"]}
    assert sorted(entry["prompts"] for entry in manifest["shards"].values()) == [4, 5, 5, 5, 5]
    for name, entry in manifest["shards"].items():
        hashed = subprocess.run(["sha256sum", cache / name], capture_output=True, text=True, check=True).stdout
        assert (cache / name).stat().st_size == entry["bytes"]
        assert hashed.split()[0] == entry["sha256"]


def test_hashes_are_pinned() -> None:
    """A change of these numbers makes every cache that was written unreadable."""
    assert (prompt_hash(""), prompt_hash("a cat")) == (-5426141060434712860, -6711169336525982361)


# -- how it is written


def test_each_prompt_is_encoded_once(tmp_path: Path) -> None:
    encoder = Encoder()
    write(tmp_path / "cache", encoder, [*TEXTS, *TEXTS[::-1], TEXTS[4]])
    assert encoder.asked[1:] == [*TEXTS, ""]  # in the order of the file


@pytest.mark.parametrize("world", [2, 3, 7])
def test_several_processes_write_what_one_writes(tmp_path: Path, cache: Path, world: int) -> None:
    encoders = [Encoder() for _ in range(world)]
    for rank in reversed(range(world)):
        assert not (tmp_path / "cache").exists() or cache_folder("", tmp_path / "cache").manifest()["shards"] == {}
        write(tmp_path / "cache", encoders[rank], rank=rank, world=world)
    assert content(tmp_path / "cache") == content(cache)
    asked = [prompt for encoder in encoders for prompt in encoder.asked[1:]]
    assert sorted(asked) == sorted([*TEXTS, ""])


@pytest.mark.parametrize("after", [1, 2, 7, 12, 24])
def test_an_interrupted_run_goes_on(tmp_path: Path, cache: Path, after: int) -> None:
    encoder = Encoder(fails_after=after)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "cache", encoder)
    left = content(tmp_path / "cache")
    assert all(left[name] == content(cache)[name] for name in left if name != MANIFEST)  # whole, or not there
    (tmp_path / "cache/.shard-1.safetensors.123.partial").write_bytes(b"left by a process that was killed")
    again = Encoder()
    write(tmp_path / "cache", again)
    assert content(tmp_path / "cache") == content(cache)
    assert len(again.asked) - 1 == 24 - 5 * (len(left) - 1)


def test_a_file_that_was_being_written_is_not_seen(tmp_path: Path, cache: Path, monkeypatch: Any) -> None:
    def broken_save(tensors: dict[str, Tensor], path: Path, **texts: Any) -> None:
        path.write_bytes(b"half a shard")
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(safetensors.torch, "save_file", broken_save)
        with pytest.raises(OSError, match="no space left"):
            write(tmp_path / "cache")
    assert list(content(tmp_path / "cache")) == [MANIFEST]
    assert content(write(tmp_path / "cache")) == content(cache)


def test_new_prompts_become_new_shards(tmp_path: Path) -> None:
    folder = write(tmp_path / "cache", prompts=TEXTS[:12])
    before, encoder = content(folder), Encoder()
    write(folder, encoder)
    after = content(folder)
    assert sorted(encoder.asked[1:]) == sorted(TEXTS[12:])
    assert all(after[name] == before[name] for name in before if name != MANIFEST)
    assert cache_folder("", folder).manifest()["prompts"] == 24
    assert_equal(EmbeddingCache(folder)([*TEXTS, ""]), Encoder()([*TEXTS, ""]))


def test_a_cache_that_holds_everything_is_left_alone(tmp_path: Path, cache: Path) -> None:
    folder = Path(shutil.copytree(cache, tmp_path / "cache"))
    encoder = Encoder()
    write(folder, encoder, TEXTS[3:9])
    assert encoder.asked == []
    assert content(folder) == content(cache)


@pytest.mark.parametrize("damage", ["missing", "cut"])
def test_a_damaged_shard_is_made_again(tmp_path: Path, cache: Path, damage: str) -> None:
    folder = Path(shutil.copytree(cache, tmp_path / "cache"))
    shard = next(folder.glob("shard-*"))
    if damage == "cut":
        shard.write_bytes(shard.read_bytes()[:-1])
    else:
        shard.unlink()
    assert content(write(folder)) == content(cache)


def test_a_plan_changes_nothing(tmp_path: Path, cache: Path) -> None:
    folder = Path(shutil.copytree(cache, tmp_path / "cache"))
    shard = next(folder.glob("shard-*"))
    shard.write_bytes(b"damaged")
    before = content(folder)
    (rows,) = plan(cache_folder("--output", folder), texts(), 5).values()
    assert len(rows) == cache_folder("--output", folder).manifest()["shards"][shard.name]["prompts"]
    assert content(folder) == before
    cache_folder("--output", folder).remove_damaged()
    assert content(folder).keys() == before.keys() - {shard.name}


def test_a_disk_that_is_too_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    with monkeypatch.context() as patch:
        patch.setattr(shard_folder.shutil, "disk_usage", lambda _: usage)
        with pytest.raises(UserError, match=r"--output: 24 prompts take 1.54e-06 GB and .* has 1e-06 GB left; give a"):
            write(tmp_path / "cache")
    assert list(content(tmp_path / "cache")) == [MANIFEST]


# -- with a real model and the real command


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny SD3, another one with other encoders, and one without any; tests must not change it."""
    from dmdr_models import tiny

    folder = tmp_path_factory.mktemp("models")
    tiny.sd3(folder / "sd3")
    tiny.sd3(folder / "other", seed=1)
    shutil.copytree(folder / "sd3", folder / "bare", ignore=shutil.ignore_patterns("text_encoder*", "tokenizer*"))
    (folder / "prompts.txt").write_text("\n".join(TEXTS))
    return folder


@pytest.fixture
def recipe_of(models: Path, make_recipe_dict: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    def make(**overrides: Any) -> dict[str, Any]:
        """The smallest recipe of a text-to-image run; overrides as in conftest.recipe_dict."""
        model = {"family": "sd3", "path": str(models / "sd3"), "max_tokens": 12}
        samples = {"prompts": ["a sample"]}
        data = {"prompts": str(models / "prompts.txt")}
        return make_recipe_dict(**{"model": model, "data": data, "tracking__samples": samples, **overrides})

    return make


@pytest.fixture
def in_folder(tmp_path: Path, recipe_of: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with recipe.yaml, and a cache of datasets that is not the user's own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", "datasets")
    Path("recipe.yaml").write_text(yaml.safe_dump(recipe_of()))
    return tmp_path


ENCODE = ["encode", "--config", "recipe.yaml"]


def test_the_command(
    models: Path, in_folder: Path, recipe_of: Callable[..., dict[str, Any]], python: Any, capfd: Any
) -> None:
    import dmdr_models

    arguments = [*ENCODE, "--dtype", "fp32", "--batch-size", "8", "-o"]
    main([*arguments, "alone"])
    everything = [*TEXTS, "a sample", *evaluation_prompts(), ""]
    said = capfd.readouterr()
    assert f"Wrote alone: {len(everything)} prompts" in said.out
    assert "prompts/s" in said.err  # the throughput

    cache, family = EmbeddingCache("alone"), dmdr_models.load("sd3", models / "sd3", max_tokens=12)
    longer = [n for n in (len(family.text.tokenizers[2](text).input_ids) for text in everything) if n > 12]
    assert (
        f"warning: prompts: {len(longer)} of {len(everything)} prompts are cut to the 12 tokens of text_encoder_3 "
        f"(model.max_tokens); the longest has {max(longer)}\n"
    ) in said.err
    for first in range(0, len(everything), 8):
        batch = everything[first : first + 8]
        assert_equal(cache(batch), dict(family.condition(batch)))
    family.text = cache
    assert_equal(dict(family.condition(TEXTS[:2])), cache(TEXTS[:2]))
    assert_equal(dict(family.null_condition(2)), cache(["", ""]))
    check_embeddings(Recipe.model_validate(recipe_of(data__embeddings="alone")))

    python("-m", "dmdr_train", *arguments, "together", folder=in_folder, processes=2).check()
    assert content(in_folder / "together") == content(in_folder / "alone")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["-o", "full/letter.txt"], "full/letter.txt is a file; give a folder"),
        (["-o", "full"], "error: --output: full holds other files; give a new folder"),
        (["-o", "new", "data.prompts=null"], "error: data.prompts: is null, so there is nothing to encode"),
        (["-o", "new", "data.prompts=gone.txt"], "error: data.prompts: no file or folder 'gone.txt'"),
        (["-o", "new", "model.path=gone"], "error: model.path: no model folder gone"),
        (["-o", "new", "--batch-size", "0"], "--batch-size: must be at least 1, got 0"),
        (["-o", "new", "--dtype", "fp16"], "--dtype: invalid choice: 'fp16'"),
        ([], "the following arguments are required: -o/--output"),
    ],
)
def test_the_command_says_what_is_wrong(
    in_folder: Path, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("full").mkdir()
    Path("full/letter.txt").write_text("dear")
    with pytest.raises(SystemExit) as caught:
        main([*ENCODE, *arguments])
    assert caught.value.code == 2
    assert said in (error := capsys.readouterr().err)
    assert error.count("\n") == 1
    assert not Path("new").exists()


# -- made with something else


@pytest.fixture
def made(tmp_path: Path, recipe_of: Callable[..., dict[str, Any]]) -> Path:
    """A finished cache for `recipe_of()`, though with the stub's numbers."""
    prepare(Recipe.model_validate(recipe_of()), tmp_path / "cache", "bf16")
    return write(tmp_path / "cache")


OTHERS = {
    "encoders": ({"model__path": "other"}, "was made with text_encoders "),
    "length": ({"model__max_tokens": 77}, "was made with max_tokens 12, not 77"),
    "usual length": ({"model__max_tokens": None}, "was made with max_tokens 12, not 128"),
}


@pytest.mark.parametrize("other", OTHERS)
def test_a_cache_of_another_kind_is_refused(
    models: Path, made: Path, recipe_of: Callable[..., dict[str, Any]], other: str
) -> None:
    changes, said = OTHERS[other]
    if "model__path" in changes:
        changes = {"model__path": str(models / "other")}
    before = content(made)
    with pytest.raises(UserError, match=f"^data.embeddings: {made} {said}"):
        check_embeddings(Recipe.model_validate(recipe_of(data__embeddings=str(made), **changes)))
    with pytest.raises(UserError, match=f"^--output: {made} {said}"):
        prepare(Recipe.model_validate(recipe_of(**changes)), made, "bf16")
    assert content(made) == before


def test_another_dtype_may_be_trained_from_and_not_added(made: Path, recipe_of: Callable[..., dict[str, Any]]) -> None:
    check_embeddings(Recipe.model_validate(recipe_of(data__embeddings=str(made), optim__precision="fp32")))
    with pytest.raises(UserError, match="was made with dtype bf16, not fp32; give another folder, or a new"):
        prepare(Recipe.model_validate(recipe_of()), made, "fp32")


def test_an_unfinished_cache_of_another_kind_is_refused(
    tmp_path: Path, recipe_of: Callable[..., dict[str, Any]]
) -> None:
    prepare(Recipe.model_validate(recipe_of()), tmp_path / "cache", "bf16")
    prepare(Recipe.model_validate(recipe_of()), tmp_path / "cache", "bf16")
    with pytest.raises(UserError, match="was made with max_tokens 12, not 13"):
        prepare(Recipe.model_validate(recipe_of(model__max_tokens=13)), tmp_path / "cache", "bf16")
    with pytest.raises(UserError, match=r"data.embeddings: .* is not finished; go on with dmdr-train encode -o"):
        check_embeddings(Recipe.model_validate(recipe_of(data__embeddings=str(tmp_path / "cache"))))


def test_a_model_without_text_encoders(
    models: Path, tmp_path: Path, made: Path, recipe_of: Callable[..., dict[str, Any]]
) -> None:
    bare = {"model__path": str(models / "bare")}
    check_embeddings(Recipe.model_validate(recipe_of(data__embeddings=str(made), **bare)))
    with pytest.raises(UserError, match=r"model.path: .*bare holds no text_encoder"):
        prepare(Recipe.model_validate(recipe_of(**bare)), tmp_path / "new", "bf16")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda folder: shutil.rmtree(folder), "holds no manifest.json; give a folder that dmdr-train encode wrote"),
        (lambda folder: (folder / MANIFEST).write_text("{"), "manifest.json is damaged"),
        (lambda folder: (folder / MANIFEST).write_text("[]"), "manifest.json is damaged"),
        (lambda folder: (folder / MANIFEST).write_text('{"shards": 3}'), "manifest.json is damaged"),
        (
            lambda folder: next(folder.glob("shard-*")).unlink(),
            "is missing or damaged; repair it with dmdr-train encod",
        ),
        (lambda folder: next(folder.glob("shard-*")).write_bytes(b"x"), "is missing or damaged"),
    ],
)
def test_a_damaged_cache(
    made: Path, recipe_of: Callable[..., dict[str, Any]], change: Callable[[Path], Any], said: str
) -> None:
    change(made)
    with pytest.raises(UserError, match=f"^data.embeddings: .*{said}"):
        check_embeddings(Recipe.model_validate(recipe_of(data__embeddings=str(made))))


def test_the_check_imports_no_torch(made: Path, recipe_of: Callable[..., dict[str, Any]]) -> None:
    program = (
        "import sys; from dmdr_train.data.embedding_cache import check_embeddings\n"
        "from dmdr_train.recipe.schema import Recipe\n"
        f"check_embeddings(Recipe.model_validate({recipe_of(data__embeddings=str(made))}))\n"
        "print(*{'torch', 'datasets', 'diffusers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "\n"


def test_the_manual(in_folder: Path) -> None:
    """docs/data.md: its recipe section and its commands, on the tiny model."""
    manual = (Path(__file__).parents[2] / "docs/data.md").read_text(encoding="utf-8")
    section, commands = (re.search(rf"```{kind}\n(.*?)```", manual, re.DOTALL)[1] for kind in ("yaml", "bash"))
    recipe = yaml.safe_load(Path("recipe.yaml").read_text())
    shutil.copy(recipe["data"]["prompts"], "prompts.txt")
    Path("recipe.yaml").write_text(yaml.safe_dump(recipe | yaml.safe_load(section)))
    encoding, training = (shlex.split(line) for line in commands.splitlines())
    assert encoding[0] == "dmdr-train"
    main(encoding[1:])
    assert training[1] == "packages/dmdr-train/run.py"
    settings = load_recipe(training[3], training[4:])
    preflight.check(settings, world=1)
    assert len(EmbeddingCache(settings.data.embeddings or "")) == 89
