"""The reference is written from the paper and the file format: plain torch, torch.hub's names, no transformers."""

import math
from pathlib import Path
from typing import Any

import dmdr_rewards
import pytest
import torch
import torch.nn.functional as F
from dmdr_rewards.models import dinov2
from safetensors.torch import save_file
from torch import Tensor

from .conftest import SQUASH, dinov2_hub, save

WIDTH, DEPTH, PATCH, GRID, CLASSES = 128, 5, 4, 9, 6
State = dict[str, Tensor]


def backbone(gated: bool = False, seed: int = 0) -> State:
    """Random tensors under torch.hub's names. Scales are far from 1 and biases far from 0, so that each one counts."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, std: float = 0.05, mean: float = 0.0) -> Tensor:
        return mean + std * torch.randn(shape, generator=generator)

    # ViT-g's hidden width: two thirds of 4·width, rounded up to a multiple of 8.
    hidden = 344 if gated else 4 * WIDTH
    state = {
        "cls_token": draw(1, 1, WIDTH, std=1),
        "pos_embed": draw(1, 1 + GRID * GRID, WIDTH, std=1),
        "mask_token": torch.zeros(1, WIDTH),
        "patch_embed.proj.weight": draw(WIDTH, 3, PATCH, PATCH, std=0.2),
        "patch_embed.proj.bias": draw(WIDTH, std=0.2),
        "norm.weight": draw(WIDTH, std=0.5, mean=1),
        "norm.bias": draw(WIDTH, std=0.5),
    }
    for index in range(DEPTH):
        linears = {"attn.qkv": (3 * WIDTH, WIDTH), "attn.proj": (WIDTH, WIDTH)}
        linears |= (
            {"mlp.w12": (2 * hidden, WIDTH), "mlp.w3": (WIDTH, hidden)}
            if gated
            else {"mlp.fc1": (hidden, WIDTH), "mlp.fc2": (WIDTH, hidden)}
        )
        for name, (outputs, inputs) in linears.items():
            state[f"blocks.{index}.{name}.weight"] = draw(outputs, inputs, std=1.5 / math.sqrt(inputs))
            state[f"blocks.{index}.{name}.bias"] = draw(outputs, std=0.3)
        for name in ("norm1", "norm2"):
            state[f"blocks.{index}.{name}.weight"] = draw(WIDTH, std=0.3, mean=1)
            state[f"blocks.{index}.{name}.bias"] = draw(WIDTH, std=0.3)
        for name in ("ls1", "ls2"):
            state[f"blocks.{index}.{name}.gamma"] = draw(WIDTH, std=0.5, mean=0.5)
    return state


def linear_head(seed: int = 1) -> State:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(CLASSES, 5 * WIDTH, generator=generator) / math.sqrt(5 * WIDTH)
    return {"weight": weight, "bias": torch.randn(CLASSES, generator=generator)}


def reference_features(state: State, pixels: Tensor) -> Tensor:
    """Normalised pixels -> the input of the four-layer head."""

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, (WIDTH,), state[f"{name}.weight"], state[f"{name}.bias"], eps=1e-6)

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def attention(x: Tensor, name: str) -> Tensor:
        batch, tokens, _ = x.shape
        query, key, value = linear(x, f"{name}.qkv").view(batch, tokens, 3, WIDTH // 64, 64).permute(2, 0, 3, 1, 4)
        share = (query @ key.transpose(-1, -2) / 8).softmax(dim=-1)
        return linear((share @ value).transpose(1, 2).reshape(batch, tokens, WIDTH), f"{name}.proj")

    def feed_forward(x: Tensor, name: str) -> Tensor:
        if f"{name}.w12.weight" in state:
            gate, value = linear(x, f"{name}.w12").chunk(2, dim=-1)
            return linear(F.silu(gate) * value, f"{name}.w3")
        return linear(F.gelu(linear(x, f"{name}.fc1")), f"{name}.fc2")

    patches = F.conv2d(pixels, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=PATCH)
    positions = reference_positions(state["pos_embed"], patches.shape[-1])
    tokens = patches.flatten(2).transpose(1, 2)
    x = torch.cat([state["cls_token"].expand(len(tokens), -1, -1), tokens], dim=1) + positions
    layers = []
    for block in (f"blocks.{index}" for index in range(DEPTH)):
        x = x + state[f"{block}.ls1.gamma"] * attention(norm(x, f"{block}.norm1"), f"{block}.attn")
        x = x + state[f"{block}.ls2.gamma"] * feed_forward(norm(x, f"{block}.norm2"), f"{block}.mlp")
        layers.append(norm(x, "norm"))
    return torch.cat([*(layer[:, 0] for layer in layers[-4:]), layers[-1][:, 1:].mean(dim=1)], dim=-1)


def reference_positions(positions: Tensor, side: int) -> Tensor:
    """Bicubic resampling by hand (a = −0.75, edges repeated), at the release's scale of (side + 0.1) / grid."""
    if side == GRID:
        return positions
    ratio = GRID / (side + 0.1)
    resample = torch.zeros(side, GRID, dtype=positions.dtype)
    for target in range(side):
        source = (target + 0.5) * ratio - 0.5
        for tap in range(math.floor(source) - 1, math.floor(source) + 3):
            distance = abs(source - tap)
            if distance <= 1:
                weight = 1.25 * distance**3 - 2.25 * distance**2 + 1
            else:
                weight = -0.75 * (distance**3 - 5 * distance**2 + 8 * distance - 4)
            resample[target, min(max(tap, 0), GRID - 1)] += weight
    grid = positions[0, 1:].view(GRID, GRID, WIDTH)
    grid = torch.einsum("yr,xc,rcw->yxw", resample, resample, grid)
    return torch.cat([positions[:, :1], grid.reshape(1, side * side, WIDTH)], dim=1)


