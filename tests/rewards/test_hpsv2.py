"""The reference is written from the package hpsv2: its letterbox, then plain CLIP. tools/parity_rewards.py runs it."""

import warnings
from pathlib import Path
from typing import Any

import dmdr_rewards
import numpy as np
import pytest
import torch
from dmdr_rewards.networks.known_files import compared
from dmdr_rewards.pictures.preprocess import CLIP_MEAN, CLIP_STD, Preprocess
from dmdr_rewards.score import provenance
from dmdr_rewards.score.provenance import provenance_of
from dmdr_rewards.score.reward_arguments import RewardArgument
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from .conftest import PROMPTS, SHAPES, TINY_CLIP, cosines, eight_bit, gradient_slopes, open_clip_model


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("hps") / "HPS_v2.1_compressed.pt"
    torch.save({"state_dict": open_clip_model(seed=1).state_dict()}, path)
    return path


@pytest.fixture(scope="module")
def reward(file: Path, clip_json: Path) -> Any:
    return dmdr_rewards.create("hpsv2.1", file, model=str(clip_json))


def letterboxed(picture: Image.Image, side: int) -> Tensor:
    from torchvision.transforms.functional import InterpolationMode, normalize, pad, resize, to_tensor

    scale = side / max(picture.size)
    height, width = (round(length * scale) for length in (picture.height, picture.width))
    small = resize(to_tensor(picture), [height, width], InterpolationMode.BICUBIC)
    left, top = (side - width) // 2, (side - height) // 2
    boxed = pad(small, [left, top, side - width - left, side - height - top], fill=0)
    return normalize(boxed, (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))


def official(pictures: list[Image.Image], prompts: list[str]) -> Tensor:
    import open_clip

    model = open_clip_model(TINY_CLIP, seed=1)
    with torch.no_grad():
        images = model.encode_image(torch.stack([letterboxed(picture, 32) for picture in pictures]), normalize=True)
        texts = model.encode_text(open_clip.SimpleTokenizer(context_length=12)(prompts), normalize=True)
    return (images @ texts.T).diagonal()


@pytest.mark.parametrize("shape", [*SHAPES.values(), (32, 21), (45, 32)])
def test_scores_are_the_official_ones(shape: tuple[int, int], reward: Any) -> None:
    pictures = [eight_bit(*shape, seed=seed) for seed in (0, 1)]
    torch.testing.assert_close(reward.pixels(pictures)[0], letterboxed(pictures[0], 32), atol=4e-6, rtol=0)
    torch.testing.assert_close(reward.score(pictures, PROMPTS), official(pictures, PROMPTS), atol=1e-6, rtol=0)


def test_what_the_package_itself_gave() -> None:
    """hpsv2 1.2.0's own image_transform(32) and tokenizer, on a picture and prompts that can be written down."""
    import open_clip

    picture = Image.fromarray((np.arange(20 * 44 * 3) * 37 % 256).astype(np.uint8).reshape(20, 44, 3))
    letterbox = Preprocess(32, side="longer", crop=(32, 32), mean=CLIP_MEAN, std=CLIP_STD, eight_bit=False)
    pixels = letterbox.picture(picture)
    assert pixels[:, 8, 5].tolist() == pytest.approx([-1.1309280, -0.3057402, 0.4465866], abs=1e-5)
    assert pixels[:, 16, 20].tolist() == pytest.approx([-0.4719371, -0.5025686, 0.4310557], abs=1e-5)
    assert float(pixels.sum()) == pytest.approx(-2463.9485, abs=1e-2)
    assert open_clip.SimpleTokenizer(context_length=9)([PROMPTS[0], "salt &amp;amp; pepper’s  CAFÉ…"]).tolist() == [
        [49406, 320, 2368, 261, 320, 257, 1929, 257, 49407],
        [49406, 6611, 261, 8253, 568, 15304, 959, 49407, 0],
    ]


def test_bars_are_black_before_normalising(reward: Any) -> None:
    mean, std = torch.tensor(reward.preprocess.mean), torch.tensor(reward.preprocess.std)
    for picture in (torch.ones(1, 3, 16, 64), [Image.new("RGB", (64, 16), "white")]):
        pixels = reward.pixels(picture)
        torch.testing.assert_close(pixels[0, :, 0, 0], -mean / std)
        torch.testing.assert_close(pixels[0, :, 16, 16], (1 - mean) / std)


