from pathlib import Path
from typing import Any

import dmdr_rewards
import pytest
import torch
from dmdr_rewards import Hinge, Relative, RewardInfo, WeightedSum
from dmdr_rewards.pictures.images import as_images
from torch import Tensor

from .conftest import PROMPTS, eight_bit, open_clip_model


class Brightness:
    """What a third party's reward has, and no more."""

    info = RewardInfo("brightness", "mean pixel", (0.0, 1.0), "MIT", "here", "text", True, None, "none")

    def score(self, images: Any, prompts: Any) -> Tensor:
        return as_images(images, torch.device("cpu"), torch.float32).mean(dim=(1, 2, 3))


@pytest.fixture(scope="module")
def dfn(clip_file: Path, clip_json: Path) -> Any:
    return dmdr_rewards.create("dfn-clip", clip_file, model=str(clip_json))


@pytest.fixture(scope="module")
def hps(tmp_path_factory: pytest.TempPathFactory, clip_json: Path) -> Any:
    path = tmp_path_factory.mktemp("hps") / "hps.pt"
    torch.save({"state_dict": open_clip_model(seed=1).state_dict()}, path)
    return dmdr_rewards.create("hpsv2.1", path, model=str(clip_json))


@pytest.fixture
def pictures() -> Tensor:
    return torch.rand(2, 3, 40, 50, generator=torch.Generator().manual_seed(0))


def counted(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> list[int]:
    calls: list[int] = []
    plain = getattr(owner, name)

    def counting(*given: Any, **named: Any) -> Any:
        calls.append(1)
        return plain(*given, **named)

    monkeypatch.setattr(owner, name, counting)
    return calls


@pytest.mark.bits
def test_the_sum_and_its_parts(dfn: Any, hps: Any, pictures: Tensor) -> None:
    weighted = WeightedSum({dfn: 0.3, hps: -2.0, Brightness(): 1.0})
    total, parts = weighted(pictures, PROMPTS)
    assert list(parts) == ["dfn-clip", "hpsv2.1", "brightness"]
    assert torch.equal(parts["dfn-clip"], dfn.score(pictures, PROMPTS))
    assert torch.equal(parts["hpsv2.1"], hps.score(pictures, PROMPTS))
    torch.testing.assert_close(total, 0.3 * parts["dfn-clip"] - 2 * parts["hpsv2.1"] + parts["brightness"])
    assert torch.equal(weighted.score(pictures, PROMPTS), total)
    assert isinstance(weighted, dmdr_rewards.Reward)
    assert weighted.info.range == pytest.approx((-2.3, 3.3))
    assert weighted.info.description == "0.3 · dfn-clip + -2 · hpsv2.1 + 1 · brightness"
    assert weighted.info.image_size is None


def test_gradients_of_the_sum_are_the_sum_of_gradients(dfn: Any, hps: Any, pictures: Tensor) -> None:
    gradients = []
    for score in (
        lambda x: WeightedSum({dfn: 0.5, hps: 2.0}).score(x, PROMPTS),
        lambda x: 0.5 * dfn.score(x, PROMPTS) + 2.0 * hps.score(x, PROMPTS),
    ):
        leaf = pictures.clone().requires_grad_()
        score(leaf).sum().backward()
        assert leaf.grad is not None
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients)
    assert gradients[0].abs().sum() > 0


def test_rewards_of_one_name_are_told_apart(dfn: Any, clip_file: Path, clip_json: Path, pictures: Tensor) -> None:
    other = dmdr_rewards.create("dfn-clip", clip_file, model=str(clip_json), preprocess="dmdr")
    assert list(WeightedSum({dfn: 1.0, other: 1.0})(pictures, PROMPTS).parts) == ["dfn-clip", "dfn-clip 2"]


