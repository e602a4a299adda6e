"""The features of a set of pictures: workers decode and preprocess, the networks share each decoded picture."""

import math
import warnings
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from dmdr_rewards.base.errors import StoppedError, naming
from dmdr_rewards.compare.networks import FeatureNetwork
from dmdr_rewards.compare.picture_sets import LEAST
from dmdr_rewards.score.scoring import Pictures, collate, device_of, progress
from dmdr_rewards.score.sources import Item


@dataclass(frozen=True)
class PictureSet:
    """The features of a set, float32 Tensor[N, D] for each network, and the number of pictures that were left out."""

    features: dict[str, Tensor]
    left_out: int

    @property
    def pictures(self) -> int:
        """The number N of pictures."""
        return len(next(iter(self.features.values())))


def features(
    networks: Mapping[str, FeatureNetwork], items: Sequence[Item], options: Namespace, which: str
) -> PictureSet:
    """The features of each picture, in the order of the pictures, on the CPU.

    options  batch_size, device, workers
    which    the set's name, for the messages

    Pictures that cannot be read are left out, with a warning. Raises StoppedError if too few are left, for features
    that are not finite, and for lack of memory.
    """
    device = device_of(options.device)
    steps = list(dict.fromkeys(network.steps for network in networks.values()))
    loader = DataLoader(
        Pictures([item.source for item in items], steps, arrays=False),
        batch_size=options.batch_size,
        num_workers=min(options.workers, math.ceil(len(items) / options.batch_size)),
        collate_fn=collate,
        pin_memory=device.type == "cuda",
    )
    errors: list[str | None] = []
    found: dict[str, list[Tensor]] = {name: [] for name in networks}
    try:
        with progress(len(items)) as advance, torch.inference_mode():
            for batch in loader:
                errors += batch.errors
                advance(len(batch.errors))
                if not batch.pixels:  # not one picture of the batch can be read
                    continue
                pixels = dict(zip(steps, (each.to(device) for each in batch.pixels), strict=True))
                for name, network in networks.items():
                    with naming(f"--features {name}", StoppedError):
                        found[name].append(network(pixels[network.steps]).cpu())
    except torch.OutOfMemoryError as error:
        raise StoppedError("--batch-size", f"{options.batch_size} is too many for the memory: {error}") from error
    return _checked(found, errors, items, which)


def _checked(
    found: dict[str, list[Tensor]], errors: Sequence[str | None], items: Sequence[Item], which: str
) -> PictureSet:
    failed = [(item.file_name, error) for item, error in zip(items, errors, strict=True) if error is not None]
    read = [item.file_name for item, error in zip(items, errors, strict=True) if error is None]
    if failed:
        name, error = failed[0]
        warnings.warn(f"{which}: pictures left out: {len(failed)}, such as {name}: {error}", stacklevel=3)
    if len(read) < LEAST:
        raise StoppedError(which, f"{len(read)} of {len(items)} pictures can be read: give at least {LEAST}")
    features = {name: torch.cat(parts) for name, parts in found.items()}
    for network, each in features.items():
        finite = each.isfinite().all(dim=1)
        if not finite.all():
            name = read[int(finite.long().argmin())]
            raise StoppedError(
                f"--features {network}", f"the features of {name} in {which} are not finite: try --dtype float32"
            )
    return PictureSet(features, len(failed))
