"""What objectives are given: samples with their states, groups and next states; and the guide's predictions."""

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from dmdr_core import denoising_loss, rollout
from dmdr_train.base.errors import UserError
from dmdr_train.base.random_draws import Draws, named_generator
from dmdr_train.data.prompt_order import ClassLabels, TextPrompts
from dmdr_train.recipe.load import parse_recipe
from dmdr_train.recipe.schema import Recipe
from dmdr_train.run import preflight
from dmdr_train.training.guide import Guide
from dmdr_train.training.rollouts import Rollouts, stratified_position
from dmdr_train.training.sample import Sample
from torch import Tensor

UPDATE = ("generator", 5)
DRAWS = Draws(7, UPDATE, range(8))
OF_GROUPS = Draws(7, UPDATE, range(16))
COMPARED = frozenset({"groups", "final_pictures"})
"""The needs of an objective that compares the ends of rollouts within groups."""


@pytest.fixture
def make_rollouts(make_recipe: Callable[..., Recipe], toy_family: Any, toy_generator: Any) -> Callable[..., Rollouts]:
    def make(**rollout: Any) -> Rollouts:
        recipe = make_recipe(rollout={"steps": 4, "shift": 3.0})
        # Not checked, as the recipe has no objective that compares the samples of a group.
        recipe = recipe.model_copy(update={"rollout": recipe.rollout.model_copy(update=rollout)})
        decode = lambda sample: toy_family.decode(sample.x0)  # noqa: E731
        return Rollouts(recipe, toy_family, toy_generator, ClassLabels([0, 1, 2]), decode, torch.device("cpu"))

    return make


def fresh(purpose: str, index: int) -> Tensor:
    return torch.randn(1, 2, 2, generator=named_generator(7, *UPDATE, purpose, index))


def test_a_sample_tells_where_its_prediction_was_made(make_rollouts: Callable[..., Rollouts]) -> None:
    made = make_rollouts()
    sample = made.draw(DRAWS, step=3)
    times = made.grid.times
    chosen = made.choose_steps(DRAWS)
    assert set(chosen.tolist()) == {0, 1, 2, 3}
    assert torch.equal(sample.t, times[chosen])
    assert torch.equal(sample.t_next, times[chosen + 1])
    assert not sample.x_t.requires_grad
    assert sample.x0.requires_grad
    prediction = made.family.predict(made.generator, sample.x_t, sample.t, sample.condition)
    torch.testing.assert_close(sample.x0, sample.x_t - sample.t.reshape(-1, 1, 1, 1) * prediction)
    assert (sample.step, sample.group) == (3, list(range(8)))


def test_the_next_state_of_a_stochastic_rollout_is_renoised(make_rollouts: Callable[..., Rollouts]) -> None:
    sample = make_rollouts(mode="sde").draw(DRAWS, 0)
    for i in range(8):
        t, x0 = sample.t_next[i], sample.x0[i]
        expected = (1 - t) * x0 + t * fresh("next_state", i) if t > 0 else x0
        torch.testing.assert_close(sample.next_state[i], expected)
    assert not sample.next_state.requires_grad


def test_the_next_state_of_a_deterministic_rollout_is_the_rollouts_own(make_rollouts: Callable[..., Rollouts]) -> None:
    made = make_rollouts(mode="ode")
    sample = made.draw(DRAWS, 0)
    chosen = made.choose_steps(DRAWS).tolist()
    noise = torch.stack([fresh("noise", i) for i in range(8)])
    whole = rollout(
        lambda x, t: made.family.predict(made.generator, x, t, sample.condition),
        made.family.process,
        made.grid,
        noise,
        "ode",
    )
    states = [*whole.states, whole.x0]
    for i, at in enumerate(chosen):
        torch.testing.assert_close(sample.x_t[i], states[at][i])
        torch.testing.assert_close(sample.next_state[i], states[at + 1][i])
    final = made.draw(DRAWS, 0, needs={"final_sample"})
    torch.testing.assert_close(final.x0, whole.x0)
    assert final.t_next.tolist() == [0.0] * 8


