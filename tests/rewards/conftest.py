"""Tiny random checkpoints, in the formats that rewards are published in."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_qwen import randomise, save_qwen
from torch import Tensor

CLASSES = 7
SQUASH = {"size": {"height": 16, "width": 16}, "image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.25]}


def save(model: torch.nn.Module, folder: Path, preprocessor: dict[str, Any] | None) -> Path:
    randomise(model)
    model.eval().save_pretrained(folder)  # type: ignore[operator]
    if preprocessor is not None:
        (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    return folder


def vit() -> torch.nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    return ViTForImageClassification(ViTConfig(image_size=16, patch_size=4, num_labels=CLASSES, **sizes))


def resnet() -> torch.nn.Module:
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=CLASSES)
    return ResNetForImageClassification(config)


def dinov2_hub() -> torch.nn.Module:
    from transformers import Dinov2Config, Dinov2ForImageClassification

    config = Dinov2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=4, num_labels=CLASSES
    )
    return Dinov2ForImageClassification(config)


ARCHITECTURES = {"vit": vit, "resnet": resnet, "dinov2": dinov2_hub}


@pytest.fixture(scope="session", params=ARCHITECTURES)
def any_folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Image classifiers of several architectures."""
    return save(ARCHITECTURES[request.param](), tmp_path_factory.mktemp(request.param), SQUASH)


@pytest.fixture(scope="session")
def vit_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(vit(), tmp_path_factory.mktemp("classifier"), SQUASH)


@pytest.fixture
def pictures() -> Tensor:
    """Two pictures, [2, 3, 16, 16] in [0, 1]."""
    return torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="session")
def slope() -> Any:
    """slope(f, x, direction): the derivative of a scalar function by central differences."""

    def central(f: Any, x: Tensor, direction: Tensor, step: float = 1e-5) -> float:
        with torch.no_grad():
            return float((f(x + step * direction) - f(x - step * direction)) / (2 * step))

    return central


TINY_CLIP: dict[str, Any] = {
    "embed_dim": 16,
    "quick_gelu": False,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}
"""An open_clip architecture with the layout, the tokenizer and the context of none too small a kind."""

PROMPTS = ["a cat &amp; a “dog”", "Two\tbirds"]


def open_clip_model(config: dict[str, Any] = TINY_CLIP, seed: int = 0) -> Any:
    """open_clip's own, with random weights."""
    import open_clip

    model = open_clip.CLIP(**config).eval()
    randomise(model, seed)
    with torch.no_grad():
        model.logit_scale.fill_(3.0)
    return model


def gradient_slopes(reward: Any, prompts: Any, slope: Any, exact: Any) -> tuple[float, float]:
    """Derivative of a float64 reward's sum along a random direction: by its gradient, and by differences.

    exact: pictures -> the scores before they are rounded to float32, which differences do not survive.
    """
    generator = torch.Generator().manual_seed(2)
    pictures = 0.1 + 0.8 * torch.rand(len(prompts), 3, 37, 29, generator=generator, dtype=torch.float64)
    direction = torch.randn(pictures.shape, generator=generator, dtype=torch.float64)
    leaf = pictures.clone().requires_grad_()

    scores = reward.score(leaf, prompts)
    torch.testing.assert_close(scores, exact(leaf).float())
    scores.sum().backward()
    assert leaf.grad is not None
    return float((leaf.grad * direction).sum()), slope(lambda x: exact(x).sum(), pictures, direction)


def picture_gradients(reward: Any, prompts: Any) -> torch.Tensor:
    """The gradient of the scores' sum at two random pictures."""
    pictures = torch.rand(2, 3, 40, 50, generator=torch.Generator().manual_seed(0)).requires_grad_()
    reward.score(pictures, prompts).sum().backward()
    assert pictures.grad is not None
    return pictures.grad


def cosines(reward: Any, prompts: Any, scale: float = 1.0) -> Any:
    """`exact` of a reward that is a dot product."""
    return lambda pictures: scale * (reward.encode_image(pictures) * reward.encode_text(prompts)).sum(-1)


@pytest.fixture(scope="session")
def clip_json(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny architecture as a file, for the option `model` of rewards."""
    path = tmp_path_factory.mktemp("architecture") / "tiny.json"
    path.write_text(json.dumps(TINY_CLIP))
    return path


@pytest.fixture(scope="session")
def clip_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in open_clip's format."""
    path = tmp_path_factory.mktemp("open_clip") / "open_clip_pytorch_model.bin"
    torch.save(open_clip_model().state_dict(), path)
    return path


def eight_bit(height: int, width: int, seed: int = 0) -> Any:
    """A noisy PIL picture: every difference in resizing shows."""
    from PIL import Image

    noise = torch.randint(0, 256, (height, width, 3), generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(noise.numpy().astype("uint8"))


SHAPES = {"square": (48, 48), "portrait": (61, 40), "landscape": (33, 70), "exact": (32, 32), "small": (9, 20)}


@pytest.fixture(scope="session")
def qwen_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen2-VL with a language head, as transformers saves it."""
    return save_qwen(tmp_path_factory.mktemp("qwen"), "qwen2_vl")
