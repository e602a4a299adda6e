"""The measures against closed forms and sets that can be counted by eye."""

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import dmdr_models
import pytest
import torch
from dmdr_core import randn
from dmdr_train.base.errors import UserError
from dmdr_train.base.random_draws import named_generator
from dmdr_train.evaluation.evaluator import Evaluator
from dmdr_train.evaluation.reference_sets import Folder, Scenes, Shapes
from dmdr_train.evaluation.sample_sheets import draw_samples
from dmdr_train.evaluation.scores import Scores, read_scores, save_scores
from dmdr_train.evaluation.seeded_sampling import SamplingPlan
from dmdr_train.problems import scenes
from dmdr_train.recipe import schema
from torch import Tensor


@pytest.fixture(scope="module")
def make_evaluator(one_process: None, model: Path, classifier: Path) -> Callable[[int], Evaluator]:
    family = dmdr_models.load("sit", model)

    def make(seed: int) -> Evaluator:
        settings = schema.Evaluation(classifier=str(classifier), reference="shapes", pictures=100, seed=seed)
        return Evaluator(settings, family, torch.device("cpu"))

    return make


def test_an_evaluation_repeats_itself_and_draws_from_its_own_seed(make_evaluator: Callable[[int], Evaluator]) -> None:
    before = torch.get_rng_state()
    first, again, other = make_evaluator(1), make_evaluator(1), make_evaluator(2)
    network = first.family.load_network()
    scores = [e.model("teacher", network, SamplingPlan(2, "euler", guidance=1.5)) for e in (first, again, other)]
    real = first.real()
    assert torch.equal(torch.get_rng_state(), before)
    assert scores[0] == scores[1] != scores[2]
    assert real.frechet < scores[0].frechet / 2
    assert scores[0].recall < real.recall


@pytest.mark.usefixtures("one_process")
def test_the_noise_of_samples_and_evaluation_has_names(model: Path, make_evaluator: Callable[[int], Evaluator]) -> None:
    """The first noise of a sheet is "samples", that of an evaluation "noise"; fresh noise is "rollout"."""
    family, plan = dmdr_models.load("sit", model), SamplingPlan(2, "sde", 1.5, 2.0)
    network, evaluator = family.load_network(), make_evaluator(5)
    sheet = draw_samples(family, schema.Samples(count=3, seed=5), torch.device("cpu"), 2, network, plan)
    evaluator.batches = [range(3)]
    (pictures,) = evaluator._sampled(network, plan)
    for found, prompts, name in ((sheet, [0, 3, 6], "samples"), (pictures, [0, 1, 2], "noise")):
        noise = randn((3, *family.latent_shape(*family.size)), [named_generator(5, name, i) for i in range(3)])
        fresh = [named_generator(5, "rollout", i) for i in range(3)]
        latents = dmdr_models.sample(family, network, family.condition(prompts), noise, 2, "sde", 1.5, 2.0, fresh)
        torch.testing.assert_close(found, family.decode(latents), rtol=1e-4, atol=1e-4)


def test_sets_are_balanced() -> None:
    assert Shapes(seed=1).prompts(range(95, 115)) == [5, 6, 7, 8, 9, *range(10), 0, 1, 2, 3, 4]


@pytest.mark.parametrize("reference", [Shapes(3), Scenes(3)], ids=["shapes", "scenes"])
def test_what_is_asked_and_shown_does_not_depend_on_the_processes(reference: Any) -> None:
    prompts = reference.prompts(range(40))
    assert reference.prompts(range(20, 40)) == prompts[20:]
    first, again = (reference.pictures("real", range(20, 40)) for _ in range(2))
    assert first.shape == (20, 3, 32, 32)
    assert torch.equal(first, again)
    assert not torch.equal(first, reference.pictures("reference", range(20, 40)))


