"""How regression measures the distance between the generator's x0 and the teacher's: of latents, or of pictures."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, Protocol

from pydantic import Field

from dmdr_train.base.errors import UserError
from dmdr_train.recipe.fields import Section

if TYPE_CHECKING:
    from torch import Tensor, nn

    from dmdr_train.training.sample import Sample


class Distance(Protocol):
    """The distance between the x0 and the target of a sample."""

    def __call__(self, sample: "Sample") -> "Tensor":
        """The mean over the sample, a scalar with gradient at x0."""


class LatentMSE:
    """mean (x0 − target)², of the latents."""

    def __call__(self, sample: "Sample") -> "Tensor":
        from dmdr_core import denoising_loss

        assert sample.target is not None
        return denoising_loss(sample.x0, sample.target)


class LPIPS:
    """Mean LPIPS of the pictures, in float32: Σ_l mean_hw Σ_c w_lc (f_lc(x)/|f_l(x)| − f_lc(y)/|f_l(y)|)².

    f_l are the features of VGG16 at the last ReLU before each of its five poolings, and w_l the heads of LPIPS v0.1,
    which torchmetrics contains. Source: arXiv 1801.03924.

    Args:
        weights: file of VGG16's weights.
        pooling: of VGG16.

    Raises:
        UserError: the file cannot be read, or is not VGG16's.
    """

    def __init__(self, weights: str, pooling: Literal["max", "average"] = "max"):
        self.network = load_lpips(weights)
        if pooling == "average":
            average_pooling(self.network)

    def __call__(self, sample: "Sample") -> "Tensor":
        pictures, target = sample.pictures.float(), sample.target_pictures.float()
        # With `normalize`, the network takes pictures in [0, 1] instead of [-1, 1].
        return self.network.to(pictures.device)(pictures, target, normalize=True).mean()


class LatentMSESection(Section):
    kind: Literal["latent_mse"] = "latent_mse"
    smallest_picture: ClassVar[int] = 1

    @property
    def files(self) -> dict[str, str]:
        return {}

    def make(self) -> Distance:
        return LatentMSE()


class LPIPSSection(Section):
    kind: Literal["lpips"]
    smallest_picture: ClassVar[int] = 16  # VGG16 halves it four times
    weights: str = Field(description="file of VGG16's weights, torchvision's vgg16-397923af.pth")
    pooling: Literal["max", "average"] = Field(
        default="max", description="of VGG16: max as it was trained, or average as in DMD2's regression"
    )

    @property
    def files(self) -> dict[str, str]:
        return {"weights": self.weights}

    def make(self) -> Distance:
        return LPIPS(self.weights, self.pooling)


AnyDistance = Annotated[LatentMSESection | LPIPSSection, Field(discriminator="kind")]


def load_lpips(path: str) -> "nn.Module":
    """torchmetrics' LPIPS network on the CPU, frozen, in float32, with VGG16's weights from a file.

    Its public class downloads these weights and takes no file.

    Raises:
        UserError: the file cannot be read, or is not VGG16's.
    """
    import torch
    from dmdr_models.folder.state_dicts import load_state_dict
    from torchmetrics.functional.image import lpips

    with torch.device("meta"):  # without random numbers for VGG16's classifier, of 124 million weights
        network = lpips._NoTrainLpips(pretrained=False, net="vgg", pnet_rand=True)
    heads = load_state_dict(Path(lpips.__file__).parent / "lpips_models/vgg.pth")
    try:
        weights = vgg16_features(path, load_state_dict(path), network.net.state_dict())
    except ValueError as error:
        raise UserError("distance.weights", f"{error}; give torchvision's vgg16-397923af.pth") from None
    network.net.load_state_dict(weights, assign=True)
    network.load_state_dict(heads, strict=False, assign=True)
    return network.eval()


def vgg16_features(path: str, found: "Mapping[str, Tensor]", expected: "Mapping[str, Tensor]") -> "dict[str, Tensor]":
    """The convolutions of torchvision's VGG16, in float32, under the names that torchmetrics gives them.

    Args:
        path: the file, for error messages.
        found: its tensors: `features.0.weight` and so on; the classifier may be there.
        expected: tensors with torchmetrics' names and the right shapes: `slice1.0.weight` and so on.

    Raises:
        ValueError: a convolution is missing, or has another shape.
    """
    weights = {}
    for name, tensor in expected.items():
        original = "features." + name.partition(".")[2]
        if original not in found:
            raise ValueError(f"{path} lacks {original}")
        if found[original].shape != tensor.shape:
            shapes = tuple(found[original].shape), tuple(tensor.shape)
            raise ValueError(f"{path} has {original} of shape {shapes[0]}, not {shapes[1]}")
        weights[name] = found[original].float()
    return weights


def average_pooling(network: "nn.Module") -> None:
    """Replace every max pooling by the average over the same pixels."""
    from torch import nn

    for module in list(network.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.MaxPool2d):
                setattr(module, name, nn.AvgPool2d(child.kernel_size, child.stride, child.padding))