def test_gradients_against_finite_differences(file: Path, clip_json: Path, slope: Any) -> None:
    reward = dmdr_rewards.create("hpsv2.1", file, model=str(clip_json), dtype=torch.float64)
    given, expected = gradient_slopes(reward, PROMPTS, slope, cosines(reward, PROMPTS))
    assert abs(expected) > 1e-3
    assert given == pytest.approx(expected, rel=1e-6)


def test_the_authors_way_is_a_squash(file: Path, clip_json: Path, reward: Any) -> None:
    squash = dmdr_rewards.create("hpsv2.1", file, model=str(clip_json), preprocess="dmdr")
    square, wide = [eight_bit(48, 48)], [eight_bit(48, 70)]
    assert torch.equal(squash.score(square, ["a"]), reward.score(square, ["a"]))
    assert not torch.allclose(squash.score(wide, ["a"]), reward.score(wide, ["a"]), atol=1e-4)


def test_safetensors_are_read_too(clip_json: Path, reward: Any, tmp_path: Path) -> None:
    save_file(open_clip_model(seed=1).state_dict(), tmp_path / "hps.safetensors")
    same = dmdr_rewards.create("hpsv2.1", tmp_path / "hps.safetensors", model=str(clip_json))
    picture = [eight_bit(48, 70)]
    # To rounding: where a file's tensors are not aligned in memory, kernels may round otherwise.
    torch.testing.assert_close(same.score(picture, ["a"]), reward.score(picture, ["a"]))


def test_half_precision_files_are_computed_in_float32(clip_json: Path, tmp_path: Path) -> None:
    half = {name: tensor.half() for name, tensor in open_clip_model(seed=1).state_dict().items()}
    torch.save({"state_dict": half}, tmp_path / "half.pt")
    torch.save({"state_dict": {name: tensor.float() for name, tensor in half.items()}}, tmp_path / "full.pt")
    one, other = (
        dmdr_rewards.create("hpsv2.1", tmp_path / f"{name}.pt", model=str(clip_json)) for name in ("half", "full")
    )
    assert torch.equal(one.score([eight_bit(40, 40)], ["a"]), other.score([eight_bit(40, 40)], ["a"]))


def test_info(reward: Any) -> None:
    assert reward.info.name == "hpsv2.1"
    assert reward.info.preprocess.startswith("longer side to 32, bicubic, antialias; zero pad to 32x32")
    assert dmdr_rewards.describe("hpsv2.1").preprocess.startswith("longer side to 224")


def test_the_name_of_the_weights_before_is_told(file: Path, clip_json: Path, reward: Any, tmp_path: Path) -> None:
    """Nothing else tells v2.0 from v2.1: names and shapes of the tensors agree."""
    (tmp_path / "HPS_v2_compressed.pt").symlink_to(file)
    with pytest.warns(UserWarning, match=r"HPS_v2_compressed\.pt has the name of HPS v2\.0's weights"):
        dmdr_rewards.create("hpsv2.1", tmp_path / "HPS_v2_compressed.pt", model=str(clip_json))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dmdr_rewards.create("hpsv2.1", file, model=str(clip_json))


def test_a_hash_tells_the_weights_before(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of v2.1 have no known hash, so another file is not compared."""
    old, new = "9defdb2ba952d35ec1cb3334554bd4033e415d1397d742a9946d2ac884ed53a1", "0" * 64
    assert compared("hpsv2.1", old) == "no, it is HPS_v2.pt, HPS v2.0"
    assert compared("hpsv2.1", new) == "not compared, the official hash is not known here"
    assert compared("inception", "6726825d" + new[8:]) == "yes, pt_inception-2015-12-05-6726825d.pth"
    assert compared("inception", new).startswith("no, not pt_inception-2015-12-05-6726825d.pth or inception_v3")
    argument = RewardArgument("hpsv2.1", str(file))
    assert provenance_of([argument], "float32")["hpsv2.1.official"] == compared("hpsv2.1", new)
    monkeypatch.setattr(provenance, "_hash", lambda _: old)
    with pytest.warns(UserWarning, match=r"is no official file: no, it is HPS_v2\.pt, HPS v2\.0"):
        assert provenance_of([argument], "float32")["hpsv2.1.official"] == compared("hpsv2.1", old)