def reference_logits(state: State, head: State, pictures: Tensor) -> Tensor:
    mean = torch.tensor([0.485, 0.456, 0.406], dtype=pictures.dtype).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225], dtype=pictures.dtype).view(3, 1, 1)
    features = reference_features(state, (pictures - mean) / std)
    return features @ head["weight"].T + head["bias"]


def written(folder: Path, state: State, head: State) -> tuple[Path, Path]:
    """Two files, named as torch.hub names them."""
    paths = folder / "dinov2_vitx4_pretrain.pth", folder / "dinov2_vitx4_linear4_head.pth"
    torch.save(state, paths[0])
    torch.save(head, paths[1])
    return paths


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return written(tmp_path_factory.mktemp("dinov2"), backbone(), linear_head())


def load(files: tuple[Path, Path], **options: Any) -> Any:
    return dmdr_rewards.create("dinov2", checkpoint=files[0], head=files[1], **options)


def pictures_of(side: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(3)).to(dtype)


@pytest.mark.parametrize("gated", [False, True], ids=["mlp", "swiglu"])
@pytest.mark.parametrize("side", [GRID, 4, 12], ids=["native", "smaller", "larger"])
def test_the_remapped_network_is_the_released_one(gated: bool, side: int, tmp_path: Path) -> None:
    state, head = backbone(gated), linear_head()
    pictures = pictures_of(side * PATCH)
    reward = load(written(tmp_path, state, head), image_size=side * PATCH)
    expected = reference_logits(state, head, pictures)
    torch.testing.assert_close(reward.classifier.logits(pictures), expected, atol=2e-4, rtol=1e-4)
    torch.testing.assert_close(
        reward.score(pictures, [1, 4]), expected.log_softmax(-1)[[0, 1], [1, 4]], atol=2e-4, rtol=1e-4
    )


def test_in_double_precision_the_difference_vanishes(files: tuple[Path, Path]) -> None:
    state = {name: tensor.double() for name, tensor in backbone().items()}
    head = {name: tensor.double() for name, tensor in linear_head().items()}
    pictures = pictures_of(GRID * PATCH, torch.float64)
    logits = load(files, image_size=GRID * PATCH, dtype=torch.float64).classifier.logits(pictures)
    torch.testing.assert_close(logits, reference_logits(state, head, pictures), atol=1e-10, rtol=1e-10)


def test_position_embeddings_follow_the_release_from_518_to_224() -> None:
    """37² to 16²: the offset of 0.1 and the lack of antialiasing both show in the numbers."""
    generator = torch.Generator().manual_seed(0)
    positions = torch.randn(1, 1 + 37 * 37, 8, generator=generator)
    ours = dinov2._resampled(positions, 16)

    def plain(**options: Any) -> Tensor:
        grid = positions[:, 1:].reshape(1, 37, 37, 8).permute(0, 3, 1, 2)
        return F.interpolate(grid, mode="bicubic", **options).permute(0, 2, 3, 1).reshape(1, 256, 8)

    torch.testing.assert_close(ours[:, :1], positions[:, :1])
    torch.testing.assert_close(ours[:, 1:], plain(scale_factor=16.1 / 37))
    assert (ours[:, 1:] - plain(size=(16, 16))).abs().max() > 0.1
    assert (ours[:, 1:] - plain(size=(16, 16), antialias=True)).abs().max() > 0.1


