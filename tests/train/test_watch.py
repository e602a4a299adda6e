"""The measures of early warning against closed forms, and a look at networks."""

import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import dmdr_models
import pytest
import torch
from dmdr_train.base.errors import StoppedError, UserError
from dmdr_train.evaluation.seeded_sampling import SamplingPlan
from dmdr_train.monitoring.measures import Look, Watch, compared, contrast, diversity, drift, pooled_pixels, saturation
from dmdr_train.recipe import schema

PLAN = SamplingPlan(2, "sde")


def test_saturation() -> None:
    grey = torch.rand(3, 1, 4, 4).expand(3, 3, 4, 4)
    assert saturation(grey).tolist() == [0, 0, 0]
    red = torch.zeros(1, 3, 4, 4)
    red[:, 0] = 1
    assert saturation(red).tolist() == [1]
    red[..., :2] = 0.25  # half of the picture is grey
    assert saturation(red).tolist() == [0.5]


def test_contrast() -> None:
    picture = torch.zeros(2, 3, 4, 4)
    picture[1, :, :, :2] = 1  # half black, half white
    torch.testing.assert_close(contrast(picture), torch.tensor([0.0, 0.5]))
    picture[1, 0] = 0
    picture[1, 2] = 0  # half black, half green
    torch.testing.assert_close(contrast(picture)[1], torch.tensor(0.7152 / 2))


def test_diversity() -> None:
    equal = torch.ones(6, 5) * torch.arange(2.0).repeat_interleave(3)[:, None]
    assert diversity(equal, 3) == 0  # prompts differ, pictures of one do not
    square = torch.tensor([[0.0, 0.0], [3.0, 4.0], [0.0, 0.0], [0.0, 0.0]])
    assert diversity(square, 2) == pytest.approx(5 / 2**0.5 / 2)


def test_drift() -> None:
    teacher = Look({}, torch.tensor([0.0, 1.0]), torch.tensor([1.0, 2.0]))
    assert drift(teacher, teacher) == {"drift/mean": 0, "drift/std": 0}
    other = Look({}, torch.tensor([3.0, 9.0]), torch.tensor([1.0, 2.0 * torch.e]))
    assert drift(other, teacher) == pytest.approx({"drift/mean": (12.5) ** 0.5, "drift/std": 0.5**0.5})


@pytest.fixture(scope="module")
def make_watch(one_process: None, model: Path, classifier: Path, make_recipe: Any) -> Callable[[int], Watch]:
    family = dmdr_models.load("sit", model)
    trainer: Any = SimpleNamespace(family=family, device=torch.device("cpu"), objectives=[])

    def make(batch: int) -> Watch:
        reward = {"name": "class-label", "checkpoint": str(classifier)}
        settings = make_recipe(watch={"prompts": 3, "pictures": 2, "rewards": [reward]})
        return Watch(settings, trainer, pooled_pixels, batch)

    return make


def test_a_look_repeats_itself_however_it_is_split(make_watch: Callable[[int], Watch]) -> None:
    first = make_watch(4)
    assert [len(batch) for batch in first.batches] == [4, 2]
    assert first.prompts == [0, 0, 3, 3, 6, 6]
    network = first.family.load_network()
    before = torch.get_rng_state()
    seen, again, split = (watch.look(network, PLAN) for watch in (first, first, make_watch(3)))
    assert torch.equal(torch.get_rng_state(), before)
    assert seen.values == again.values
    assert seen.values == pytest.approx(split.values, rel=1e-4)
    assert list(seen.values) == ["diversity", "saturation", "contrast", "held_out/class-label"]
    assert seen.values["diversity"] > 0
    assert compared(seen, seen) == {
        **{f"watch/{name}": value for name, value in seen.values.items()},
        **{f"watch/teacher/{name}": value for name, value in seen.values.items()},
        "watch/drift/mean": 0,
        "watch/drift/std": 0,
    }


def test_the_processes_share_the_pictures(make_watch: Callable[[int], Watch], monkeypatch: pytest.MonkeyPatch) -> None:
    """Equally many each, the first ones again where they do not come out even."""
    drawn = []
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 4)
    for rank in range(4):
        monkeypatch.setattr("torch.distributed.get_rank", lambda rank=rank: rank)
        drawn += [make_watch(4).batches]
    assert drawn == [[[0, 1]], [[2, 3]], [[4, 5]], [[0, 1]]]


