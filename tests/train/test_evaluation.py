"""The measures against closed forms and sets that can be counted by eye."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import dmdr_models
import numpy as np
import pytest
import torch
from dmdr_core import randn
from dmdr_rewards.compare.metrics import Statistics, frechet_distance, precision_recall
from dmdr_train.base.errors import UserError
from dmdr_train.base.random_draws import named_generator
from dmdr_train.data.picture_folder import class_folders, pictures_in, read_picture
from dmdr_train.evaluation.check import check_reference
from dmdr_train.evaluation.evaluator import Evaluator, Source
from dmdr_train.evaluation.intervals import bootstrap_interval
from dmdr_train.evaluation.reference_sets import Folder, Labels, PromptSets, Scenes, Shapes, drawn_labels
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
    pictures = evaluator.sampled(network, plan, range(3))
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
    evaluator = Evaluator(settings, dmdr_models.load("sit", model), torch.device("cpu"), {"brightness": Brightness()})
    pictures = torch.cat([evaluator.reference.pictures("real", index) for index in evaluator.batches])
    assert evaluator.real().more == {"brightness": pytest.approx(pictures.mean().item(), rel=1e-5)}


def test_a_reward_that_fails_leaves_the_other_scores(one_process: None, model: Path, classifier: Path) -> None:
    class Unreachable:
        info = SimpleNamespace(name="unreachable")

        def score(self, images: Tensor, prompts: list[int]) -> Tensor:
            raise ConnectionError("nobody answers")

    settings = schema.Evaluation(classifier=str(classifier), reference="shapes", pictures=100)
    evaluator = Evaluator(settings, dmdr_models.load("sit", model), torch.device("cpu"), {"unreachable": Unreachable()})
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
    reference = Folder(tmp_path, 10, 1, (32, 32))
    seen = {}
    for name in ("reference", "real"):
        pictures = reference.pictures(name, range(100))
        colours = (pictures[:, :, 0, 0] * 255).round().int()
        assert (colours[:, 0] // 10).tolist() == reference.prompts(range(100))
        assert torch.equal(reference.pictures(name, range(37, 60)), pictures[37:60])
        seen[name] = {tuple(colour.tolist()) for colour in colours}
    assert len(seen["reference"]) == len(seen["real"]) == 100
    assert not seen["reference"] & seen["real"]


def test_pictures_of_other_sizes_are_resized_to_cover_and_cut_to_the_centre(tmp_path: Path) -> None:
    from PIL import Image

    wide = Image.new("RGB", (60, 20), "red")
    wide.paste("blue", (20, 0, 40, 20))
    wide.save(tmp_path / "wide.png")
    cut = read_picture(tmp_path / "wide.png", (40, 40))
    assert cut.shape == (3, 40, 40)
    assert (cut[2] > 0.99).float().mean() > 0.9  # the middle third, apart from its edges
    assert torch.equal(read_picture(tmp_path / "wide.png", (20, 60))[0, 0, :20], torch.ones(20))


def test_the_files_of_a_reference_are_those_that_are_scored(tmp_path: Path) -> None:
    """A Mac's notes beside pictures are none, and a hidden folder is no class: the labels would not fit."""
    for name in ("b.TIFF", "a.gif", "._a.gif", ".hidden.png", "notes.txt"):
        (tmp_path / name).touch()
    for name in ("cat", ".cache"):
        (tmp_path / name).mkdir()
    assert [path.name for path in pictures_in(tmp_path)] == ["a.gif", "b.TIFF"]
    assert [path.name for path in class_folders(tmp_path)] == ["cat"]


def counted_folder(path: Path, counts: Sequence[int]) -> Path:
    for label, count in enumerate(counts):
        (path / f"{label}").mkdir(parents=True)
        for number in range(count):
            (path / f"{label}" / f"{number}.png").touch()
    return path


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ([100, 100, 68], None),
        ([68, 68, 66], None),
        ([67, 100, 100], "0 has 67 pictures and 100 evaluated pictures need 68 of them.*; add some$"),
        ([100, 100, 0], "2 holds no picture; put some there"),
    ],
)
def test_no_class_may_have_too_few_files(tmp_path: Path, counts: list[int], message: str | None) -> None:
    folder = str(counted_folder(tmp_path / "folder", counts))
    evaluation = schema.Evaluation(classifier="c", reference=folder, pictures=100)
    if message is None:
        check_reference(evaluation, 100, False, 3)
        return
    with pytest.raises(UserError, match=f"^tracking.evaluation.reference: {tmp_path}/folder/{message}"):
        check_reference(evaluation, 100, False, 3)


def test_a_count_that_the_files_are_enough_for_is_named(tmp_path: Path) -> None:
    folder = str(counted_folder(tmp_path, [400, 205]))
    evaluation = schema.Evaluation(classifier="c", reference=folder, pictures=300)
    with pytest.raises(UserError, match=r"need 300 of them, .*; add some, or set .*pictures to 204 or less"):
        check_reference(evaluation, 300, False, 2)
    check_reference(evaluation, 204, False, 2)