@pytest.mark.bits
def test_equal_towers_run_once(
    dfn: Any, clip_file: Path, clip_json: Path, pictures: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    twin: Any = dmdr_rewards.create("dfn-clip", clip_file, model=str(clip_json))
    assert twin.tower is dfn.tower
    forwards = counted(monkeypatch, dfn.tower.module, "forward")
    weighted = WeightedSum({dfn: 1.0, twin: 1.0, Hinge(dfn): 1.0, Relative(twin, "Real", "Oil"): 1.0})
    parts = weighted(pictures, PROMPTS).parts
    assert len(forwards) == 1
    assert torch.equal(parts["dfn-clip"], parts["dfn-clip 2"])
    weighted(pictures, PROMPTS)
    assert len(forwards) == 2, "nothing is kept from one batch to the next"


@pytest.mark.bits
def test_one_tower_behind_two_preprocessings_runs_twice(
    clip_file: Path, clip_json: Path, pictures: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut, squash = (
        dmdr_rewards.create("clip", clip_file, model=str(clip_json), preprocess=kind) for kind in ("reference", "dmdr")
    )
    assert cut.tower is squash.tower  # type: ignore[attr-defined]
    parts = WeightedSum({cut: 1.0, squash: 1.0})(pictures, PROMPTS).parts
    assert torch.equal(parts["clip"], cut.score(pictures, PROMPTS))
    assert torch.equal(parts["clip 2"], squash.score(pictures, PROMPTS))
    assert not torch.equal(parts["clip"], parts["clip 2"])


@pytest.mark.parametrize(("shape", "resizes"), [((40, 40), 1), ((40, 50), 2)], ids=["square", "landscape"])
def test_pixels_are_resized_once_where_the_geometry_agrees(
    shape: tuple[int, int], resizes: int, dfn: Any, hps: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch.nn.functional as F

    calls = counted(monkeypatch, F, "interpolate")
    WeightedSum({dfn: 1.0, hps: 1.0})(torch.rand(2, 3, *shape), PROMPTS)
    assert len(calls) == resizes


@pytest.mark.bits
def test_eight_bit_and_float_resizing_are_not_mixed_up(dfn: Any, hps: Any) -> None:
    square = [eight_bit(50, 50)] * 2
    parts = WeightedSum({dfn: 1.0, hps: 1.0})(square, PROMPTS).parts
    assert torch.equal(parts["dfn-clip"], dfn.score(square, PROMPTS))
    assert torch.equal(parts["hpsv2.1"], hps.score(square, PROMPTS))
    assert not torch.equal(dfn.pixels(square), hps.pixels(square))


@pytest.mark.bits
def test_lists_of_pictures_are_read_once(dfn: Any, hps: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import Image

    paths = [tmp_path / f"{index}.png" for index in range(2)]
    for index, path in enumerate(paths):
        eight_bit(40 + index, 50).save(path)
    opened = counted(monkeypatch, Image, "open")
    parts = WeightedSum({dfn: 1.0, hps: 1.0})(paths, PROMPTS).parts
    assert len(opened) == 2
    assert torch.equal(parts["hpsv2.1"], hps.score(paths, PROMPTS))


def test_hinge(dfn: Any, pictures: Tensor) -> None:
    scores = dfn.score(pictures, PROMPTS)
    margin = float(scores.mean())
    hinge = Hinge(dfn, margin)
    leaf = pictures.clone().requires_grad_()
    losses = hinge.score(leaf, PROMPTS)
    torch.testing.assert_close(losses, (margin - scores).clamp(min=0))
    assert (losses == 0).any()
    assert (losses > 0).any()
    losses.sum().backward()
    assert leaf.grad is not None
    reached = losses == 0
    assert not leaf.grad[reached].any()
    assert leaf.grad[~reached].any()
    assert hinge.info.range == pytest.approx((0.0, margin + 1))
    assert Hinge(dfn).margin == 0.7


def test_relative(dfn: Any, pictures: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    positive, negative = (dfn.score(pictures, [f"{word}. {prompt}" for prompt in PROMPTS]) for word in ("Real", "Oil"))
    forwards = counted(monkeypatch, dfn.tower.module, "forward")
    relative = Relative(dfn, "Real", ["Oil"], k=0.25)
    torch.testing.assert_close(relative.score(pictures, PROMPTS), 1.25 * positive - negative)
    assert len(forwards) == 1
    assert relative.info.range == pytest.approx((-2.25, 2.25))
    image, texts = (
        dfn.encode_image(pictures),
        [dfn.encode_text([f"{w}. {p}" for p in PROMPTS]) for w in ("Real", "Oil")],
    )
    torch.testing.assert_close(relative.score(pictures, PROMPTS), (image * (1.25 * texts[0] - texts[1])).sum(-1))


def test_relative_draws_from_its_generator(pictures: Tensor) -> None:
    class Reader(Brightness):
        def __init__(self) -> None:
            self.read: list[str] = []

        def score(self, images: Any, prompts: Any) -> Tensor:
            self.read += prompts
            return super().score(images, prompts)

    def drawn(seed: int) -> list[str]:
        reader = Reader()
        generator = torch.Generator().manual_seed(seed)
        relative = Relative(reader, ["A", "B", "C"], ["X", "Y"], template="{prompt}, {adjective}", generator=generator)
        for _ in range(12):
            relative.score(pictures, ["p", "q"])
        return reader.read

    read = drawn(0)
    assert read == drawn(0) != drawn(1)
    assert {text[-1] for text in read} == set("ABCXY")
    for call in range(0, len(read), 4):
        first, second, third, fourth = read[call : call + 4]
        assert (first[:-1], second[:-1]) == ("p, ", "q, ") == (third[:-1], fourth[:-1])
        assert first[-1] == second[-1] in "ABC"
        assert third[-1] == fourth[-1] in "XY"


def test_k_may_be_a_schedule(dfn: Any, pictures: Tensor) -> None:
    relative = Relative(dfn, "Real", "Oil", k=lambda step: step / 10)
    plain = relative.score(pictures, PROMPTS)
    relative.step = 5
    positive = dfn.score(pictures, [f"Real. {prompt}" for prompt in PROMPTS])
    torch.testing.assert_close(relative.score(pictures, PROMPTS), plain + 0.5 * positive)


def test_what_is_refused(dfn: Any, vit_folder: Path) -> None:
    def refused(message: str, make: Any) -> None:
        with pytest.raises(ValueError, match=message):
            make()

    labels = dmdr_rewards.create("class-label", vit_folder)
    refused("without a reward", lambda: WeightedSum({}))
    refused("weight nan of reward 'dfn-clip'", lambda: WeightedSum({dfn: float("nan")}))
    refused("take different prompts: class_label, text", lambda: WeightedSum({dfn: 1.0, labels: 1.0}))
    refused("options device have no effect", lambda: WeightedSum({dfn: 1.0}, device="cpu"))
    refused("unknown reward 'nothing'", lambda: WeightedSum({"nothing": 1.0}))
    refused("'class-label' takes class_label prompts", lambda: Relative(labels, "a", "b"))
    refused("give generator=", lambda: Relative(dfn, ["a", "b"], "c"))
    refused("without an adjective", lambda: Relative(dfn, [], "c"))
    refused("must hold {adjective} and {prompt}", lambda: Relative(dfn, "a", "b", template="{prompt}"))
    refused("prompts is the text 'a'", lambda: Relative(dfn, "a", "b").score(torch.rand(1, 3, 8, 8), "a"))