def test_the_fake_score_learns_from_what_the_public_trainers_show_it(
    make_rollouts: Callable[..., Rollouts], toy_generator: Any
) -> None:
    """In a deterministic rollout, from its own end; otherwise from the samples that the generator is trained on."""
    made = make_rollouts(mode="ode", states="authors")
    sample = made.draw_for_fake_score(DRAWS, 0)
    a, b, c, d = toy_generator.base.tolist()
    x, times = torch.stack([fresh("noise", i) for i in range(8)]), made.grid.times.tolist()
    label = torch.tensor(sample.prompts).reshape(-1, 1, 1, 1) + 1
    for t, t_next in itertools.pairwise(times):
        x = x + (t_next - t) * (a * x + b * torch.sin(3 * x) + c * t + d * label)
    torch.testing.assert_close(sample.x0, x)
    assert sample.t.tolist() == [times[-2]] * 8
    assert not torch.allclose(made.draw(DRAWS, 0).x0, x)
    for other in ({"mode": "sde", "states": "authors"}, {"mode": "ode"}, {"mode": "sde"}):
        made = make_rollouts(**other)
        assert torch.equal(made.draw_for_fake_score(DRAWS, 0).x0, made.draw(DRAWS, 0).x0), other


def test_samples_of_a_group_have_one_prompt_and_noise_of_their_own(make_rollouts: Callable[..., Rollouts]) -> None:
    made = make_rollouts(group_size=4)
    whole = made.draw(Draws(7, UPDATE, range(40)), 0)
    assert whole.group == [i // 4 for i in range(40)]
    prompts = [whole.prompts[4 * g : 4 * g + 4] for g in range(10)]
    assert all(len(set(group)) == 1 for group in prompts)
    assert len({group[0] for group in prompts}) == 3
    assert not torch.equal(whole.x0[0], whole.x0[1])
    part = made.draw(Draws(7, UPDATE, range(20, 28)), 0)  # of another process
    assert (part.prompts, part.group) == (whole.prompts[20:28], whole.group[20:28])


def test_every_prompt_has_one_group_in_an_epoch(make_rollouts: Callable[..., Rollouts]) -> None:
    import datasets

    made = make_rollouts(group_size=2)
    texts = datasets.Dataset.from_dict({"prompt": list("abcdef")})
    made.prompts = TextPrompts(texts, batch_size=4 // 2)  # as `make_prompts` does for a batch of four
    seen = [prompt for update in range(3) for prompt in drawn_prompts(made, update)]
    assert sorted(seen) == sorted(2 * list("abcdef"))


def drawn_prompts(made: Rollouts, update: int) -> list[Any]:
    return made.start(Draws(7, ("generator", update), range(4))).prompts


GROUPED = {"rollout": {"group_size": 4}}


def test_groups_without_an_objective_that_compares_them_are_refused(
    make_recipe_dict: Callable[..., dict[str, Any]],
) -> None:
    with pytest.raises(UserError, match=r"^rollout.group_size: 4 has no effect, since no objective compares samples"):
        parse_recipe(make_recipe_dict(**GROUPED))


def test_noise_is_shared_where_the_ends_of_rollouts_are_compared(
    make_recipe_dict: Callable[..., dict[str, Any]],
) -> None:
    advantage = {"kind": "advantage_matching", "reward": {"name": "vlm-judge"}}
    rollout = {"steps": 4, "group_size": 4, "group_noise": "all"}
    settings = make_recipe_dict(objectives=[advantage], rollout=rollout, guidance={"cfg": 2.0})
    with pytest.raises(UserError, match=r"^rollout.group_noise: all has no effect without an objective such as grpo"):
        parse_recipe(settings)
    for kind in ("grpo", "dpo"):
        parse_recipe({**settings, "objectives": [{"kind": "distribution_matching"}, {**advantage, "kind": kind}]})
    guidance = {"cfg": 2.0, "discriminator": {"teacher_steps": 2}}
    parse_recipe({**settings, "objectives": [{"kind": "adversarial_grpo", "weight": 1.0}], "guidance": guidance})


@pytest.mark.parametrize(("mode", "eta"), [("sde", None), ("cps", 0.6)])
@pytest.mark.parametrize("reuse", ["none", "states"])
@pytest.mark.parametrize("shared", ["own", "steps", "all"])
def test_the_noise_that_a_group_shares(
    make_rollouts: Callable[..., Rollouts],
    toy_generator: Any,
    shared: str,
    reuse: str,
    mode: str,
    eta: float | None,
) -> None:
    """All but that of the step which the samples are trained at; with `steps`, the first noise is each sample's own."""
    rollouts = make_rollouts(group_size=4, group_noise=shared, reuse=reuse, mode=mode, eta=eta)
    made = rollouts.draw(OF_GROUPS, 0, COMPARED)
    share = torch.tensor((1.0 if eta is None else eta) * torch.pi / 2)
    of_a_group = [set(made.positions[first : first + 4]) for first in range(0, 16, 4)]
    assert all(len(positions) == 1 for positions in of_a_group) == (shared != "own")
    assert len(set(made.positions)) > 1
    times = rollouts.grid.times

    @torch.no_grad()
    def move(x: Tensor, step: int, i: int, fresh: torch.Generator) -> Tensor:
        t, s = times[step], times[step + 1]
        velocity = toy_generator(x, t, torch.tensor(made.prompts[i : i + 1]))
        clean, noise = x - t * velocity, x + (1 - t) * velocity
        if step == 3:
            return clean
        return (1 - s) * clean + s * (share.cos() * noise + share.sin() * torch.randn(1, 1, 2, 2, generator=fresh))

    for i, position in enumerate(made.positions):
        first = i - i % 4
        owners = {"own": (i, i), "steps": (i, first), "all": (first, first)}[shared]
        begin, along = (
            named_generator(7, "generator", 5, name, n) for name, n in zip(("noise", "rollout"), owners, strict=True)
        )
        x = torch.randn(1, 1, 2, 2, generator=begin)
        for step in range(position):
            x = move(x, step, i, along)
        torch.testing.assert_close(made.x_t[i], x[0], rtol=1e-4, atol=1e-5)
        own, end = (named_generator(7, "generator", 5, *n) for n in (("next_state", i), ("finish", owners[1])))
        for step in range(position, 4):
            x = move(x, step, i, own if step == position else end)
        torch.testing.assert_close(made.final_x0[i], x[0], rtol=1e-4, atol=1e-5)


def test_shared_noise_does_not_depend_on_the_split_of_a_batch(make_rollouts: Callable[..., Rollouts]) -> None:
    rollouts = make_rollouts(group_size=4, group_noise="all")
    whole = rollouts.draw(OF_GROUPS, 0, COMPARED)
    parts = [rollouts.draw(replace(OF_GROUPS, samples=range(i, i + 8)), 0, COMPARED) for i in (0, 8)]
    assert [position for part in parts for position in part.positions] == whole.positions
    torch.testing.assert_close(torch.cat([part.final_x0 for part in parts]), whole.final_x0)


@pytest.mark.parametrize("needs", [frozenset(), frozenset({"groups"}), frozenset({"final_x0"})])
def test_noise_is_shared_only_while_the_ends_of_groups_are_compared(
    make_rollouts: Callable[..., Rollouts], needs: frozenset[str]
) -> None:
    """Before `grpo` begins, and beside objectives that compare no rollouts of a group."""
    shared, own = (make_rollouts(group_size=4, group_noise=noise).draw(OF_GROUPS, 0, needs) for noise in ("all", "own"))
    assert shared.positions == own.positions
    assert torch.equal(shared.x0, own.x0)
    assert torch.equal(shared.final_x0, own.final_x0)


def test_samples_of_the_fake_score_share_no_noise(make_rollouts: Callable[..., Rollouts]) -> None:
    draws = Draws(7, ("fake_score", 5), range(16))
    shared, own = (
        make_rollouts(group_size=4, group_noise=noise).draw_for_fake_score(draws, 0, COMPARED)
        for noise in ("all", "own")
    )
    assert torch.equal(shared.x0, own.x0)
    assert shared.positions == own.positions


def test_micro_batches_hold_whole_groups(make_recipe: Callable[..., Recipe]) -> None:
    settings = make_recipe(optim__batch_size=12)
    grouped = settings.model_copy(update={"rollout": settings.rollout.model_copy(update={"group_size": 4})})
    preflight.check_batch(settings, 4)
    with pytest.raises(
        UserError, match=r"12 cannot be split over 4 processes .* x rollout.group_size 4; use a multipl"
    ):
        preflight.check_batch(grouped, 4)
    preflight.check_batch(grouped, 3)


# -- equal work for all processes


@pytest.mark.parametrize("steps", range(1, 9))
def test_stratified_positions_are_uniform_and_even_out(steps: int) -> None:
    arranged = [[stratified_position(first, i, steps) for i in range(4 * steps)] for first in range(steps)]
    for i in range(4 * steps):
        assert sorted(positions[i] for positions in arranged) == list(range(steps))  # of every sample
    for positions in arranged:
        assert {sum(positions[i : i + 2]) for i in range(0, 4 * steps, 2)} == {steps - 1}
        assert sorted(positions[: 2 * steps]) == sorted(2 * [*range(steps)])
        if steps % 2 == 0:
            assert all(sorted(positions[i : i + steps]) == list(range(steps)) for i in range(0, 3 * steps, 2))


@pytest.mark.parametrize(
    ("positions", "share", "all_asked", "slowest"),
    [
        ("independent", 2, 1265, [8, 8, 8, 8]),
        ("stratified", 2, 1280, [5, 5, 5, 5]),
        ("independent", 12, 7727, [40, 38, 39, 40]),
        ("stratified", 12, 7680, [30, 30, 30, 30]),
    ],
)
def test_how_long_the_slowest_of_64_processes_asks_the_generator(
    make_rollouts: Callable[..., Rollouts], positions: str, share: int, all_asked: int, slowest: list[int]
) -> None:
    """Predictions that the processes ask for in an update: of all in four updates, and of the one with most work."""
    made = make_rollouts(positions=positions)
    work = torch.tensor(
        [
            [
                made.choose_steps(Draws(7, ("generator", k), range(share * r, share * r + share))).sum()
                for r in range(64)
            ]
            for k in range(4)
        ]
    )
    asked = work + share  # one prediction more than the position says
    assert (asked.sum().item(), asked.amax(dim=1).tolist()) == (all_asked, slowest)


def test_stratified_samples_do_not_depend_on_the_split_of_a_batch(make_rollouts: Callable[..., Rollouts]) -> None:
    made = make_rollouts(positions="stratified")
    whole = made.draw(DRAWS, 0)
    parts = [made.draw(Draws(7, UPDATE, range(i, i + 1)), 0) for i in range(8)]
    assert torch.equal(whole.t, torch.cat([part.t for part in parts]))
    torch.testing.assert_close(whole.x0, torch.cat([part.x0 for part in parts]))
    assert made.choose_steps(DRAWS, {"final_sample"}).tolist() == [3] * 8


# -- the guide


@pytest.fixture
def sample(make_rollouts: Callable[..., Rollouts]) -> Sample:
    return make_rollouts().draw(DRAWS, 4)


def test_the_guides_predictions_apart(
    make_recipe: Callable[..., Recipe], toy_family: Any, toy_guidance: Any, sample: Sample
) -> None:
    dynamics = {"steps": 10, "teacher_scale": 0.75, "renoise": None}
    settings = make_recipe(guidance={"cfg": 2.5, "fake_scale": 1.5, "dynamics": dynamics}).guidance
    guide = Guide(settings, toy_family, toy_guidance)
    at = guide.renoise(sample)
    t = at.t.reshape(-1, 1, 1, 1)
    torch.testing.assert_close(at.x_t, (1 - t) * sample.x0 + t * at.noise)
    assert not at.x_t.requires_grad
    labels, null = torch.tensor(sample.prompts), torch.full((8,), 3)
    with torch.no_grad():
        fake = at.x_t - t * toy_guidance(at.x_t, at.t, labels, 1.5)
        scale = guide.teacher_scale(4)
        cond, uncond = (at.x_t - t * toy_guidance(at.x_t, at.t, asked, scale) for asked in (labels, null))
    assert 0 < scale < 0.75
    torch.testing.assert_close(guide.fake(sample, at), fake)
    torch.testing.assert_close(guide.conditional(sample, at), cond)
    torch.testing.assert_close(guide.unconditional(sample, at), uncond)
    torch.testing.assert_close(guide.real(sample, at), uncond + 2.5 * (cond - uncond))
    torch.testing.assert_close(guide.real(sample, at, cfg=1.0), cond)
    target = at.noise - sample.x0
    expected = denoising_loss(toy_guidance(at.x_t, at.t, labels, 1.5), target)
    torch.testing.assert_close(guide.loss(sample), expected)
    assert torch.equal(guide.renoise(sample).x_t, at.x_t)  # every call gives the same point
