"""Measures of features against closed forms, sets that can be counted by eye, and second implementations."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from dmdr_rewards.compare import metrics
from dmdr_rewards.compare.metrics import (
    Statistics,
    density_coverage,
    frechet_distance,
    inception_score,
    kernel_distance,
    precision_recall,
)
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


def test_scores_that_shuffle_repeat_themselves() -> None:
    """To the last bit, and without a trace in torch's own generator."""
    logits = 3 * torch.randn(500, 7, generator=torch.Generator().manual_seed(0))
    found = set()
    for seed in range(3):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        found.add((inception_score(logits), kernel_distance(logits, logits[:100] + 1, subsets=2, size=50)))
        assert torch.equal(torch.get_rng_state(), before)
    assert len(found) == 1


def two_sets(count: int = 150, width: int = 6) -> tuple[Tensor, Tensor]:
    draws = torch.Generator().manual_seed(3)
    real = torch.randn(count, width, generator=draws)
    return real, 0.7 * torch.randn(count - 30, width, generator=draws) + 0.4


def test_the_frechet_distance_is_that_of_torchmetrics() -> None:
    from torchmetrics.image.fid import FrechetInceptionDistance

    real, fake = two_sets()
    metric = FrechetInceptionDistance(feature=metrics._Given(6), sync_on_compute=False).set_dtype(torch.float64)
    metric.update(real.double(), real=True)
    metric.update(fake.double(), real=False)
    assert frechet_distance(real, fake) == pytest.approx(float(metric.compute()), rel=1e-9)


def test_the_kernel_distance_by_its_formula() -> None:
    """With subsets as large as the sets: Σ_{i≠j} k(x_i, x_j) / n(n−1) + the same of y − 2 Σ k(x_i, y_j) / n²."""
    real, fake = (x[:120].double() for x in two_sets())

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / a.shape[1] + 1) ** 3

    def without_diagonal(k: Tensor) -> Tensor:
        return (k.sum() - k.trace()) / (len(k) * (len(k) - 1))

    expected = (
        without_diagonal(kernel(real, real)) + without_diagonal(kernel(fake, fake)) - 2 * kernel(real, fake).mean()
    )
    assert kernel_distance(real, fake, subsets=3) == pytest.approx(float(expected), rel=1e-9)
    assert abs(kernel_distance(real, two_sets(500)[0], subsets=20, size=100)) < float(expected) / 5


def prdc(real: Tensor, fake: Tensor, k: int) -> dict[str, float]:
    """The formulas of the package prdc (Naeem et al.), in float64 with numpy alone."""
    x, y = real.double().numpy(), fake.double().numpy()

    def distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.sqrt(((a[:, None] - b[None]) ** 2).sum(axis=-1))

    x_radius, y_radius = (np.sort(distances(z, z), axis=-1)[:, k] for z in (x, y))
    between = distances(x, y)
    return {
        "precision": (between < x_radius[:, None]).any(axis=0).mean(),
        "recall": (between < y_radius[None]).any(axis=1).mean(),
        "density": (between < x_radius[:, None]).sum(axis=0).mean() / k,
        "coverage": (between.min(axis=1) < x_radius).mean(),
    }


@pytest.mark.parametrize("rows", [7, 64, 10_000])
def test_manifolds_are_those_of_a_second_implementation(rows: int) -> None:
    """Bit for bit, in blocks of any size."""
    real, fake = two_sets()
    expected = prdc(real, fake, 4)
    assert precision_recall(real, fake, 4, rows) == (expected["precision"], expected["recall"])
    assert density_coverage(real, fake, 4, rows) == (expected["density"], expected["coverage"])
    assert 0 < expected["recall"] < 1
    assert 0 < expected["coverage"] < 1 < expected["density"]


def test_no_block_of_distances_is_larger_than_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    seen, cdist = [], torch.cdist
    monkeypatch.setattr(torch, "cdist", lambda a, b: seen.append(len(a)) or cdist(a, b))
    real, fake = two_sets()
    precision_recall(real, fake, rows=40)
    density_coverage(real, fake, rows=40)
    assert max(seen) == 40


@pytest.mark.parametrize("measure", [precision_recall, density_coverage, kernel_distance, frechet_distance])
def test_too_few_pictures_are_refused(measure: Callable[[Tensor, Tensor], object]) -> None:
    """None at all, too: every picture of a broken student is left out."""
    real, fake = two_sets()
    for few in ((real, fake[:1]), (real[:1], fake), (real, fake[:0]), (real[:0], fake)):
        with pytest.raises(ValueError, match=r"a set of [01] pictures is too small: give at least"):
            measure(*few)


def test_statistics_from_a_file(tmp_path: Path) -> None:
    real, fake = two_sets()
    known = Statistics.of(real)
    np.savez(tmp_path / "adm.npz", mu=known.mean.numpy(), sigma=known.covariance.numpy(), arr_0=np.zeros(3))
    assert frechet_distance(Statistics.from_npz(tmp_path / "adm.npz"), fake) == frechet_distance(real, fake)
    with pytest.raises(ValueError, match="width 6 and the other of 5: use one network"):
        frechet_distance(real, fake[:, :5])


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"mu": np.zeros(3)}, "sigma"),
        ({"mu": np.zeros(3), "sigma": np.zeros((2, 2))}, r"mu \(3,\) and sigma \(2, 2\): give mu"),
        ({"mu": np.zeros(1), "sigma": np.full((1, 1), np.nan)}, "holds statistics that are not finite"),
        ({"mu": np.array([{}], dtype=object), "sigma": np.zeros((1, 1))}, "allow_pickle=False"),
    ],
)
def test_files_of_other_things_are_refused(tmp_path: Path, arrays: dict[str, np.ndarray], message: str) -> None:
    np.savez(tmp_path / "adm.npz", **arrays)
    with pytest.raises(ValueError, match=message):
        Statistics.from_npz(tmp_path / "adm.npz")
    (tmp_path / "text.npz").write_text("mu")
    with pytest.raises(ValueError, match="cannot be read as statistics"):
        Statistics.from_npz(tmp_path / "text.npz")