def test_pictures_are_squashed(files: tuple[Path, Path]) -> None:
    reward = load(files, image_size=16)
    pictures = 0.3 + 0.4 * torch.rand(2, 3, 33, 20, generator=torch.Generator().manual_seed(5))
    squashed = F.interpolate(pictures, size=(16, 16), mode="bicubic", antialias=True)
    torch.testing.assert_close(reward.score(pictures, [1, 4]), reward.score(squashed, [1, 4]))


def test_gradients_against_finite_differences(files: tuple[Path, Path], slope: Any) -> None:
    reward = load(files, image_size=16, dtype=torch.float64)
    generator = torch.Generator().manual_seed(4)
    pictures = 0.1 + 0.8 * torch.rand(2, 3, 21, 13, generator=generator, dtype=torch.float64)
    labels = torch.tensor([5, 0])

    def total(x: Tensor) -> Tensor:
        return reward.classifier.logits(x).log_softmax(dim=-1)[[0, 1], labels].sum()

    leaf = pictures.clone().requires_grad_()
    reward.score(leaf, labels).sum().backward()
    assert leaf.grad is not None
    pixel = torch.zeros_like(pictures)
    pixel[1, 2, 7, 3] = 1
    for direction in (torch.randn(pictures.shape, generator=generator, dtype=torch.float64), pixel):
        expected = slope(total, pictures, direction)
        assert abs(expected) > 1e-4
        assert float((leaf.grad * direction).sum()) == pytest.approx(expected, rel=1e-5)


def test_bfloat16_is_close(files: tuple[Path, Path]) -> None:
    pictures = pictures_of(16)
    exact = load(files, image_size=16).score(pictures, [1, 4])
    half = load(files, image_size=16, dtype=torch.bfloat16).score(pictures, [1, 4])
    assert half.dtype == torch.float32
    assert not torch.equal(half, exact)
    torch.testing.assert_close(half, exact, atol=3e-2, rtol=3e-2)


def test_a_batch_of_one_is_one_dimensional(files: tuple[Path, Path]) -> None:
    reward = load(files, image_size=16)
    one = reward.score(pictures_of(16)[:1], [1])
    assert one.shape == (1,)
    torch.testing.assert_close(one, reward.score(pictures_of(16), [1, 4])[:1])


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_a_folder_holds_both_files(suffix: str, files: tuple[Path, Path], tmp_path: Path) -> None:
    for name, tensors in (("backbone", backbone()), ("head", linear_head())):
        if suffix == ".pth":
            torch.save(tensors, tmp_path / (name + suffix))
        else:
            save_file(tensors, tmp_path / (name + suffix))
    pictures = pictures_of(16)
    reward = dmdr_rewards.create("dinov2", checkpoint=tmp_path, image_size=16)
    # To rounding: where a file's tensors are not aligned in memory, kernels may round otherwise.
    torch.testing.assert_close(reward.score(pictures, [1, 4]), load(files, image_size=16).score(pictures, [1, 4]))

    with pytest.raises(ValueError, match="has its own, so leave head out"):
        dmdr_rewards.create("dinov2", checkpoint=tmp_path, head=files[1])
    (tmp_path / f"head{suffix}").unlink()
    with pytest.raises(ValueError, match=r"must hold head\.safetensors or head\.pth"):
        dmdr_rewards.create("dinov2", checkpoint=tmp_path)


def test_half_precision_files_are_computed_in_float32(tmp_path: Path) -> None:
    state = {name: tensor.half() for name, tensor in backbone().items()}
    head = {name: tensor.half() for name, tensor in linear_head().items()}
    reward = load(written(tmp_path, state, head), image_size=16)
    expected = reference_logits(
        {name: tensor.float() for name, tensor in state.items()},
        {name: tensor.float() for name, tensor in head.items()},
        pictures_of(16),
    )
    torch.testing.assert_close(reward.classifier.logits(pictures_of(16)), expected, atol=2e-4, rtol=1e-4)


def test_info(files: tuple[Path, Path]) -> None:
    info = load(files).info
    assert (info.name, info.licence, info.num_classes) == ("dinov2", "Apache-2.0", CLASSES)
    assert info.image_size == (224, 224)
    assert "arXiv 2304.07193" in info.source


@pytest.mark.bits
def test_gradient_checkpointing_changes_no_value(files: tuple[Path, Path]) -> None:
    gradients: list[Any] = []
    for recompute in (False, True):
        pictures = pictures_of(16).requires_grad_()
        load(files, image_size=16, gradient_checkpointing=recompute).score(pictures, [1, 4]).sum().backward()
        gradients.append(pictures.grad)
    assert torch.equal(*gradients)


