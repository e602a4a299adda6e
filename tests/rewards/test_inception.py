"""Inception against values of torch-fidelity 0.4.0, which were recorded with the same weights and pixels."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dmdr_rewards.networks.inception import TensorFlowSquash, inception
from dmdr_rewards.pictures.preprocess import Preprocess
from PIL import Image
from torch import Tensor


def weights(classes: int) -> dict[str, Tensor]:
    """Random tensors that keep the size of the activations, in the order of the network's layers."""
    from torchvision.models import Inception3

    with torch.device("meta"):
        model = Inception3(num_classes=classes, aux_logits=False, init_weights=False)
    draws = torch.Generator().manual_seed(0)
    state = {}
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            scale = (2 / tensor[0].numel()) ** 0.5 if tensor.ndim == 4 else 0.1
            around_one = name.endswith(("bn.weight", "running_var"))
            state[name] = scale * torch.randn(tensor.shape, generator=draws) + around_one
    return state


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("inception") / "pt_inception.pth"
    torch.save(weights(1008), path)
    return path


def pixels() -> Tensor:
    draws = torch.Generator().manual_seed(1)
    return (torch.randint(0, 256, (1, 3, 91, 107), generator=draws).float() - 128) / 128


def test_the_network_is_that_of_torch_fidelity(published: Path) -> None:
    network, steps, head = inception(published)
    features = network(pixels())[0]
    assert features.shape == (2048,)
    recorded = [0.0, 0.0, 0.0, 0.11058, 0.16405, 0.41353, 0.41539, 1.38409, 0.0, 0.72331, 1.04688, 0.55121]
    torch.testing.assert_close(features[:12], torch.tensor(recorded), atol=1e-3, rtol=1e-3)
    assert features.mean().item() == pytest.approx(0.158386, rel=1e-3)
    assert features.std().item() == pytest.approx(0.234766, rel=1e-3)
    assert isinstance(steps, TensorFlowSquash)
    torch.testing.assert_close(head(features[None]), features[None] @ weights(1008)["fc.weight"].T)


def test_torchvision_s_file_is_torchvision_s_network(tmp_path: Path) -> None:
    """With its auxiliary classifier and counters of batches, which are not used."""
    from torchvision.models import Inception3

    state = weights(10)
    unused = {"AuxLogits.fc.bias": torch.ones(10), "Mixed_5b.branch1x1.bn.num_batches_tracked": torch.tensor(3)}
    torch.save({**state, **unused}, tmp_path / "inception_v3_google.pth")
    network, steps, head = inception(tmp_path / "inception_v3_google.pth")
    with torch.device("meta"):
        model: Any = Inception3(num_classes=10, aux_logits=False, init_weights=False).eval()
    model.load_state_dict(state, strict=False, assign=True)
    with torch.inference_mode():
        torch.testing.assert_close(head(network(pixels())), model(pixels()))
    assert isinstance(steps, Preprocess)
    assert steps.image_size == (299, 299)


def test_pictures_are_squashed_as_tensorflow_does() -> None:
    """The values of torch-fidelity for 0, 20, … 220 in three rows and four columns."""
    grey = (20 * np.arange(12, dtype=np.uint8)).reshape(3, 4, 1).repeat(3, axis=2)
    expected = torch.tensor(
        [
            [0.0, 16, 32, 48, 60],
            [48, 64, 80, 96, 108],
            [96, 112, 128, 144, 156],
            [144, 160, 176, 192, 204],
            [160, 176, 192, 208, 220],
        ]
    )
    found = TensorFlowSquash(5).picture(Image.fromarray(grey))
    torch.testing.assert_close(found, ((expected - 128) / 128).expand(3, 5, 5), atol=1e-6, rtol=0)


def test_other_weights_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such file"):
        inception(tmp_path / "none.pth")
    torch.save({"fc.weight": torch.zeros(1008, 2048)}, tmp_path / "half.pth")
    with pytest.raises(ValueError, match="missing: Conv2d_1a_3x3"):
        inception(tmp_path / "half.pth")
