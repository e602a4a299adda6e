"""Regression's distances: latents, or pictures by LPIPS with random weights, on a tiny SDXL with a tiny decoder."""

import copy
import inspect
import itertools
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from dmdr_train.base.errors import UserError
from dmdr_train.checkpoint.input_fingerprints import fingerprints
from dmdr_train.data.pairs import side_of_pairs
from dmdr_train.objectives.distances import LPIPS
from dmdr_train.recipe.load import load_recipe, parse_recipe
from dmdr_train.recipe.schema import Recipe
from dmdr_train.run import build as building
from dmdr_train.run import preflight
from dmdr_train.run.build import build
from dmdr_train.training.sample import Sample
from safetensors.torch import save_file
from torch import Tensor

pytestmark = pytest.mark.usefixtures("one_process")
CPU = torch.device("cpu")
STAGES = [(64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512)]
"""The channels of VGG16's convolutions between its poolings."""
POOLING: dict[str, Callable[..., Tensor]] = {"max": F.max_pool2d, "average": F.avg_pool2d}


def convolutions() -> list[tuple[int, int, int]]:
    """Position in torchvision's `features`, inputs and outputs of each convolution: every one has a ReLU after it."""
    found, position, inputs = [], 0, 3
    for stage in STAGES:
        for outputs in stage:
            found.append((position, inputs, outputs))
            position, inputs = position + 2, outputs
        position += 1
    return found


@pytest.fixture(scope="module")
def vgg16() -> dict[str, Tensor]:
    """Random weights under torchvision's names, which keep the size of the features."""
    generator, state = torch.Generator().manual_seed(0), {}
    for position, inputs, outputs in convolutions():
        weight = torch.randn(outputs, inputs, 3, 3, generator=generator) * (2 / (9 * inputs)) ** 0.5
        state[f"features.{position}.weight"] = weight.half()
        state[f"features.{position}.bias"] = (torch.randn(outputs, generator=generator) * 0.1).half()
    return state


