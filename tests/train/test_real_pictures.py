"""Real pictures as latents: what `dmdr-train pictures` writes, and what a discriminator draws from it."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import dmdr_models
import pytest
import torch
import yaml
from dmdr_models import tiny
from dmdr_models.folder.fingerprints import content_fingerprint
from dmdr_train.base.errors import UserError
from dmdr_train.base.random_draws import Draws, named_generator
from dmdr_train.checkpoint.input_fingerprints import fingerprints
from dmdr_train.cli import main
from dmdr_train.data.real_pictures import RealPictures, check_pictures
from dmdr_train.data.shard_folder import MANIFEST
from dmdr_train.problems import scenes
from dmdr_train.problems.shapes import drawing
from dmdr_train.recipe.load import load_recipe
from dmdr_train.recipe.schema import Recipe
from dmdr_train.run import preflight
from dmdr_train.run.build import build
from dmdr_train.training.encode_pictures import encode_pictures
from PIL import Image
from safetensors.torch import load_file

ADVERSARIAL = [{"kind": "distribution_matching"}, {"kind": "adversarial", "weight": 0.5}]
STORED = {"ratio": 1, "discriminator": {"teacher_steps": None, "width": 8}}


@pytest.fixture(scope="module")
def settings(make_recipe: Callable[..., Recipe], model: Path) -> Callable[..., Recipe]:
    def settings(**changes: Any) -> Recipe:
        return make_recipe(**{"model__path": str(model), **changes})

    return settings


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven pictures of two sizes, in ten folders of classes, some of which are empty."""
    folder = tmp_path_factory.mktemp("images")
    generator = torch.Generator().manual_seed(0)
    for label in range(10):
        (folder / f"class-{label}").mkdir()
    for number, label in enumerate((0, 0, 3, 3, 3, 9, 9)):
        pixels = torch.randint(256, (3, 32 + 8 * (number % 2), 32), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(folder / f"class-{label}/{number}.png")
    return folder


@pytest.fixture(scope="module")
def encoded(settings: Callable[..., Recipe], images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The seven pictures in shards of four, encoded three at a time; tests must not change them."""
    folder = tmp_path_factory.mktemp("encoded") / "pictures"
    encode_pictures(settings(), folder, str(images), batch_size=3, shard_size=4)
    return folder


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


# -- what is written


def test_a_row_is_the_mean_of_the_vaes_latents(encoded: Path, images: Path, model: Path) -> None:
    """The picture of 40 x 32 loses four rows at the top and at the bottom."""
    family = dmdr_models.load("sit", model)
    vae: Any = family.vae  # type: ignore[attr-defined]
    with Image.open(images / "class-3/3.png") as picture:
        pixels = torch.tensor(list(picture.get_flattened_data())).view(40, 32, 3)[4:36].permute(2, 0, 1) / 255
    with torch.no_grad():
        mean = vae.encode(pixels[None] * 2 - 1).latent_dist.mean[0]
    shard = load_file(encoded / "shard-00000000-00000004.safetensors")
    torch.testing.assert_close(shard["x0"][3], mean * vae.config.scaling_factor, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        family.decode(family.encode(pixels[None])), family.decode(shard["x0"][3:4]), atol=1e-3, rtol=0
    )


def test_a_folder_for_each_class_gives_the_labels(encoded: Path) -> None:
    stored = RealPictures(encoded, (4, 4, 4), batch_size=3)
    assert stored.prompts == [0, 0, 3, 3, 3, 9, 9]
    manifest = json.loads((encoded / MANIFEST).read_text())
    assert (manifest["family"], manifest["resolution"], manifest["pictures"]) == ("sit", 32, 7)


def test_each_is_drawn_once_in_an_epoch_with_its_own_prompt(encoded: Path) -> None:
    pictures = RealPictures(encoded, (4, 4, 4), batch_size=7)
    prompts, latents = pictures.real(Draws(7, ("generator", 0), range(7)))
    rows = torch.cat([load_file(path)["x0"] for path in sorted(encoded.glob("shard-*"))])
    order = torch.randperm(7, generator=named_generator(7, "prompts", "generator", 0)).tolist()
    assert torch.equal(latents, rows[order])
    assert prompts == [[0, 0, 3, 3, 3, 9, 9][row] for row in order]


def test_batches_shards_and_processes_do_not_matter(
    settings: Callable[..., Recipe], images: Path, encoded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two processes write two shards, and the second call writes what is missing."""
    folder = tmp_path / "pictures"
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        encode_pictures(settings(), folder, str(images), batch_size=3, shard_size=4)
    assert content(folder) == content(encoded)
    monkeypatch.setenv("WORLD_SIZE", "1")
    (folder / "shard-00000004-00000007.safetensors").write_bytes(b"damaged")
    encode_pictures(settings(), folder, str(images), batch_size=1, shard_size=4)
    found, before = (
        RealPictures(each, (4, 4, 4), 7).real(Draws(7, ("generator", 0), range(7)))[1] for each in (folder, encoded)
    )
    torch.testing.assert_close(found, before, rtol=1e-4, atol=1e-5)


def test_a_count_chooses_among_all_classes(settings: Callable[..., Recipe], images: Path, tmp_path: Path) -> None:
    """Which four of the seven depends on the seed alone; the first four would be of two classes."""
    seen = set()
    for seed in range(6):
        folder = tmp_path / str(seed)
        encode_pictures(settings(run__seed=seed), folder, str(images), count=4)
        seen.add(tuple(RealPictures(folder, (4, 4, 4), 4).prompts))
    assert all(len(labels) == 4 for labels in seen)
    assert any(9 in labels for labels in seen)
    assert len(seen) > 1


def test_a_picture_that_changed_is_noticed(settings: Callable[..., Recipe], images: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(images, tmp_path / "images"))
    encode_pictures(settings(), tmp_path / "pictures", str(copy))
    shutil.copy(images / "class-0/1.png", copy / "class-0/0.png")  # of another size
    with pytest.raises(UserError, match=r"^--output: .* was made with images .*, not .*; give another folder"):
        encode_pictures(settings(), tmp_path / "pictures", str(copy))


def test_the_built_in_problems_are_drawn(settings: Callable[..., Recipe], tmp_path: Path, model: Path) -> None:
    """A picture depends on seed and number alone: number 4 by hand."""
    encode_pictures(settings(), tmp_path / "pictures", "shapes", count=5, batch_size=2)
    stored = RealPictures(tmp_path / "pictures", (4, 4, 4), batch_size=5)
    assert stored.prompts == [0, 1, 2, 3, 4]
    family = dmdr_models.load("sit", model)
    with torch.no_grad():
        expected = family.encode(drawing.draw(torch.tensor([4]), named_generator(7, "pictures", 4)))
    shard = load_file(next((tmp_path / "pictures").glob("shard-*")))
    torch.testing.assert_close(shard["x0"][4:], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("source", ["scenes", "table", "texts beside them"])
def test_a_model_of_texts_needs_prompts(
    make_recipe: Callable[..., Recipe], sd3: Path, prompts: Path, images: Path, tmp_path: Path, source: str
) -> None:
    recipe = make_recipe(model={"family": "sd3", "path": str(sd3), "max_tokens": 8}, data={"prompts": str(prompts)})
    folder = tmp_path / "pictures"
    if source == "scenes":
        encode_pictures(recipe, folder, "scenes", count=3)
        expected = scenes.training_captions()[:3]
    elif source == "table":
        table = tmp_path / "captions.csv"
        table.write_text("file_name,prompt\nclass-0/0.png,a dog\nclass-0/1.png,a cat\n")
        table.with_name("two.csv").write_text("file_name,prompt\n0.png,a dog\n1.png,a cat\n")
        with pytest.raises(UserError, match=r"^--images: class-3/2.png has no prompt; give --prompts FILE, a table"):
            encode_pictures(recipe, folder, str(images), str(table))
        assert not folder.exists()
        encode_pictures(recipe, folder, str(images / "class-0"), str(table.with_name("two.csv")))
        expected = ["a dog", "a cat"]
    else:
        (tmp_path / "one.png").write_bytes((images / "class-0/0.png").read_bytes())
        (tmp_path / "one.txt").write_text("a bird\n")
        encode_pictures(recipe, folder, str(tmp_path / "one.png"))
        expected = ["a bird"]
    assert RealPictures(folder, (16, 4, 4), 1).prompts == expected


# -- mistakes


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--images", "nothing"], "--images: nothing: no picture there; give a folder, a glob, a table or a dataset"),
        (["--images", "shapes"], "--count: is missing; say how many pictures of shapes to draw"),
        (["--images", "IMAGES", "--prompts", "no.csv"], "--prompts: no.csv: .*give one that exists"),
        (
            ["--images", "IMAGES/class-0"],
            "--images: 0.png has no class label; give a folder for each of the 10 classes",
        ),
        (
            ["--images", "IMAGES/class-0", "--prompts", "TABLE"],
            "--images: 0.png has the label 12; the model has 0 to 9",
        ),
        (["--images", "BROKEN"], "--images: 1.png cannot be read: .*; remove it"),
    ],
)
def test_mistakes_are_one_line(
    settings: Callable[..., Recipe], images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    options: list[str], said: str,
) -> None:  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(settings().model_dump(mode="json", exclude_unset=True)))
    (tmp_path / "table.csv").write_text("file_name,label\n0.png,12\n1.png,3\n")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/1.png").write_bytes(b"no picture")
    (tmp_path / "broken/1.txt").write_text("3")
    places = {"IMAGES": str(images), "TABLE": str(tmp_path / "table.csv"), "BROKEN": str(tmp_path / "broken")}
    for name, place in places.items():
        options = [option.replace(name, place) for option in options]
    with pytest.raises(SystemExit) as stopped:
        main(["pictures", "--config", str(tmp_path / "recipe.yaml"), "-o", str(tmp_path / "out"), *options])
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert stopped.value.code == 2
    assert len(lines) == 1
    assert re.match(f"error: {said}", lines[0]), lines[0]
    assert not list((tmp_path / "out").glob("shard-*"))


