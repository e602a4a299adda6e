"""Pictures that are not square, and training at several sizes."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from dmdr_train.base.errors import UserError
from dmdr_train.base.random_draws import Draws
from dmdr_train.data.pairs import Pairs, check_pairs
from dmdr_train.data.shard_folder import MANIFEST
from dmdr_train.evaluation.check import check_evaluation
from dmdr_train.evaluation.sample_sheets import draw_samples, pictures
from dmdr_train.evaluation.seeded_sampling import SamplingPlan
from dmdr_train.recipe import schema
from dmdr_train.recipe.load import apply_override, dump_recipe, from_yaml, parse_recipe
from dmdr_train.recipe.picture_sizes import Size
from dmdr_train.recipe.schema import Recipe
from dmdr_train.reporting.model_card import trained_sizes
from dmdr_train.run import preflight, runner
from dmdr_train.run.build import build
from dmdr_train.training import rollouts
from dmdr_train.training.make_pairs import make_pairs
from dmdr_train.training.networks import load_family
from dmdr_train.training.reward_view import View
from dmdr_train.training.trainer import Trainer
from dmdr_train.training.update_size import update_size

CPU = torch.device("cpu")
SIZES = [Size(32, 32, 0.5), Size(16, 48, 0.375), Size(48, 16, 0.125)]
LIST = [{"height": 32, "width": 32, "share": 4}, {"height": 16, "width": 48, "share": 3}, {"height": 48, "width": 16}]


# -- the recipe


@pytest.mark.parametrize(
    ("given", "sizes"),
    [
        ("null", []),
        ("1024", [Size(1024, 1024)]),
        ("{height: 832, width: 1216}", [Size(832, 1216)]),
        (json.dumps(LIST), SIZES),
        ("[{height: 64, width: 32}, {height: 32, width: 64}]", [Size(64, 32, 0.5), Size(32, 64, 0.5)]),
    ],
)
def test_forms(make_recipe_dict: Callable[..., dict[str, Any]], given: str, sizes: list[Size]) -> None:
    data = make_recipe_dict()
    apply_override(data, f"model.resolution={given}")
    recipe = parse_recipe(data)
    assert recipe.model.sizes == sizes
    assert parse_recipe(from_yaml(dump_recipe(recipe))) == recipe


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ("0", "model.resolution: should be greater than or equal to 1, got 0"),
        ("wide", "model.resolution: should be a valid integer, unable to parse string as an integer, got 'wide'"),
        ("true", "model.resolution: should be a number, got True"),
        ("[]", "model.resolution: List should have at least 1 item after validation, not 0, got []"),
        ("{height: 832}", "model.resolution.width: is required; add it to the recipe or give key=value"),
        ("{height: 832, width: true}", "model.resolution.width: should be a number, got True"),
        ("{height: 832, with: 8}", "model.resolution.with: unknown key; did you mean model.resolution.width?"),
        ("[{height: 8, width: 8, share: 0}]", "model.resolution.0.share: should be greater than 0, got 0"),
        (
            "[{height: 8, width: 16}, {height: 8, width: 8}, {height: 8, width: 16}]",
            "model.resolution: 8x16 (height x width) comes twice; leave one out, and add up the shares",
        ),
    ],
)
def test_mistakes(make_recipe_dict: Callable[..., dict[str, Any]], given: str, line: str) -> None:
    data = make_recipe_dict()
    apply_override(data, f"model.resolution={given}")
    with pytest.raises(UserError) as caught:
        parse_recipe(data)
    assert str(caught.value) == line


def test_pairs_have_one_size(make_recipe_dict: Callable[..., dict[str, Any]]) -> None:
    data = make_recipe_dict(data={"pairs": "pairs"}, objectives=[{"kind": "regression"}], model__resolution=LIST)
    with pytest.raises(UserError, match=r"model.resolution: has 3 sizes and regression learns from pairs of one; give"):
        parse_recipe(data)


def test_preflight_checks_every_size(make_recipe: Callable[..., Recipe], sd3: Path, sdxl: Path, model: Path) -> None:
    def check(family: str, path: Path, resolution: Any) -> None:
        preflight.check_model(make_recipe(model={"family": family, "path": str(path), "resolution": resolution}))

    check("sd3", sd3, LIST)
    check("sit", model, 32)
    for family, path, resolution, line in (
        ("sd3", sd3, [LIST[0], {"height": 32, "width": 72}], "resolution 72 is not a multiple of 16 .*: give 64"),
        ("sd3", sd3, {"height": 32, "width": 144}, "resolution 144 is not in 16 to 128, which .*: give 128"),
        ("sdxl", sdxl, [LIST[0], {"height": 37, "width": 64}], "resolution 37 is not a multiple of 8 .*: give 40"),
        ("sit", model, {"height": 32, "width": 64}, "resolution 32x64: this sit model draws 32 pixels only; leave it"),
        ("sit", model, LIST, "resolution 16x48: this sit model draws 32 pixels only; leave it out"),
    ):
        with pytest.raises(UserError, match=f"^model.resolution: {line}"):
            check(family, path, resolution)
        # A name on the hub is only checked when its configs are read.
        recipe = make_recipe(model={"family": family, "path": str(path), "resolution": resolution})
        with pytest.raises(UserError, match=f"^model.resolution: {line}"):
            load_family(recipe)


def test_scenes_have_their_own_size(settings: Callable[..., Recipe], classifier: Path) -> None:
    def check(*sizes: Any) -> None:
        evaluation = {"reference": "scenes", "classifier": str(classifier)}
        evaluated = settings(tracking={"evaluation": evaluation}, model__resolution=list(sizes) or None)
        check_evaluation(evaluated, None)

    check()
    check(*LIST)
    line = "^tracking.evaluation.reference: scenes are 32 pixels high and wide, .* starts with 16x48; leave"
    with pytest.raises(UserError, match=line):
        check(*LIST[1:])


# -- what is drawn


def test_shares() -> None:
    """4000 draws; three standard deviations of the count are 95 at most."""
    counts = Counter(update_size(SIZES, Draws(7, ("generator", update), range(4))) for update in range(4000))
    for height, width, share in SIZES:
        assert counts[height, width] == pytest.approx(4000 * share, abs=95)


@pytest.mark.parametrize(("place", "size"), [(0.0, (32, 32)), (0.5, (16, 48)), (0.874, (16, 48)), (0.875, (48, 16))])
def test_the_place_of_a_draw(monkeypatch: pytest.MonkeyPatch, place: float, size: tuple[int, int]) -> None:
    monkeypatch.setattr(torch, "rand", lambda *_, **__: torch.tensor(place, dtype=torch.float64))
    assert update_size(SIZES, Draws(7, ("generator", 0), range(1))) == size
    short = [Size(32, 32, 0.25), Size(16, 48, 0.25)]  # shares whose sum is rounded to less than 1
    assert update_size(short, Draws(7, ("generator", 0), range(1))) == ((32, 32) if place < 0.25 else (16, 48))


def test_an_update_has_one_size_however_it_is_split() -> None:
    def sizes(samples: Any, update: str = "generator", seed: int = 7) -> list[tuple[int, int]]:
        return [update_size(SIZES, Draws(seed, (update, number), samples)) for number in range(40)]

    assert sizes(range(8)) == sizes(range(2)) == sizes(range(6, 8)) == sizes([0, 4])
    assert sizes(range(8)) != sizes(range(8), "fake_score")
    assert sizes(range(8)) != sizes(range(8), seed=8)


def test_one_size_takes_no_draw() -> None:
    draws: Any = None
    assert update_size([Size(16, 48)], draws) == (16, 48)


# -- what follows


class Doubling:
    """Decodes every latent to a square of two pixels' side."""

    size = (32, 32)

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        return 1, height // 2, width // 2

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return latents.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)


