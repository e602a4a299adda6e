"""How good pictures are: Fréchet distance, precision, recall, accuracy, inception score.

Features and classes come from a classifier that no reward uses; a second Fréchet distance is taken in pixel space.
All randomness comes from the evaluation's own seed.
"""

import json
import warnings
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from dmdr_core import randn
from dmdr_models.family import Family
from dmdr_models.sampling import sample
from torch import Tensor, nn

from dmdr_train import recipe
from dmdr_train.draws import named_generator
from dmdr_train.engines import gather_rows
from dmdr_train.preflight import pictures_in

BATCH = 125


@dataclass(frozen=True)
class Scores:
    """Of one set of pictures against the reference set."""

    name: str
    frechet: float
    precision: float
    recall: float
    accuracy: float
    inception: float
    frechet_pixels: float


@dataclass(frozen=True)
class Measured:
    """What a set of pictures looks like to the evaluation: one row per picture."""

    features: Tensor
    pixels: Tensor
    logits: Tensor
    labels: Tensor


class _Given(nn.Module):
    """Hands features through: torchmetrics asks for an extractor, and ours has already run."""

    def __init__(self, width: int):
        super().__init__()
        self.num_features = width

    def forward(self, features: Tensor) -> Tensor:
        return features


def frechet_distance(real: Tensor, fake: Tensor) -> float:
    """‖μ_r − μ_f‖² + tr(Σ_r + Σ_f − 2(Σ_r Σ_f)^½) of features `[N, D]`, in float64 (arXiv 1706.08500)."""
    from torchmetrics.image.fid import FrechetInceptionDistance

    metric = FrechetInceptionDistance(feature=_Given(real.shape[1]))
    metric.set_dtype(torch.float64)
    metric.update(real.double(), real=True)
    metric.update(fake.double(), real=False)
    return float(metric.compute())


def inception_score(logits: Tensor) -> float:
    """exp(E KL(p(y|x) ‖ p(y))) of class logits `[N, K]` (arXiv 1606.03498)."""
    from torchmetrics.image.inception import InceptionScore

    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")  # of its memory, and of the spread over a single split
        torch.default_generator.manual_seed(0)  # it shuffles the rows with this one; a GPU's are left alone
        metric = InceptionScore(feature=_Given(logits.shape[1]), splits=1)
        metric.update(logits)
        return float(metric.compute()[0])


def precision_recall(real: Tensor, fake: Tensor, neighbours: int = 3) -> tuple[float, float]:
    """Share of `fake` inside the manifold of `real`, and the reverse, `[N, D]` features each.

    A set's manifold is the union of balls around its points that reach their k-th nearest neighbour
    (arXiv 1904.06991, k = 3).
    """

    def inside(points: Tensor, manifold: Tensor) -> float:
        radius = torch.cdist(manifold, manifold).kthvalue(neighbours + 1, dim=1).values
        return (torch.cdist(points, manifold) <= radius).any(dim=1).float().mean().item()

    return inside(fake, real), inside(real, fake)


