"""Inception v3: the features of the Fréchet and the kernel Inception distance, and the logits of the inception score.

    pt_inception-2015-12-05-6726825d.pth   the network of the published FIDs, ported from TensorFlow
    inception_v3_google-0cc3c7bd.pth       torchvision's own

Both have the layers of "Rethinking the Inception Architecture", arXiv 1512.00567, with torchvision's names. The first
one has 1,008 classes and pools as TensorFlow's graph did: an average leaves the padding out, and the last block takes a
maximum. Its pictures are squashed to 299x299 by TensorFlow's old bilinear filter, without antialiasing. Features of the
two files cannot be compared with each other.
"""

from dataclasses import dataclass
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dmdr_rewards.networks import checkpoint_files
from dmdr_rewards.networks.frozen_network import FrozenNetwork, precision
from dmdr_rewards.pictures.images import Picture, as_picture, as_tensor
from dmdr_rewards.pictures.preprocess import Preprocess

FETCH = (
    "curl -LO https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
    "pt_inception-2015-12-05-6726825d.pth"
)
"""The command that downloads the weights of the published FIDs."""

_TENSORFLOW_CLASSES = 1008
_SIDE = 299
_TORCHVISION = Preprocess(
    resize=342, crop=(_SIDE, _SIDE), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), filter="bilinear", halves="even"
)
"""torchvision normalises by ImageNet's mean and std, and its network undoes that."""


@dataclass(frozen=True)
class TensorFlowSquash:
    """Squash pictures as TensorFlow 1's `resize_bilinear` does, then map 0 … 255 to (x − 128) / 128.

    Pixel i of the result lies at i · old / new between the old pixels, without the half pixel of other filters.
    """

    side: int = _SIDE

    def picture(self, picture: Picture) -> Tensor:
        """One picture (see `dmdr_rewards.pictures.images`) -> float32 Tensor[3, side, side].

        Raises ValueError for a picture that cannot be read.
        """
        pixels = 255 * as_tensor(as_picture(picture)).float()
        for dim in (-1, -2):
            place = torch.arange(self.side) * (pixels.shape[dim] / self.side)
            low = place.long()
            high = (low + 1).clamp(max=pixels.shape[dim] - 1)
            weight = (place - low).view(-1, *[1] * (-1 - dim))
            below, above = pixels.index_select(dim, low), pixels.index_select(dim, high)
            pixels = below + (above - below) * weight
        return (pixels - 128) / 128

    def __str__(self) -> str:
        return f"squash to {self.side}x{self.side}, TensorFlow's bilinear, no antialias; (x - 128) / 128"


def inception(
    checkpoint: str | PathLike[str], device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[FrozenNetwork, Preprocess | TensorFlowSquash, FrozenNetwork]:
    """Load one of the two files -> the network, its preprocessing, and the head.

    The network maps pixels to features Tensor[B, 2048], and the head features to class logits. The number of classes
    shows which file it is. TensorFlow's logits are taken without their bias, as in the published inception scores.

    Raises ValueError for a file that is missing, damaged, unsafe or of another model.
    """
    from torchvision.models import Inception3

    path = Path(checkpoint)
    # The auxiliary classifier serves training only; the counters of batches are not in every version of the files.
    tensors = {
        name: tensor
        for name, tensor in checkpoint_files.load(path, "state_dict").items()
        if not name.startswith("AuxLogits.") and not name.endswith(".num_batches_tracked")
    }
    last = tensors.get("fc.weight")
    classes = len(last) if last is not None and last.ndim else 0
    with torch.device("meta"):
        model = Inception3(num_classes=classes, aux_logits=False, init_weights=False)
    counters = {name: torch.zeros((), dtype=torch.long) for name in model.state_dict() if name.endswith("_tracked")}
    checkpoint_files.assign(model, {**tensors, **counters}, path)
    head, model.fc = model.fc, nn.Identity()
    tensorflow = classes == _TENSORFLOW_CLASSES
    if tensorflow:
        _pool_as_tensorflow(model)
        head.register_parameter("bias", None)
    steps = TensorFlowSquash() if tensorflow else _TORCHVISION
    return FrozenNetwork(model, device, dtype), steps, FrozenNetwork(head, device, precision(dtype))


def _pool_as_tensorflow(model: Any) -> None:
    average = partial(F.avg_pool2d, kernel_size=3, stride=1, padding=1, count_include_pad=False)
    maximum = partial(F.max_pool2d, kernel_size=3, stride=1, padding=1)
    for name in ("5b", "5c", "5d", "6b", "6c", "6d", "6e", "7b", "7c"):
        block = model.get_submodule(f"Mixed_{name}")
        model.set_submodule(f"Mixed_{name}", _Pooling(block, maximum if name == "7c" else average))


class _Pooling(nn.Module):
    """A block of torchvision whose last branch pools in another way."""

    def __init__(self, block: Any, pool: Any) -> None:
        super().__init__()
        self.block, self.pool = block, pool

    def forward(self, x: Tensor) -> Tensor:
        *branches, _ = self.block._forward(x)
        return torch.cat([*branches, self.block.branch_pool(self.pool(x))], dim=1)