def test_views_of_rewards() -> None:
    family: Any = Doubling()
    shapes = [size.shape for size in SIZES]
    sample: Any = SimpleNamespace(x0=torch.arange(8.0 * 24).reshape(1, 1, 8, 24), draws=Draws(7, ("generator", 0), [3]))
    crop = View(family, schema.Memory(reward_crop=16), shapes)(sample)
    left = int(crop[0, 0, 0, 0])
    assert crop.shape == (1, 1, 16, 16)
    assert 0 < left <= 16  # the place is drawn along the longer side alone
    assert torch.equal(crop, family.decode(sample.x0[..., left : left + 8]))
    assert View(family, schema.Memory(reward_scale=0.5), shapes)(sample).shape == (1, 1, 8, 24)
    assert View(family, schema.Memory(), shapes)(sample).shape == (1, 1, 16, 48)
    with pytest.raises(ValueError, match="18 must be a multiple of 2, at most the resolution 16"):
        View(family, schema.Memory(reward_crop=18), shapes)
    assert View(family, schema.Memory(reward_scale=0.125), shapes)(sample).shape == (1, 1, 2, 6)
    with pytest.raises(UserError, match=r"^memory.reward_scale: 0.12 of 16 pixels is none; use 0.125 or more$"):
        View(family, schema.Memory(reward_scale=0.12), shapes)


def test_the_card_names_the_sizes(make_recipe: Callable[..., Recipe]) -> None:
    said = trained_sizes(make_recipe(model__resolution=LIST))
    assert "at 3 sizes, height x width in pixels: 32 (50%), 16x48 (38%), 48x16 (12%); the commands" in said
    assert trained_sizes(make_recipe(model__resolution={"height": 832, "width": 1216})) == ""


