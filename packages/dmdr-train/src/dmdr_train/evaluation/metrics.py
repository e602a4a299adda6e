"""Fréchet distance, inception score, precision and recall, of features and logits of pictures."""

import warnings

import torch
from torch import Tensor, nn


def frechet_distance(real: Tensor, fake: Tensor) -> float:
    """‖μ_r − μ_f‖² + tr(Σ_r + Σ_f − 2(Σ_r Σ_f)^½) of features `[N, D]`, in float64 (arXiv 1706.08500).

    torchmetrics would add the features of the other processes, which NCCL cannot gather from a CPU; this is off.
    """
    from torchmetrics.image.fid import FrechetInceptionDistance

    metric = FrechetInceptionDistance(feature=_Given(real.shape[1]), sync_on_compute=False)
    metric.set_dtype(torch.float64)
    metric.update(real.double(), real=True)
    metric.update(fake.double(), real=False)
    return float(metric.compute())


def inception_score(logits: Tensor) -> float:
    """exp(E KL(p(y|x) ‖ p(y))) of class logits `[N, K]` (arXiv 1606.03498)."""
    from torchmetrics.image.inception import InceptionScore

    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")  # about its memory, and about the spread over a single split
        torch.default_generator.manual_seed(0)  # torchmetrics shuffles the rows with this generator
        metric = InceptionScore(feature=_Given(logits.shape[1]), splits=1, sync_on_compute=False)
        metric.update(logits)
        return float(metric.compute()[0])


def precision_recall(real: Tensor, fake: Tensor, neighbours: int = 3) -> tuple[float, float]:
    """Precision, the share of `fake` inside the manifold of `real`, and recall, the reverse; features `[N, D]` each.

    The manifold of a set is the union of balls around its points; each ball reaches to the point's k-th nearest
    neighbour (arXiv 1904.06991, k = 3).
    """

    def inside(points: Tensor, manifold: Tensor) -> float:
        radius = torch.cdist(manifold, manifold).kthvalue(neighbours + 1, dim=1).values
        return (torch.cdist(points, manifold) <= radius).any(dim=1).float().mean().item()

    return inside(fake, real), inside(real, fake)


class _Given(nn.Module):
    """Returns its input: torchmetrics expects a feature extractor, and ours has already run."""

    def __init__(self, width: int):
        super().__init__()
        self.num_features = width

    def forward(self, features: Tensor) -> Tensor:
        return features