class Evaluator:
    """Scores pictures against a reference set; every process makes its share of them."""

    def __init__(self, settings: recipe.Evaluation, family: Family, device: torch.device):
        from dmdr_rewards.classifier import ImageClassifier

        self.settings = settings
        self.family = family
        self.device = device
        self.classifier = ImageClassifier.from_folder(settings.classifier, device)
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.count = settings.pictures // self.world
        assert family.num_classes is not None
        first = self.rank * self.count
        self.labels = torch.arange(first, first + self.count) % family.num_classes
        self.reference = self._measure(self._reference_pictures("reference"), self.labels)

    def real(self) -> Scores:
        """Another draw of real pictures: the best that any model can do."""
        return self._score("real pictures", self._reference_pictures("real"))

    def model(
        self, name: str, network: Any, steps: int, method: str, guidance: float = 1.0, shift: float = 1.0
    ) -> Scores:
        return self._score(name, self._sampled(network, steps, method, guidance, shift))

    @torch.no_grad()
    def _sampled(self, network: Any, steps: int, method: str, guidance: float, shift: float) -> Iterable[Tensor]:
        for start in range(0, self.count, BATCH):
            labels = self.labels[start : start + BATCH]
            index = range(self.rank * self.count + start, self.rank * self.count + start + len(labels))
            noise = [named_generator(self.settings.seed, "noise", i) for i in index]
            fresh = [named_generator(self.settings.seed, "rollout", i) for i in index]
            latents = sample(
                self.family,
                network,
                self.family.condition(labels.tolist()),
                randn((len(labels), *self.family.latent_shape), noise, device=self.device),
                steps,
                method,
                guidance,
                shift,
                fresh,
            )
            yield self.family.decode(latents)

    def _reference_pictures(self, name: str) -> Iterable[Tensor]:
        if self.settings.reference == "shapes":
            from dmdr_train.demo import drawing

            for start in range(0, self.count, BATCH):
                generator = named_generator(self.settings.seed, name, self.rank * self.count + start)
                yield drawing.draw(self.labels[start : start + BATCH], generator).to(self.device)
        else:
            yield from _folder_pictures(
                Path(self.settings.reference), self.labels, name, self.settings.seed, self.device
            )

    @torch.no_grad()
    def _measure(self, batches: Iterable[Tensor], labels: Tensor) -> Measured:
        features, pixels, logits = [], [], []
        for images in batches:
            seen = self.classifier(images)
            features.append(seen.features.float().cpu())
            logits.append(seen.logits.float().cpu())
            pixels.append(F.adaptive_avg_pool2d(images.float(), 8).flatten(1).cpu())
        return Measured(
            self._gather(torch.cat(features)),
            self._gather(torch.cat(pixels)),
            self._gather(torch.cat(logits)),
            self._gather(labels),
        )

    def _gather(self, rows: Tensor) -> Tensor:
        """The rows of every process."""
        return gather_rows(rows.to(self.device)).cpu()

    def _score(self, name: str, batches: Iterable[Tensor]) -> Scores:
        made = self._measure(batches, self.labels)
        precision, recall = precision_recall(self.reference.features, made.features)
        return Scores(
            name,
            frechet_distance(self.reference.features, made.features),
            precision,
            recall,
            (made.logits.argmax(dim=1) == made.labels).float().mean().item(),
            inception_score(made.logits),
            frechet_distance(self.reference.pixels, made.pixels),
        )


def _folder_pictures(folder: Path, labels: Tensor, name: str, seed: int, device: torch.device) -> Iterable[Tensor]:
    """Pictures from `folder/<class name>/*`, classes in alphabetical order, drawn without replacement where enough."""
    import numpy as np
    from PIL import Image

    classes = sorted(p for p in folder.iterdir() if p.is_dir())
    files = [pictures_in(c) for c in classes]
    generator = named_generator(seed, "files")
    orders = [torch.randperm(len(f), generator=generator).tolist() for f in files]
    half = 0 if name == "reference" else 1
    for start in range(0, len(labels), BATCH):
        batch = []
        for i, label in enumerate(labels[start : start + BATCH].tolist()):
            # The reference set and the "real" row take alternate files, so that no picture is in both.
            position = 2 * ((start + i) // len(classes)) + half
            file = files[label][orders[label][position % len(files[label])]]
            with Image.open(file) as image:
                array = np.asarray(image.convert("RGB"), dtype=np.float32) / 255
            batch.append(torch.from_numpy(array).permute(2, 0, 1))
        yield torch.stack(batch).to(device)


def save_scores(folder: Path, scores: dict[str, Scores]) -> None:
    """Keep the scores of a run in evaluation.json, by stage, so that a resumed run need not measure them again."""
    text = json.dumps({key: asdict(value) for key, value in scores.items()}, indent=2)
    (folder / "evaluation.json").write_text(text, encoding="utf-8")


def read_scores(folder: Path) -> dict[str, Scores]:
    path = folder / "evaluation.json"
    if not path.exists():
        return {}
    return {key: Scores(**value) for key, value in json.loads(path.read_text(encoding="utf-8")).items()}