def test_pictures_that_are_drawn_twice_count_once(
    make_watch: Callable[[int], Watch], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Six pictures on four processes are eight rows; the measures are those of one process."""
    alone = make_watch(4)
    network = alone.family.load_network()
    expected = alone.look(network, PLAN)
    rows: list[list[torch.Tensor]] = []

    def keep(mine: torch.Tensor) -> torch.Tensor:
        rows[-1].append(mine)
        return mine

    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 4)
    monkeypatch.setattr("dmdr_train.monitoring.measures.gather_rows", keep)
    for rank in range(4):
        monkeypatch.setattr("torch.distributed.get_rank", lambda rank=rank: rank)
        rows.append([])
        make_watch(4).look(network, PLAN)
    whole = iter([torch.cat(parts) for parts in zip(*rows, strict=True)])
    monkeypatch.setattr("dmdr_train.monitoring.measures.gather_rows", lambda mine: next(whole))
    seen = alone.look(network, PLAN)
    assert seen.values == pytest.approx(expected.values, rel=1e-4)
    torch.testing.assert_close(seen.mean, expected.mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(seen.std, expected.std, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ValueError("prompt 'a cat' quotes no text"), UserError("watch.rewards.0", "prompt 'a cat' quotes no text")),
        (ConnectionError("is it up?"), StoppedError(76, "watch.rewards.0: is it up?; start again when it answers")),
    ],
)
def test_a_held_out_reward_is_tried_before_the_first_step(
    make_watch: Callable[[int], Watch], error: Exception, said: Exception
) -> None:
    asked: list[tuple[Any, ...]] = []

    def score(images: torch.Tensor, prompts: list[Any]) -> None:
        asked.append((tuple(images.shape), prompts))
        raise error

    watch = make_watch(4)
    watch.check()
    watch.held_out["class-label"] = SimpleNamespace(score=score)
    with pytest.raises(type(said)) as caught:
        watch.check()
    assert caught.value.args == said.args
    assert asked == [((3, 3, 32, 32), [0, 3, 6])]


# -- the recipe's section

REFL = {"kind": "refl", "start": 4, "reward": {"name": "clip", "checkpoint": "a.bin"}}
LIMIT = {"kind": "limit", "metric": "drift/mean", "above": 1}
BOTH = [{"kind": "distribution_matching"}, REFL]


def test_the_rules_in_force(make_recipe: Callable[..., schema.Recipe]) -> None:
    """The default ones wait for the first reward; a held-out reward brings reward_hacking."""
    held_out = {"name": "pickscore", "checkpoint": "b"}
    alone, both = make_recipe(objectives=BOTH), make_recipe(objectives=BOTH, watch={"rewards": [held_out]})
    assert [rule.kind for rule in alone.rules] == ["limit"] * 5
    assert [rule.kind for rule in both.rules] == ["reward_hacking", *["limit"] * 5]
    assert {rule.start for rule in both.rules} == {4}
    assert make_recipe().rules == []  # no reward
    assert make_recipe(objectives=BOTH, watch={"rules": []}).rules == []


@pytest.mark.parametrize(
    ("watch", "said"),
    [
        ({"rewards": [{"name": "dfn-clip", "checkpoint": "a.bin"}]}, "watch.rewards.0: a.bin is trained on by an"),
        ({"every": 0, "rewards": [{"name": "clip", "checkpoint": "b"}]}, "watch.rewards: has no effect with watch.ev"),
        ({"rules": [{"kind": "reward_hacking"}]}, "watch.rules.0: needs a reward to hold out; give one in watch.re"),
        ({"rules": [LIMIT | {"metric": "divrsity"}]}, "watch.rules.0.metric: 'divrsity' is not measured here; did"),
        ({"rules": [LIMIT | {"relative_to": "teacher"}]}, "watch.rules.0.relative_to: drift/mean is not measured of"),
        ({"rules": [LIMIT | {"metric": "trained/refl", "relative_to": "first"}]}, "zero is arbitrary; use null"),
        ({"rules": [LIMIT | {"below": 0}]}, "a limit has one of above and below"),
    ],
)
def test_a_watch_that_cannot_be(make_recipe: Callable[..., schema.Recipe], watch: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        make_recipe(objectives=BOTH, watch=watch)


LOOKS = {"every": 20, "rewards": [{"name": "pickscore", "checkpoint": "b"}]}


@pytest.mark.parametrize("name", ["held_out/pickscore", "trained/refl", "diversity"])
def test_the_best_may_be_what_is_watched(make_recipe: Callable[..., schema.Recipe], name: str) -> None:
    made = make_recipe(objectives=BOTH, watch=LOOKS, run__checkpoint_every=10, run__keep_best=name)
    assert made.run.keep_best == name


@pytest.mark.parametrize(
    ("name", "every", "said"),
    [
        ("held_out/pikscore", 10, "run.keep_best: 'held_out/pikscore' is not measured here; did you mean held_out/pic"),
        ("held_out/pickscore", 15, "needs watch.every to be a multiple of run.checkpoint_every; set both, or use null"),
        ("held_out/pickscore", 0, "needs watch.every to be a multiple of run.checkpoint_every; set both, or use null"),
        ("accuracy", 10, "run.keep_best: accuracy needs tracking.evaluation.every to be a multiple of run.checkpoint"),
        ("saturation", 10, "run.keep_best: 'saturation' is not measured here; valid are frechet, "),
    ],
)
def test_a_best_that_cannot_be_known(
    make_recipe: Callable[..., schema.Recipe], name: str, every: int, said: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        make_recipe(objectives=BOTH, watch=LOOKS, run__checkpoint_every=every, run__keep_best=name)
