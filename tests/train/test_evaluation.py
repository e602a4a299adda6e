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
from dmdr_train.evaluation.metrics import frechet_distance, inception_score, precision_recall
from dmdr_train.evaluation.reference_sets import Folder, Scenes, Shapes
from dmdr_train.evaluation.sample_sheets import draw_samples
from dmdr_train.evaluation.scores import Scores, read_scores, save_scores
from dmdr_train.evaluation.seeded_sampling import SamplingPlan
from dmdr_train.problems import scenes
from dmdr_train.recipe import schema
from torch import Tensor


def exactly(mean: list[float], covariance: Tensor, count: int = 400, seed: int = 0) -> Tensor:
    """Points whose sample mean and sample covariance are exactly these."""
    raw = torch.randn(count, len(mean), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    raw = raw - raw.mean(dim=0)
    white = torch.linalg.solve_triangular(torch.linalg.cholesky(raw.T.cov()), raw.T, upper=False).T
    return white @ torch.linalg.cholesky(covariance).T + torch.tensor(mean, dtype=torch.float64)


def square_root(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return vectors @ values.sqrt().diag() @ vectors.T


def test_frechet_distance_of_independent_normals() -> None:
    """Σ (μ_a − μ_b)² + (σ_a − σ_b)²."""
    a = exactly([0.0, 1.0, -2.0], torch.tensor([1.0, 4.0, 9.0], dtype=torch.float64).diag())
    b = exactly([3.0, 1.0, 0.0], torch.tensor([4.0, 4.0, 1.0], dtype=torch.float64).diag(), 300, seed=1)
    assert frechet_distance(a, b) == pytest.approx((9 + 0 + 4) + (1 + 0 + 4), rel=1e-6)


def test_frechet_distance_of_normals_that_do_not_commute() -> None:
    """‖μ_a − μ_b‖² + tr(A + B − 2 (A^½ B A^½)^½)."""
    A = torch.tensor([[2.0, 0.8], [0.8, 1.0]], dtype=torch.float64)
    B = torch.tensor([[1.0, -0.5], [-0.5, 3.0]], dtype=torch.float64)
    cross = square_root(square_root(A) @ B @ square_root(A))
    expected = 1.0 + 4.0 + (A + B - 2 * cross).trace().item()
    a, b = exactly([1.0, 0.0], A), exactly([0.0, 2.0], B, seed=1)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(b, a) == pytest.approx(expected, rel=1e-6)


def test_frechet_distance_of_a_set_to_itself() -> None:
    points = exactly([5.0, 1.0, 0.0], torch.eye(3, dtype=torch.float64))
    assert frechet_distance(points.float(), points.float()) == pytest.approx(0, abs=1e-6)


def test_precision_and_recall_by_hand() -> None:
    """Points on a line, one apart: the third neighbour is 2 away inside a set and 3 away at its ends."""
    real = torch.arange(10.0)[:, None]
    fake = torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0, 100.0, 101.0, 102.0, 103.0, 104.0])[:, None]
    # Half of `fake` is among `real`; the balls around 0 … 4 reach to 7.
    assert precision_recall(real, fake) == pytest.approx((0.5, 0.8))
    assert precision_recall(real, real) == (1.0, 1.0)
    assert precision_recall(real, real + 1000) == (0.0, 0.0)


def test_a_collapsed_set_is_precise_and_recalls_nothing() -> None:
    real = torch.randn(200, 4, generator=torch.Generator().manual_seed(0))
    precision, recall = precision_recall(real, real[:1].expand(50, 4) + 1e-6)
    assert precision == 1.0
    assert recall <= 0.01


def test_inception_score_closed_forms() -> None:
    certain = 50.0 * torch.eye(6)
    assert inception_score(certain.repeat(20, 1)) == pytest.approx(6, rel=1e-4)  # every class, each certain
    assert inception_score(certain[:1].repeat(20, 1)) == pytest.approx(1, rel=1e-4)  # one class
    assert inception_score(torch.zeros(20, 6)) == pytest.approx(1, rel=1e-4)  # no idea
    half = torch.tensor([[math.log(3), 0.0], [0.0, math.log(3)]]).repeat(10, 1)  # p = ¾, ¼, and the reverse
    expected = math.exp(0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5))
    assert inception_score(half) == pytest.approx(expected, rel=1e-4)


def test_the_inception_score_repeats_itself() -> None:
    """To the last bit, and without a trace in torch's own generator."""
    logits = 3 * torch.randn(500, 7, generator=torch.Generator().manual_seed(0))
    found = set()
    for seed in range(10):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        found.add(inception_score(logits))
        assert torch.equal(torch.get_rng_state(), before)
    assert len(found) == 1


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