def test_scenes_are_judged_by_code_and_apart_where_they_are_held_out() -> None:
    reference = Scenes(seed=3)
    prompts = reference.prompts(range(200))
    assert len(set(prompts)) == 200
    assert set(prompts[::2]) <= set(scenes.training_captions())
    assert set(prompts[1::2]) <= set(scenes.held_out_captions())
    right = reference.judge(reference.pictures("real", range(200)), prompts, torch.empty(200, 0))
    assert right["accuracy"].nanmean() > 0.98
    assert right["held-out accuracy"].nanmean() > 0.98
    assert torch.equal(right["accuracy"].isnan(), torch.arange(200) % 2 == 1)
    assert torch.equal(right["held-out accuracy"].isnan(), torch.arange(200) % 2 == 0)
    wrong = reference.judge(reference.pictures("real", range(200)), prompts[1:] + prompts[:1], torch.empty(200, 0))
    assert wrong["accuracy"].nanmean() < 0.02


def test_class_labels_are_judged_by_the_classifier() -> None:
    logits = torch.eye(10)[[0, 1, 5, 3]]
    assert Shapes(0).judge(torch.empty(4, 3, 32, 32), [0, 1, 2, 3], logits)["accuracy"].tolist() == [1, 1, 0, 1]


def test_rewards_score_the_pictures_too(one_process: None, model: Path, classifier: Path) -> None:
    class Brightness:
        info = SimpleNamespace(name="brightness")

        def score(self, images: Tensor, prompts: list[int]) -> Tensor:
            assert len(images) == len(prompts)
            return images.flatten(1).mean(dim=1)

    settings = schema.Evaluation(classifier=str(classifier), reference="shapes", pictures=200)
    evaluator = Evaluator(settings, dmdr_models.load("sit", model), torch.device("cpu"), [Brightness()])
    pictures = torch.cat([evaluator.reference.pictures("real", index) for index in evaluator.batches])
    assert evaluator.real().more == {"brightness": pytest.approx(pictures.mean().item(), rel=1e-5)}


def test_a_reward_that_fails_leaves_the_other_scores(one_process: None, model: Path, classifier: Path) -> None:
    class Unreachable:
        info = SimpleNamespace(name="unreachable")

        def score(self, images: Tensor, prompts: list[int]) -> Tensor:
            raise ConnectionError("nobody answers")

    settings = schema.Evaluation(classifier=str(classifier), reference="shapes", pictures=100)
    evaluator = Evaluator(settings, dmdr_models.load("sit", model), torch.device("cpu"), [Unreachable()])
    scores = evaluator.real()
    assert math.isnan(scores.more["unreachable"])
    assert math.isfinite(scores.frechet)
    assert evaluator.failure == "unreachable of the evaluation: nobody answers"


def test_reference_pictures_from_a_folder(tmp_path: Path) -> None:
    """Labels follow the alphabet; the reference set and the row of real pictures share no file."""
    from PIL import Image

    for label in range(10):
        (tmp_path / f"class-{label}").mkdir()
        for number in range(20):
            colour = (10 * label, 10 * number, 7)
            Image.new("RGB", (32, 32), colour).save(tmp_path / f"class-{label}" / f"{number}.png")
    reference = Folder(tmp_path, 10, seed=1)
    seen = {}
    for name in ("reference", "real"):
        pictures = reference.pictures(name, range(100))
        colours = (pictures[:, :, 0, 0] * 255).round().int()
        assert (colours[:, 0] // 10).tolist() == reference.prompts(range(100))
        assert torch.equal(reference.pictures(name, range(37, 60)), pictures[37:60])
        seen[name] = {tuple(colour.tolist()) for colour in colours}
    assert len(seen["reference"]) == len(seen["real"]) == 100
    assert not seen["reference"] & seen["real"]


@pytest.mark.parametrize("content", ["", "[]", '{"real": 3}', '{"real": {"name": "real"}}', "{" * 5000])
def test_damaged_scores_are_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "evaluation.json").write_text(content)
    with pytest.raises(UserError) as caught:
        read_scores(tmp_path)
    assert str(caught.value) == (
        f"run.output: {tmp_path}/evaluation.json is damaged; remove it, and its scores are measured again"
    )


def test_scores_come_back(tmp_path: Path) -> None:
    scores = {"real": Scores("real", 1.5, 0.5, 0.25, float("nan"), 2.0, None, {"reward": 1.0})}
    save_scores(tmp_path, scores)
    assert repr(read_scores(tmp_path)) == repr(scores)