def test_a_sheet_has_the_first_size(make_recipe: Callable[..., Recipe], sd3: Path) -> None:
    model = {"family": "sd3", "path": str(sd3), "resolution": [LIST[1], LIST[0]], "max_tokens": 8}
    family = load_family(make_recipe(model=model))
    plan, samples = SamplingPlan(1, "euler"), schema.Samples(count=2, prompts=["a cat", "a dog"])
    images = draw_samples(family, samples, CPU, 2, family.load_network(), plan)
    assert images.shape == (2, 3, 16, 48)
    assert [picture.size for picture in pictures(images)] == [(48, 16)] * 2
    assert family.students.sampling["size"] == [16, 48]


def test_pairs_that_are_not_square(
    make_recipe: Callable[..., Recipe], sdxl: Path, prompts: Path, tmp_path: Path
) -> None:
    model = {"family": "sdxl", "path": str(sdxl)}
    data = {"prompts": str(prompts), "pairs": str(tmp_path / "pairs")}
    wide, tall = (
        make_recipe(
            model={**model, "resolution": {"height": height, "width": width}},
            data=data,
            objectives=[{"kind": "regression"}, {"kind": "distribution_matching"}],
        )
        for height, width in ((16, 48), (48, 16))
    )
    make_pairs(wide, tmp_path / "pairs", 2, steps=1, dtype="fp32")
    assert json.loads((tmp_path / "pairs" / MANIFEST).read_text())["resolution"] == [16, 48]
    check_pairs(wide)
    start = Pairs(tmp_path / "pairs", (4, 2, 6), 2).draw(Draws(7, ("generator", 0), range(2)))
    assert start.noise.shape == (2, 4, 2, 6)
    with pytest.raises(UserError, match=r"^data.pairs: .* was made with resolution \[16, 48\], not \[48, 16\]"):
        check_pairs(tall)


# -- training


@pytest.fixture
def settings(make_recipe: Callable[..., Recipe], sdxl: Path, prompts: Path) -> Callable[..., Recipe]:
    def settings(**changes: Any) -> Recipe:
        model = {"family": "sdxl", "path": str(sdxl), "resolution": LIST, "fake_score_lora": {"rank": 2, "alpha": 2}}
        basis: dict[str, Any] = {
            "model": {**model, "generator_lora": {"rank": 2, "alpha": 2}},
            "data": {"prompts": str(prompts)},
            "guidance": {"ratio": 2, "cfg": 4.0},
            "optim__generator": {"lr": 1e-3, "eps": 1e-3},
            "optim__fake_score": {"lr": 1e-3, "eps": 1e-3},
        }
        return make_recipe(**{**basis, **changes})

    return settings


def watched(trainer: Trainer) -> list[tuple[list[int], list[list[int]]]]:
    """A list of the calls of the networks from now on: the shape of the latents, and the time ids."""
    seen: list[tuple[list[int], list[list[int]]]] = []

    def note(_: Any, args: Any, named: Any) -> None:
        seen.append((list(args[0].shape[1:]), named["added_cond_kwargs"]["time_ids"].unique(dim=0).tolist()))

    trainer.guidance.module.base.register_forward_pre_hook(note, with_kwargs=True)
    return seen


@pytest.mark.usefixtures("one_process")
def test_training_at_several_sizes(settings: Callable[..., Recipe]) -> None:
    """In each update all calls have the size that was drawn for it; time ids follow; a split batch is the same run."""
    whole, split = (build(settings(optim__accumulation=parts), CPU) for parts in (1, 4))
    seen, used = watched(whole), set()
    for step in range(3):
        found: dict[str, Any] = {}
        names = [("fake_score", 2 * step), ("fake_score", 2 * step + 1), ("generator", step)]
        for name, number in names:
            del seen[:]
            made = whole.update_generator() if name == "generator" else whole.update_fake_score(number)
            found[name] = made
            height, width = update_size(SIZES, Draws(7, (name, number), range(4)))
            used.add((height, width))
            assert seen
            for shape, ids in seen:
                assert (shape, ids) == ([4, height // 8, width // 8], [[height, width, 0, 0, height, width]])
        whole.step += 1
        expected = whole.read([found["fake_score"]], found["generator"])
        assert split.train_step() == pytest.approx(expected, rel=1e-4, abs=1e-7)
    assert used == {size.shape for size in SIZES}


@pytest.mark.usefixtures("one_process")
def test_a_dry_run_tries_the_largest(settings: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def note(sizes: list[Size], draws: Draws) -> tuple[int, int]:
        asked.append(sizes)
        return update_size(sizes, draws)

    monkeypatch.setattr(rollouts, "update_size", note)
    runner.dry_run(settings(model__resolution=[LIST[1], LIST[0], LIST[2]]))
    assert asked == [[SIZES[0]]] * 3