def test_preflight(
    settings: Callable[..., Recipe], encoded: Path, images: Path, tmp_path: Path, make_recipe: Callable[..., Recipe]
) -> None:
    def with_pictures(folder: Path, **changes: Any) -> Recipe:
        return settings(objectives=ADVERSARIAL, guidance=STORED, data={"pictures": str(folder)}, **changes)

    preflight.check(with_pictures(encoded, run__output=str(tmp_path / "out")), 1)
    assert fingerprints(with_pictures(encoded))["data.pictures"] == content_fingerprint(encoded)
    with pytest.raises(UserError, match=r"^data.pictures: gone holds no manifest.json"):
        preflight.check(with_pictures(Path("gone"), run__output=str(tmp_path / "out")), 1)
    with pytest.raises(
        UserError, match=r"^data.pictures: gone holds no manifest.json; give a folder that dmdr-train pi"
    ):
        check_pictures(with_pictures(Path("gone")))
    with pytest.raises(UserError, match=r"^data.pictures: .* was made with resolution 32, not 64"):
        check_pictures(with_pictures(encoded, model__resolution=64))
    other = tiny.sit(tmp_path / "other", seed=1)
    with pytest.raises(UserError, match=r"^data.pictures: .* was made with vae "):
        check_pictures(with_pictures(encoded, model__path=str(other)))
    with pytest.raises(UserError, match=r"^--output: .* was made with images .*, not .*; give another folder"):
        encode_pictures(settings(), encoded, str(images), count=3)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"guidance": {"discriminator": {}}},
            "data.pictures: has no effect without a guidance.discriminator whose teach",
        ),
        (
            {"objectives": ADVERSARIAL[:1], "guidance": {}},
            "data.pictures: has no effect without a guidance.discriminator",
        ),
        (
            {"model__resolution": [{"height": 32, "width": 64}, {"height": 64, "width": 32}]},
            "guidance.discriminator.teacher_steps: is null, and real samples on disk have",
        ),
    ],
)
def test_keys_that_do_not_go_together(settings: Callable[..., Recipe], changes: dict[str, Any], said: str) -> None:
    basis = {"objectives": ADVERSARIAL, "guidance": STORED, "data": {"pictures": "pictures"}}
    with pytest.raises(ValueError, match=said):
        settings(**{**basis, **changes})