@pytest.fixture(scope="module")
def weights(vgg16: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file as torchvision's, with a classifier that is not read; tests must not change it."""
    path = tmp_path_factory.mktemp("weights") / "vgg16.pth"
    torch.save({**vgg16, "classifier.0.bias": torch.zeros(4096)}, path)
    return path


def by_hand(vgg16: dict[str, Tensor], x: Tensor, y: Tensor, pooling: str = "max") -> Tensor:
    """LPIPS by the paper's formula, per picture of [0, 1], in float64."""
    from torchmetrics.functional.image import lpips

    heads = torch.load(Path(lpips.__file__).parent / "lpips_models/vgg.pth", "cpu", weights_only=True)
    mean, std = (torch.tensor(v).double().view(1, 3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    features = [(picture.double() - mean) / std for picture in (x, y)]
    layers, total = iter(convolutions()), torch.zeros(len(x)).double()
    for number, stage in enumerate(STAGES):
        if number:
            features = [POOLING[pooling](f, 2) for f in features]
        for position, _, _ in itertools.islice(layers, len(stage)):
            weight, bias = (vgg16[f"features.{position}.{name}"].double() for name in ("weight", "bias"))
            features = [F.conv2d(f, weight, bias, padding=1).relu() for f in features]
        first, second = (f / f.norm(dim=1, keepdim=True) for f in features)
        head = heads[f"lin{number}.model.1.weight"].double()
        total += ((first - second) ** 2 * head).sum(dim=1).mean(dim=(1, 2))
    return total


def pair(x: Tensor, y: Tensor) -> Any:
    """What LPIPS reads of a sample."""
    sample: Any = object.__new__(Sample)
    sample.__dict__.update(pictures=x, target_pictures=y)
    return sample


def pictures(seed: int) -> Tensor:
    """Smooth pictures, well inside of [0, 1]."""
    small = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    return F.interpolate(small, size=(16, 16), mode="bicubic").clamp(0.05, 0.95)


@pytest.mark.parametrize("pooling", ["max", "average"])
def test_lpips_by_hand(vgg16: dict[str, Tensor], weights: Path, monkeypatch: pytest.MonkeyPatch, pooling: Any) -> None:
    """Its value, and its gradient as a finite difference."""

    def download(*_: Any, **__: Any) -> None:
        raise AssertionError("nothing may be downloaded")

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    distance, x, y = LPIPS(str(weights), pooling), pictures(1).requires_grad_(), pictures(2)
    loss = distance(pair(x, y))
    assert loss.item() == pytest.approx(by_hand(vgg16, x.detach(), y, pooling).mean().item(), rel=1e-5)
    (slope,) = torch.autograd.grad(loss, x)
    uphill = slope.double() / slope.norm()
    ahead, behind = (by_hand(vgg16, x.detach() + h * uphill, y, pooling).mean() for h in (1e-6, -1e-6))
    assert slope.norm().item() == pytest.approx(((ahead - behind) / 2e-6).item(), rel=1e-3)


def test_the_poolings_differ_and_the_network_is_frozen(weights: Path) -> None:
    made = {pooling: LPIPS(str(weights), pooling) for pooling in ("max", "average")}  # type: ignore[arg-type]
    losses = [distance(pair(pictures(1), pictures(2))).item() for distance in made.values()]
    assert losses[0] != pytest.approx(losses[1], rel=1e-3)
    for distance in made.values():
        assert not distance.network.training
        assert {(p.dtype, p.requires_grad) for p in distance.network.parameters()} == {(torch.float32, False)}


# -- the objective


@pytest.fixture(scope="module")
def settings(
    make_recipe: Callable[..., Recipe],
    sdxl: Path,
    prompts: Path,
    sdxl_pairs: Path,
    weights: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[..., Recipe]:
    from dmdr_models import tiny

    taesd = tiny.taesd(tmp_path_factory.mktemp("models") / "taesd")

    def settings(**changes: Any) -> Recipe:
        basis: dict[str, Any] = {
            "model": {"family": "sdxl", "path": str(sdxl), "vae": str(taesd)},
            "data": {"prompts": str(prompts), "pairs": str(sdxl_pairs)},
            "objectives": [{"kind": "regression", "distance": {"kind": "lpips", "weights": str(weights)}}],
            "optim__batch_size": 4,
            "optim__generator": {"lr": 1e-2},
        }
        return make_recipe(**{**basis, **changes})

    return settings


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_students_pictures_approach_the_teachers(
    settings: Callable[..., Recipe], vgg16: dict[str, Tensor], precision: str
) -> None:
    """The network stays in float32, whatever precision is trained in."""
    trainer = build(settings(optim__precision=precision), CPU)
    (draws,) = trainer.micro_batches("generator", 0)
    sample = trainer.rollouts.draw(draws, 0, {"pairs"})
    assert sample.target is not None
    with torch.no_grad():
        found, wanted = trainer.family.decode(sample.x0), trainer.family.decode(sample.target)
    rows = [trainer.train_step() for _ in range(3)]
    losses = [row["loss/regression"] for row in rows]
    assert losses[0] == pytest.approx(by_hand(vgg16, found, wanted).mean().item(), rel=1e-4)
    assert rows[0]["grad_norm/regression"] > 0
    assert losses[-1] < 0.9 * losses[0]


def test_the_target_is_seen_as_the_sample_is(settings: Callable[..., Recipe]) -> None:
    """The same crop, the same resolution, and no gradient."""
    memory = {"reward_crop": 24, "reward_scale": 0.67}
    trainer = build(settings(memory=memory), CPU)
    (draws,) = trainer.micro_batches("generator", 0)
    sample = trainer.rollouts.draw(draws, 0, {"pairs"})
    assert sample.target is not None
    assert sample.pictures.shape == sample.target_pictures.shape == (4, 3, 16, 16)
    assert sample.pictures.requires_grad
    assert not sample.target_pictures.requires_grad
    assert not torch.equal(sample.pictures, sample.target_pictures)
    arrived = replace(sample, x0=sample.target.clone().requires_grad_())
    assert torch.equal(arrived.pictures, arrived.target_pictures)
    objective: Any = trainer.objectives[0]
    assert objective.distance(arrived).item() == 0


def test_latents_are_compared_unless_a_recipe_says_otherwise(settings: Callable[..., Recipe]) -> None:
    trainer = build(settings(objectives=[{"kind": "regression"}]), CPU)
    (draws,) = trainer.micro_batches("generator", 0)
    sample = trainer.rollouts.draw(draws, 0, {"pairs"})
    assert sample.target is not None
    expected = (sample.x0 - sample.target).square().mean().item()
    assert trainer.train_step()["loss/regression"] == pytest.approx(expected, rel=1e-6)


# -- the file of weights


def lpips(weights: Any, **more: Any) -> dict[str, Any]:
    return {"objectives": [{"kind": "regression", "distance": {"kind": "lpips", "weights": str(weights), **more}}]}


def test_a_missing_file_is_found_before_the_start(settings: Callable[..., Recipe], tmp_path: Path) -> None:
    preflight.check(settings(run__output=str(tmp_path / "out")), 1)
    with pytest.raises(UserError, match=r"^objectives.0.distance.weights: no file 'gone.pth'; give one that exists$"):
        preflight.check(settings(**lpips("gone.pth")), 1)


@pytest.mark.parametrize(
    ("memory", "side", "said"),
    [
        ({}, 16, None),
        (
            {},
            15,
            "model.resolution: 15 is less than the 16 pixels that objectives.0.distance needs; use the dis",
        ),
        ({"reward_crop": 16}, 32, None),
        (
            {"reward_crop": 14},
            32,
            "memory.reward_crop: 14 is less than the 16 pixels that objectives.0.distance needs; use",
        ),
        ({"reward_scale": 0.5}, 32, None),
        ({"reward_scale": 0.49}, 32, "memory.reward_scale: 0.49 of 32 is less than the 16 pixels that"),
        ({"reward_crop": 24, "reward_scale": 0.5}, 32, "memory.reward_scale: 0.5 of 24 is less than the 16"),
    ],
)
def test_pictures_that_are_too_small_for_lpips(
    settings: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch, memory: Any, side: int, said: str | None
) -> None:
    monkeypatch.setattr(preflight, "side_of_pairs", lambda folder: side)
    preflight.check(settings(memory=memory, objectives=[{"kind": "regression"}]), 1, dry_run=True)
    with nullcontext() if said is None else pytest.raises(UserError, match=f"^{said}"):
        preflight.check(settings(memory=memory), 1, dry_run=True)


def test_how_small_a_picture_may_be(weights: Path, sdxl_pairs: Path) -> None:
    distance, small = LPIPS(str(weights)), torch.rand(1, 3, 16, 16)
    assert distance(pair(small, small)).item() == 0
    with pytest.raises(RuntimeError, match="Output size is too small"):
        distance(pair(small[..., 1:], small[..., 1:]))
    assert side_of_pairs(sdxl_pairs) == 32


def test_torchmetrics_has_the_network_that_lpips_is_made_of() -> None:
    """Its name begins with an underscore, since torchmetrics' public class takes no file of weights."""
    from torchmetrics.functional.image import lpips

    network: Any = getattr(lpips, "_NoTrainLpips", None)
    assert network is not None, "torchmetrics renamed _NoTrainLpips: see load_lpips and the decision on LPIPS"
    missing = {"pretrained", "net", "pnet_rand"} - inspect.signature(network).parameters.keys()
    assert not missing, f"torchmetrics' _NoTrainLpips no longer takes {missing}: see load_lpips"


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("vgg19.pth", lambda state: state.pop("features.17.weight"), ".* lacks features.17.weight"),
        (
            "narrow.safetensors",
            lambda state: state.update({"features.0.bias": torch.zeros(3)}),
            r".* has features.0.bias of shape \(3,\), not \(64,\)",
        ),
        ("text.pth", lambda state: state.update(note="text"), ".* holds something else than tensors by their names"),
        ("vgg16.onnx", None, ".* is no state dict: give a file that ends in .safetensors, .bin, .pt, .pth"),
    ],
)
def test_a_wrong_file_is_found_before_models_are_read(
    settings: Callable[..., Recipe],
    vgg16: dict[str, Tensor],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    change: Any,
    said: str,
) -> None:
    path, state = tmp_path / name, copy.copy(vgg16)
    if change is None:
        path.touch()
    else:
        change(state)
        (save_file if name.endswith(".safetensors") else torch.save)(state, path)
    monkeypatch.setattr(building, "open_decoder", lambda *_: pytest.fail("a model was read"))
    fix = "give torchvision.s vgg16-397923af.pth"
    with pytest.raises(UserError, match=f"^objectives.0.distance.weights: {said}; {fix}$"):
        build(settings(**lpips(path)), CPU)


def test_a_file_may_move_and_must_not_change(
    settings: Callable[..., Recipe], vgg16: dict[str, Tensor], weights: Path, tmp_path: Path
) -> None:
    key = "objectives.0.distance.weights"
    moved, other = tmp_path / "moved.pth", tmp_path / "other.pth"
    moved.write_bytes(weights.read_bytes())
    torch.save({**vgg16, "features.0.bias": vgg16["features.0.bias"] + 1}, other)
    found = [fingerprints(settings(**lpips(path)))[key] for path in (weights, moved, other)]
    assert found[0] == found[1] != found[2]
    assert key not in fingerprints(settings(objectives=[{"kind": "regression"}]))


def test_a_file_beside_the_recipe(settings: Callable[..., Recipe], tmp_path: Path) -> None:
    (tmp_path / "vgg.pth").touch()
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(settings(**lpips("vgg.pth")).model_dump(mode="json")))
    section: Any = load_recipe(str(tmp_path / "recipe.yaml")).objectives[0]
    assert section.distance.weights == str((tmp_path / "vgg.pth").resolve())
    changed: Any = load_recipe(str(tmp_path / "recipe.yaml"), ["objectives.0.distance={kind: latent_mse}"])
    assert changed.objectives[0].distance.kind == "latent_mse"


@pytest.mark.parametrize(
    ("distance", "said"),
    [
        ({"kind": "lpips"}, "objectives.0.distance.weights: is required; add it to the recipe or give key=value"),
        ({"kind": "latent_mse", "weights": "vgg.pth"}, "objectives.0.distance.weights: unknown key; "),
        ({"kind": "lpips", "weights": "a", "poling": "max"}, "objectives.0.distance.poling: .* did you mean .*pooling"),
        ({"kind": "lpips", "weights": "a", "pooling": "min"}, "objectives.0.distance.pooling: should be 'max' or 'av"),
        ({"kind": "ssim"}, "objectives.0.distance: kind must be one of 'latent_mse', 'lpips'"),
    ],
)
def test_mistakes(settings: Callable[..., Recipe], distance: dict[str, Any], said: str) -> None:
    data = settings().model_dump(mode="json")
    data["objectives"][0]["distance"] = distance
    with pytest.raises(UserError, match=f"^{said}"):
        parse_recipe(data)
