"""How alike two sets of pictures are, by the features of a network: Tensor[N, D] of the real and of the other pictures.

    frechet_distance    distance of two normal distributions                    arXiv 1706.08500, lower is better
    kernel_distance     squared MMD with a cubic kernel, KID                    arXiv 1801.01401, lower is better
    precision_recall    shares of pictures inside the manifold of the others    arXiv 1904.06991
    density_coverage    the same two questions, robust against outliers         arXiv 2002.09797
    inception_score     of the class logits of one set                          arXiv 1606.03498

A set of n pictures is compared in blocks of `ROWS` rows, so that n² distances are never in memory at once. All results
depend on the features alone: no function leaves a trace in torch's random numbers.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from os import PathLike

import torch
from torch import Tensor, nn

ROWS = 2048
"""Rows of the matrix of distances that are in memory at once; a block of 50,000 columns has 400 MB."""


@dataclass(frozen=True)
class Statistics:
    """mean Tensor[D] and covariance Tensor[D, D] of a set of features, in float64."""

    mean: Tensor
    covariance: Tensor

    @classmethod
    def of(cls, features: Tensor) -> "Statistics":
        """Those of the rows of Tensor[N, D], with N − 1 in the denominator. Raises ValueError for fewer than 2 rows."""
        _enough(features, 2)
        features = features.double()
        return cls(features.mean(dim=0), features.T.cov(correction=1).reshape(features.shape[1], -1))

    @classmethod
    def from_npz(cls, path: str | PathLike[str]) -> "Statistics":
        """Those in a file of arrays `mu` [D] and `sigma` [D, D], such as ADM's reference batches; no pickle is read.

        Raises ValueError for a file that is missing or damaged, that lacks these arrays, or whose numbers are not all
        finite.
        """
        import numpy as np

        try:
            with np.load(path, allow_pickle=False) as arrays:
                mean, covariance = (torch.from_numpy(np.asarray(arrays[name], np.float64)) for name in ("mu", "sigma"))
        except Exception as error:  # readers of damaged files raise any exception
            raise ValueError(f"{path} cannot be read as statistics: {error}; give an .npz with mu and sigma") from error
        if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
            shapes = f"mu {tuple(mean.shape)} and sigma {tuple(covariance.shape)}"
            raise ValueError(f"{path} has {shapes}: give mu [D] and sigma [D, D]")
        if not (mean.isfinite().all() and covariance.isfinite().all()):
            raise ValueError(f"{path} holds statistics that are not finite: compute them again")
        return cls(mean, covariance)


def frechet_distance(real: Tensor | Statistics, fake: Tensor | Statistics) -> float:
    """‖μ_r − μ_f‖² + tr(Σ_r + Σ_f − 2(Σ_r Σ_f)^½), in float64 on the CPU.

    Raises ValueError for sets of different widths, or of fewer than 2 pictures.
    """
    a, b = (each if isinstance(each, Statistics) else Statistics.of(each.cpu()) for each in (real, fake))
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"one set has features of width {len(a.mean)} and the other of {len(b.mean)}: use one network")
    root = torch.linalg.eigvals(a.covariance @ b.covariance).sqrt().real.sum()
    return float((a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace() - 2 * root)


def kernel_distance(real: Tensor, fake: Tensor, subsets: int = 100, size: int = 1000) -> float:
    """Mean over random subsets of `size` pictures of the unbiased MMD² with k(x, y) = (x·y / D + 1)³, in float64.

    A set of fewer pictures makes the subsets smaller. Raises ValueError for fewer than 2 pictures.
    """
    from torchmetrics.image.kid import KernelInceptionDistance

    _enough(real, 2)
    _enough(fake, 2)
    with _seeded():
        metric = KernelInceptionDistance(
            _Given(real.shape[1]), subsets, min(size, len(real), len(fake)), sync_on_compute=False
        )
        metric.update(real.double().cpu(), real=True)
        metric.update(fake.double().cpu(), real=False)
        return float(metric.compute()[0])


def inception_score(logits: Tensor, part: int = 5000) -> float:
    """exp(E KL(p(y|x) ‖ p(y))) of class logits Tensor[N, K].

    Sets of 2 · part pictures and more are split, and the mean over the parts of a random order is taken, as is usual:
    50,000 pictures make ten parts. Raises ValueError for an empty set.
    """
    from torchmetrics.image.inception import InceptionScore

    _enough(logits, 1)
    with _seeded():
        metric = InceptionScore(
            feature=_Given(logits.shape[1]), splits=max(1, len(logits) // part), sync_on_compute=False
        )
        metric.update(logits.cpu())
        return float(metric.compute()[0])


def precision_recall(real: Tensor, fake: Tensor, neighbours: int = 3, rows: int = ROWS) -> tuple[float, float]:
    """Precision, the share of `fake` inside the manifold of `real`, and recall, the reverse.

    The manifold of a set is the union of balls around its points; each ball reaches to the point's k-th nearest
    neighbour. Raises ValueError for a set of at most `neighbours` pictures.
    """

    _enough(fake, neighbours + 1)

    def inside(points: Tensor, manifold: Tensor) -> float:
        radius = _radii(manifold, neighbours, rows)
        return _count(lambda d: (d <= radius).any(dim=1), points, manifold, rows) / len(points)

    return inside(fake, real), inside(real, fake)


def density_coverage(real: Tensor, fake: Tensor, neighbours: int = 5, rows: int = ROWS) -> tuple[float, float]:
    """Density, the mean number of balls of `real` around a picture of `fake` divided by k; it may exceed 1.

    Coverage is the share of the balls of `real` that hold a picture of `fake`. The balls are those of
    `precision_recall`. Raises ValueError for a set of at most `neighbours` pictures.
    """
    _enough(fake, neighbours + 1)
    radius = _radii(real, neighbours, rows)
    density = _count(lambda d: d <= radius, fake, real, rows) / (neighbours * len(fake))
    held = torch.zeros(len(real), dtype=torch.bool, device=real.device)
    for distances in _blocks(fake, real, rows):
        held |= (distances <= radius).any(dim=0)
    return density, int(held.sum()) / len(real)


def _blocks(points: Tensor, others: Tensor, rows: int) -> Iterator[Tensor]:
    """The distances of all points to all others, `rows` points at a time: Tensor[≤ rows, M]."""
    for part in points.split(rows):
        yield torch.cdist(part, others)


def _radii(points: Tensor, neighbours: int, rows: int) -> Tensor:
    """The distance of each point to its k-th nearest neighbour, Tensor[N]; the nearest of all is the point itself."""
    _enough(points, neighbours + 1)
    return torch.cat([d.kthvalue(neighbours + 1, dim=1).values for d in _blocks(points, points, rows)])


def _count(holds: Callable[[Tensor], Tensor], points: Tensor, others: Tensor, rows: int) -> int:
    return sum(int(holds(distances).sum()) for distances in _blocks(points, others, rows))


def _enough(features: Tensor, least: int) -> None:
    if len(features) < least:
        raise ValueError(f"a set of {len(features)} pictures is too small: give at least {least}")


@contextmanager
def _seeded() -> Iterator[None]:
    """torchmetrics draws from torch's own generator, and warns of its memory and of the spread over one subset."""
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        torch.default_generator.manual_seed(0)
        yield


class _Given(nn.Module):
    """Returns its input: torchmetrics expects a feature extractor, and ours has already run."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.num_features = width

    def forward(self, features: Tensor) -> Tensor:
        return features
