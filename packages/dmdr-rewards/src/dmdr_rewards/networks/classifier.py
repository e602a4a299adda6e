"""Image classifiers: class logits, and the features from which a linear head computes them."""

import json
from os import PathLike
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from dmdr_rewards.base.errors import MissingError
from dmdr_rewards.networks import checkpoint_files
from dmdr_rewards.networks.frozen_network import FrozenNetwork, precision
from dmdr_rewards.pictures.images import Images
from dmdr_rewards.pictures.preprocess import Preprocess, chosen
from dmdr_rewards.pictures.preprocess import from_folder as preprocess_of


class Classified(NamedTuple):
    """features Tensor[B, F] and logits Tensor[B, K] of B pictures; logits = head(features)."""

    features: Tensor
    logits: Tensor


class ImageClassifier:
    """A frozen network and its linear head. Gradients reach the pixels, never the weights.

    `tower` maps preprocessed pixels to features Tensor[B, F] and runs under autocast in `dtype`. `head` and everything
    after it stay in float32, which is precise enough for sums of exponentials. With `dtype` float64 everything is
    float64, for tests of gradients.

    Raises ValueError for a dtype that is not in `frozen_network.DTYPES`.
    """

    def __init__(
        self,
        body: nn.Module,
        head: nn.Linear,
        preprocess: Preprocess,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.preprocess = preprocess
        self.num_features, self.num_classes = head.in_features, head.out_features
        self.tower = FrozenNetwork(body, device, dtype)
        self.head = FrozenNetwork(head, device, precision(dtype))

    @classmethod
    def from_folder(
        cls,
        folder: str | PathLike[str],
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        preprocess: Literal["reference", "dmdr"] = "reference",
    ) -> "ImageClassifier":
        """Load any transformers image classifier that ends in a linear layer, from a local folder.

        The folder holds config.json, *.safetensors (pickles are not read) and preprocessor_config.json, which defines
        how pictures are resized, cropped and normalised. Without the latter, pictures are used unchanged, with a
        warning. preprocess="dmdr" squashes pictures to the same size instead.

        Raises ValueError for a folder without these files or of another kind of model, and for weights that are
        missing, unexpected or of a wrong shape.
        """
        path = Path(folder)
        model = _load_model(path)
        body, head = _split(model, path)
        return cls(body, head, chosen(preprocess, preprocess_of(path)), device, dtype)

    def __call__(self, images: Images) -> Classified:
        """B pictures (see `dmdr_rewards.pictures.images`) -> features and logits, float32 on the classifier's device.

        Raises ValueError for pictures that cannot be scored.
        """
        features = self.tower(self.preprocess.pixels(images, self.tower.device, self.tower.precision))
        return Classified(features, self.head(features))

    def features(self, images: Images) -> Tensor:
        """The input of the last linear layer, Tensor[B, F]."""
        return self(images).features

    def logits(self, images: Images) -> Tensor:
        """Unnormalised log-probabilities, Tensor[B, K]."""
        return self(images).logits


class _Features(nn.Module):
    """A transformers classifier without its last linear layer."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor) -> Tensor:
        return self.model(pixel_values=pixels).logits


def _load_model(folder: Path) -> nn.Module:
    if not folder.is_dir():
        raise MissingError(f"checkpoint {folder}: no such folder; give a local one in the format of save_pretrained")
    if not (folder / "config.json").exists() or not any(folder.glob("*.safetensors")):
        raise MissingError(f"checkpoint {folder} must hold config.json and *.safetensors; pickled weights are not read")

    from transformers import AutoModelForImageClassification

    try:
        model, report = AutoModelForImageClassification.from_pretrained(
            folder,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # refused below, listed by name together with all others
            output_loading_info=True,
        )
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise ValueError(f"checkpoint {folder} cannot be loaded as an image classifier: {error}") from error
    checkpoint_files.refuse_unless_loaded(folder, report)
    return model


def _split(model: nn.Module, folder: Path) -> tuple[nn.Module, nn.Linear]:
    linears = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.split(".")[0] == "classifier"
    ]
    if not linears:
        architecture = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("architectures")
        raise ValueError(f"checkpoint {folder}: {architecture} has no linear layer under the name `classifier`")
    name, head = linears[-1]
    model.set_submodule(name, nn.Identity())
    return _Features(model), head