def test_a_plain_classifier_of_transformers_will_do(tmp_path: Path, pictures: Tensor) -> None:
    folder = save(dinov2_hub(), tmp_path, SQUASH)
    reward: Any = dmdr_rewards.create("dinov2", checkpoint=folder, gradient_checkpointing=True)
    same = dmdr_rewards.create("class-label", checkpoint=folder)
    assert reward.info.name == "dinov2"
    torch.testing.assert_close(reward.score(pictures, [1, 4]), same.score(pictures, [1, 4]))
    with pytest.raises(ValueError, match="of a dinov2 model: leave out image_size"):
        dmdr_rewards.create("dinov2", checkpoint=folder, image_size=16)
    (folder / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(ValueError, match="of a vit model: use the reward 'class-label'"):
        dmdr_rewards.create("dinov2", checkpoint=folder)


def test_the_features_are_the_class_token(files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    assert dinov2._IMAGE_SIZE == 224
    monkeypatch.setattr(dinov2, "_IMAGE_SIZE", 5 * PATCH)  # a small size takes less time
    network, steps = dinov2.backbone(files[0])
    pixels = torch.randn(2, 3, 5 * PATCH, 5 * PATCH, generator=torch.Generator().manual_seed(4))
    expected = reference_features(backbone(), pixels)[:, 3 * WIDTH : 4 * WIDTH]
    torch.testing.assert_close(network(pixels), expected, atol=2e-4, rtol=1e-4)
    assert steps.resize == (5 * PATCH, 5 * PATCH)


@pytest.mark.parametrize("classifier", [True, False])
def test_the_features_of_a_transformers_folder(classifier: bool, tmp_path: Path, pictures: Tensor) -> None:
    model: Any = dinov2_hub()
    folder = save(model if classifier else model.dinov2, tmp_path, SQUASH)
    network, steps = dinov2.backbone(folder)
    with torch.inference_mode():
        expected = model.dinov2(pictures).pooler_output
    torch.testing.assert_close(network(pictures), expected)
    assert steps.mean == tuple(SQUASH["image_mean"])
    (folder / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(ValueError, match="it holds a vit"):
        dinov2.backbone(folder)


def without(state: State, name: str) -> State:
    return {key: tensor for key, tensor in state.items() if key != name}


@pytest.mark.parametrize(
    ("state", "head", "message"),
    [
        (without(backbone(), "blocks.2.ls1.gamma"), linear_head(), r"pretrain\.pth .*missing: blocks\.2\.ls1\.gamma$"),
        (
            without(backbone(), "patch_embed.proj.weight"),
            linear_head(),
            r"not a DINOv2 backbone .*patch_embed\.proj\.weight",
        ),
        (backbone() | {"register_tokens": torch.ones(1, 4, WIDTH)}, linear_head(), r"unexpected: register_tokens$"),
        (
            backbone() | {"norm.bias": torch.ones(3)},
            linear_head(),
            r"wrong shape: norm\.bias \(3,\), expected \(128,\)",
        ),
        (backbone() | {"pos_embed": torch.ones(1, 7, WIDTH)}, linear_head(), r"6 positions \(a square\)"),
        (
            backbone(),
            {"weight": torch.ones(CLASSES, 2 * WIDTH), "bias": torch.ones(CLASSES)},
            r"\(6, 256\), expected \(6, 640",
        ),
        (backbone(), {"weight": torch.ones(CLASSES, 5 * WIDTH)}, r"head\.pth .*missing: bias"),
        (linear_head(), linear_head(), "not a DINOv2 backbone with torch.hub's names: 'patch_embed"),
        ({f"model.{name}": tensor for name, tensor in backbone().items()}, linear_head(), "not a DINOv2 backbone"),
    ],
)
def test_other_weights_are_refused(state: State, head: State, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        load(written(tmp_path, state, head), image_size=16)


def test_too_shallow_a_backbone_is_refused(tmp_path: Path) -> None:
    state = {name: tensor for name, tensor in backbone().items() if not name.startswith(("blocks.3", "blocks.4"))}
    with pytest.raises(ValueError, match=r"3 blocks \(at least 4\)"):
        load(written(tmp_path, state, linear_head()))


@pytest.mark.parametrize("image_size", [0, 18])
def test_an_image_size_that_patches_do_not_tile_is_refused(image_size: int, files: tuple[Path, Path]) -> None:
    with pytest.raises(ValueError, match=f"image_size {image_size} is not a positive multiple of the patch size 4"):
        load(files, image_size=image_size)


def test_a_backbone_without_head_is_refused(files: tuple[Path, Path]) -> None:
    with pytest.raises(ValueError, match="give head=FILE too"):
        dmdr_rewards.create("dinov2", checkpoint=files[0])