def test_the_seed_chooses_from_all_prompts() -> None:
    sets = {"a": [f"a{i}" for i in range(50)], "b": [f"b{i}" for i in range(50)]}
    first, other, whole = (PromptSets(sets, 2, count, seed) for count, seed in ((41, 1), (41, 2), (200, 1)))
    assert [len(each.asked) for each in (first, other, whole)] == [20, 20, 100]
    assert whole.asked[:2] == [("a", "a0"), ("a", "a1")]
    assert {name for name, _ in first.asked} == {"a", "b"}
    assert first.asked != other.asked
    assert first.prompts(range(2, 5)) == [first.asked[1][1]] * 2 + [first.asked[2][1]]
    assert sum(mask.sum() for mask in first.sets(range(40)).values()) == 40
    assert PromptSets({"a": ["x"]}, 1, 100, 1).sets(range(1)) == {}


def test_bootstrap_intervals() -> None:
    """Near mean ± 1.96 σ / √n; of prompts, where several pictures are of one."""
    values = torch.randn(400, generator=torch.Generator().manual_seed(0))
    low, high = bootstrap_interval(values, seed=1)
    mean, half = values.mean().item(), 1.96 * values.std().item() / 20
    assert (low, high) == pytest.approx((mean - half, mean + half), abs=0.02)
    assert bootstrap_interval(values, seed=1) == (low, high)
    assert bootstrap_interval(values.repeat_interleave(4), 1, group=4) == pytest.approx((low, high))
    with_nan = torch.cat([values, torch.full((5,), torch.nan)])
    assert bootstrap_interval(with_nan, seed=1) == (low, high)
    assert all(map(math.isnan, bootstrap_interval(values[:1], seed=1)))


@pytest.mark.parametrize("content", ["", "[]", '{"real": 3}', '{"real": {"name": 3}}', "{" * 5000])
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


def test_labels_in_turn_and_drawn() -> None:
    """Drawn labels do not depend on the processes, and vary in number as a binomial does."""
    drawn = Labels(10, drawn_labels(10, 5000, seed=1))
    labels = torch.tensor(drawn.prompts(range(5000)))
    assert drawn.prompts(range(70, 80)) == labels[70:80].tolist()
    counts = labels.bincount(minlength=10)
    assert 10 < counts.float().std() < 40  # 21 is expected
    assert drawn_labels(10, 5000, seed=2) != labels.tolist()
    assert torch.tensor(Labels(10).prompts(range(5000))).bincount().unique().tolist() == [500]


def batch_of_adm(path: Path, count: int, **statistics: Any) -> Path:
    pictures = (255 * Shapes(1).pictures("reference", range(count))).round().byte().permute(0, 2, 3, 1)
    np.savez(path, arr_0=pictures.numpy(), **statistics)
    return path


def test_a_reference_batch_of_adm(one_process: None, model: Path, classifier: Path, tmp_path: Path) -> None:
    """Of another number of pictures than are evaluated; the same pictures in a folder have the same distances."""
    known = Statistics(torch.ones(32).double(), torch.eye(32).double())
    both = batch_of_adm(tmp_path / "b.npz", 130, mu=known.mean.numpy(), sigma=known.covariance.numpy())
    alone = batch_of_adm(tmp_path / "a.npz", 130)
    network, scores, settings = None, {}, {"classifier": str(classifier), "pictures": 100, "labels": "drawn"}
    for path in (both, alone):
        family = dmdr_models.load("sit", model)
        evaluator = Evaluator(schema.Evaluation(reference=str(path), **settings), family, torch.device("cpu"))
        network = network or family.load_network()
        scores[path] = evaluator.model("teacher", network, SamplingPlan(1, "euler"))
        made = evaluator._measure(Source("x", partial(evaluator.sampled, network, SamplingPlan(1, "euler"))))
        pictures = evaluator.real_set
        assert pictures is not None
        assert len(pictures["features"]) == 130
        assert "judged/accuracy" not in pictures.rows
        assert scores[path].precision == precision_recall(pictures["features"], made["features"])[0]
    assert scores[both].frechet == pytest.approx(frechet_distance(known, made["features"]), rel=1e-4)
    assert scores[alone].frechet == pytest.approx(frechet_distance(pictures["features"], made["features"]), rel=1e-4)
    assert scores[both].kernel == scores[alone].kernel
    real = torch.cat([evaluator.classifier.features(Shapes(1).pictures("reference", range(130)))])
    torch.testing.assert_close(pictures["features"], real, atol=0.05, rtol=0.05)


def test_a_reference_of_another_form_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", sigma=np.eye(3))
    (tmp_path / "b.npz").write_text("no archive")
    np.savez_compressed(tmp_path / "c.npz", arr_0=np.zeros((3, 4, 4, 3), np.uint8))
    for name, message in (
        ("a", "has neither mu and sigma nor arr_0"),
        ("b", "is no .npz"),
        ("c", "arr_0 is compressed"),
        ("d", "no file"),
    ):
        evaluation = schema.Evaluation(classifier="c", reference=str(tmp_path / f"{name}.npz"))
        with pytest.raises(UserError, match=rf"^tracking.evaluation.reference: .*{message}"):
            check_reference(evaluation, 100, False, 3)


def test_nothing_waits_for_the_device_where_no_times_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[Any] = []
    monkeypatch.setattr(torch.cuda, "synchronize", waits.append)
    given: Any = SimpleNamespace(device=torch.device("cuda"), finished=None)
    Evaluator._clock(given)
    assert waits == []
    given.finished = True
    Evaluator._clock(given)
    assert waits == [given.device]