def test_prompts_without_an_embedding_are_told_before_the_run(encoded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache holds all labels but one."""
    from dmdr_train.data import embedding_cache

    monkeypatch.setattr(embedding_cache, "EmbeddingCache", lambda folder: [0, 9])
    data = SimpleNamespace(pictures=str(encoded), embeddings="cache")
    manifest = json.loads((encoded / MANIFEST).read_text())
    monkeypatch.setattr("dmdr_train.data.real_pictures.made_with", lambda model: {"vae": manifest["vae"]})
    recipe: Any = SimpleNamespace(data=data, model=SimpleNamespace(sizes=[]))
    with pytest.raises(
        UserError, match=r"^data.pictures: .* has the prompt 3, which is not in data.embeddings cache; "
    ):
        check_pictures(recipe)


# -- in a run


@pytest.mark.usefixtures("one_process")
def test_the_discriminator_learns_from_them(settings: Callable[..., Recipe], encoded: Path) -> None:
    recipe = settings(objectives=ADVERSARIAL, guidance=STORED, data={"pictures": str(encoded)})
    trainer = build(recipe, torch.device("cpu"))
    seen = []
    discriminator: Any = trainer.guide.discriminator
    real = discriminator.real
    discriminator.real = lambda sample: seen.append(real(sample)) or seen[-1]
    logged = trainer.train_step()
    assert "loss/discriminator" in logged
    [(latents, condition)] = seen
    prompts, expected = RealPictures(encoded, (4, 4, 4), 4).real(Draws(7, ("generator", 0), range(4)))
    assert torch.equal(latents, expected)
    assert condition["class_labels"].tolist() == prompts


def test_a_relative_folder_is_found_beside_the_recipe(
    settings: Callable[..., Recipe], encoded: Path, tmp_path: Path
) -> None:
    shutil.copytree(encoded, tmp_path / "pictures")
    recipe = settings(objectives=ADVERSARIAL, guidance=STORED, data={"pictures": "pictures"})
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe.model_dump(mode="json", exclude_unset=True)))
    assert load_recipe(str(tmp_path / "recipe.yaml")).data.pictures == str(tmp_path / "pictures")
