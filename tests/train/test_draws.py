"""Randomness: by name, whatever the batch is split into and whatever was drawn before."""

import torch
from dmdr_core import randn
from dmdr_train.base.random_draws import Draws, named_generator
from dmdr_train.data.prompt_order import ClassLabels
from torch import Tensor


def numbers(*name: str | int, seed: int = 3) -> Tensor:
    return torch.rand(4, generator=named_generator(seed, *name))


def test_the_same_name_gives_the_same_numbers() -> None:
    assert torch.equal(numbers("generator", 5, "noise", 2), numbers("generator", 5, "noise", 2))


def test_every_part_of_the_name_counts() -> None:
    names = [
        ("generator", 5, "noise", 2),
        ("fake_score", 5, "noise", 2),
        ("generator", 6, "noise", 2),
        ("generator", 5, "rollout", 2),
        ("generator", 5, "noise", 3),
        ("generator", 5, "noise"),
    ]
    drawn = [numbers(*name) for name in names] + [numbers(*names[0], seed=4)]
    assert len({tuple(row.tolist()) for row in drawn}) == len(drawn)


def test_numbers_are_pinned() -> None:
    """Runs can be repeated with later versions: a change of these numbers is a change of every run."""
    assert named_generator(30, "generator", 0, "noise", 1).initial_seed() == 10002656920073000632


def test_the_split_of_a_batch_does_not_matter() -> None:
    whole = randn((6, 2), Draws(3, ("generator", 1), range(6)).each("noise"))
    parts = [randn((2, 2), Draws(3, ("generator", 1), range(s, s + 2)).each("noise")) for s in (0, 2, 4)]
    assert torch.equal(whole, torch.cat(parts))
    assert len(whole.unique()) == 12


def test_purposes_and_updates_differ() -> None:
    draws = Draws(3, ("generator", 1), range(1))
    drawn = [torch.rand((), generator=g) for p in ("noise", "rollout") for g in draws.each(p)]
    drawn += [torch.rand((), generator=Draws(3, ("generator", 2), range(1)).each("noise")[0])]
    drawn += [torch.rand((), generator=draws.shared("noise"))]
    assert len({float(d) for d in drawn}) == 4


def test_shared_draws_do_not_know_the_split() -> None:
    first, second = (Draws(3, ("generator", 1), samples).shared("cfg") for samples in (range(2), range(2, 4)))
    assert torch.equal(torch.rand(3, generator=first), torch.rand(3, generator=second))


def test_global_randomness_is_left_alone() -> None:
    before = torch.get_rng_state()
    Draws(3, ("generator", 1), range(4)).each("noise")
    ClassLabels([1, 2]).draw(Draws(3, ("generator", 1), range(4)))
    assert torch.equal(torch.get_rng_state(), before)


def test_labels_are_uniform_over_the_chosen_classes() -> None:
    labels = ClassLabels([2, 5, 7]).draw(Draws(0, ("generator", 0), range(3000)))
    counts = torch.bincount(torch.tensor(labels), minlength=8)
    assert counts.nonzero().flatten().tolist() == [2, 5, 7]
    assert (counts[[2, 5, 7]] - 1000).abs().max() < 110  # four standard deviations are 103
