"""The reference is open_clip's model and transform, and the head's formula written out."""

import json
from pathlib import Path
from typing import Any

import dmdr_rewards
import pytest
import torch
from dmdr_rewards.cli import main
from torch import Tensor

from .conftest import SHAPES, TINY_CLIP, eight_bit, gradient_slopes, open_clip_model
from .test_pickscore import clip_folder

HEAD = "sac+logos+ava1-l14-linearMSE.pth"
QUICK = {**TINY_CLIP, "quick_gelu": True}


def head() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for index, shape in {0: (1024, 16), 2: (128, 1024), 4: (64, 128), 6: (16, 64), 7: (1, 16)}.items():
        tensors[f"layers.{index}.weight"] = torch.randn(shape, generator=generator) / shape[1] ** 0.5
        tensors[f"layers.{index}.bias"] = torch.randn(shape[0], generator=generator)
    return tensors


def official(model: Any, pictures: list[Any]) -> Tensor:
    from open_clip.transform import image_transform

    transform = image_transform(32, is_train=False, resize_mode="shortest", interpolation="bicubic")
    with torch.no_grad():
        x = model.encode_image(torch.stack([transform(picture) for picture in pictures]))
    x = x / x.norm(dim=-1, keepdim=True)
    tensors = head()
    for index in (0, 2, 4, 6, 7):
        x = x @ tensors[f"layers.{index}.weight"].T + tensors[f"layers.{index}.bias"]
    return x[:, 0]


@pytest.fixture(scope="module")
def head_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("head") / HEAD
    torch.save(head(), path)
    return path


@pytest.fixture(scope="module")
def reward(clip_file: Path, clip_json: Path, head_file: Path) -> Any:
    return dmdr_rewards.create("aesthetic", clip_file, head=head_file, model=str(clip_json))


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_scores_are_the_official_ones(shape: tuple[int, int], reward: Any) -> None:
    pictures = [eight_bit(*shape, seed=seed) for seed in (0, 1)]
    expected = official(open_clip_model(QUICK), pictures)
    torch.testing.assert_close(reward.score(pictures, ["a", "b"]), expected, atol=1e-5, rtol=0)


def test_the_prompt_is_counted_not_read(clip_file: Path, clip_json: Path, head_file: Path) -> None:
    reward: Any = dmdr_rewards.create(
        "aesthetic", clip_file, head=head_file, model=str(clip_json), dtype=torch.float64, gradient_checkpointing=True
    )
    pictures = [eight_bit(32, 32)] * 2
    assert torch.equal(reward.score(pictures, ["a", "b"]), reward.score(pictures, ["c", ""]))
    assert "_text" not in vars(reward.towers), "the text tower stays where it is"
    with pytest.raises(ValueError, match="2 images but 1 prompts"):
        reward.score(pictures, ["a"])
    with pytest.raises(ValueError, match="give a list"):
        reward.score(pictures, "ab")


def test_it_goes_with_texts_and_with_labels(reward: Any, clip_file: Path, clip_json: Path, vit_folder: Path) -> None:
    pictures = [eight_bit(16, 16)] * 2
    clip = dmdr_rewards.create("clip", clip_file, model=str(clip_json))
    labels = dmdr_rewards.create("class-label", vit_folder)
    for other, kind, prompts in ((clip, "text", ["a", "b"]), (labels, "class_label", [0, 1])):
        weighted = dmdr_rewards.WeightedSum({other: 1.0, reward: 1.0})
        assert weighted.info.prompt == kind
        torch.testing.assert_close(weighted(pictures, prompts).parts["aesthetic"], reward.score(pictures, ["", ""]))
    assert dmdr_rewards.WeightedSum({reward: 1.0}).info.prompt == "none"


def test_the_program_asks_for_no_prompt(
    reward: Any, clip_file: Path, clip_json: Path, head_file: Path, tmp_path: Path
) -> None:
    picture = eight_bit(20, 30)
    (tmp_path / "pictures").mkdir()
    picture.save(tmp_path / "pictures/one.png")
    options = [f"--option=aesthetic.head={head_file}", f"--option=aesthetic.model={clip_json}", "--workers=0"]
    output = tmp_path / "scores.jsonl"
    main([str(tmp_path / "pictures"), f"--reward=aesthetic={clip_file}", *options, "-o", str(output)])
    row = json.loads(output.read_text(encoding="utf-8"))
    assert row["aesthetic"] == pytest.approx(reward.score([picture], [""]).item(), abs=1e-6)


def test_a_folder_holds_both_files(
    clip_file: Path, clip_json: Path, head_file: Path, tmp_path: Path, reward: Any
) -> None:
    (tmp_path / "open_clip_pytorch_model.bin").symlink_to(clip_file)
    with pytest.raises(ValueError, match="must be a folder with sac"):
        dmdr_rewards.create("aesthetic", tmp_path, model=str(clip_json))
    (tmp_path / HEAD).symlink_to(head_file)
    picture = [eight_bit(40, 50)]
    folder = dmdr_rewards.create("aesthetic", tmp_path, model=str(clip_json))
    assert torch.equal(folder.score(picture, ["a"]), reward.score(picture, ["a"]))


def test_transformers_clip_will_do(tmp_path: Path, head_file: Path) -> None:
    from transformers import CLIPModel

    folder = clip_folder(tmp_path)
    model = CLIPModel.from_pretrained(folder).eval()

    class Reference:
        def encode_image(self, pixels: Tensor) -> Tensor:
            return model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output)

    pictures = [eight_bit(40, 50)]
    scores = dmdr_rewards.create("aesthetic", folder, head=head_file).score(pictures, ["a"])
    torch.testing.assert_close(scores, official(Reference(), pictures), atol=1e-5, rtol=0)


def test_gradients_against_finite_differences(clip_file: Path, clip_json: Path, head_file: Path, slope: Any) -> None:
    reward: Any = dmdr_rewards.create("aesthetic", clip_file, head=head_file, model=str(clip_json), dtype=torch.float64)

    def exact(pictures: Tensor) -> Tensor:
        x = reward.features(reward.pixels(pictures))
        x = x / x.norm(dim=-1, keepdim=True)
        for linear in reward._head.module:
            x = linear(x)
        return x[:, 0]

    given, expected = gradient_slopes(reward, ["a", "b"], slope, exact)
    assert abs(expected) > 1e-3
    assert given == pytest.approx(expected, rel=1e-6)


def test_half_precision_is_close(clip_file: Path, clip_json: Path, head_file: Path, reward: Any) -> None:
    pictures = torch.rand(2, 3, 40, 50, generator=torch.Generator().manual_seed(0))
    half = dmdr_rewards.create("aesthetic", clip_file, head=head_file, model=str(clip_json), dtype=torch.bfloat16)
    scores, exact = half.score(pictures, ["a", "b"]), reward.score(pictures, ["a", "b"])
    assert scores.dtype == torch.float32
    assert not torch.equal(scores, exact)
    torch.testing.assert_close(scores, exact, atol=5e-3, rtol=0)


def test_other_heads_are_refused(clip_file: Path, clip_json: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is a file: give head=sac\+logos"):
        dmdr_rewards.create("aesthetic", clip_file, model=str(clip_json))
    tensors = head()
    tensors["layers.7.weight"] = torch.ones(1, 3)
    tensors["layers.9.weight"] = tensors.pop("layers.6.bias")
    torch.save(tensors, tmp_path / "bad.pth")
    with pytest.raises(
        ValueError,
        match=r"missing: layers\.6\.bias; unexpected: layers\.9\.weight; wrong shape: layers\.7\.weight \(1, 3\)",
    ):
        dmdr_rewards.create("aesthetic", clip_file, head=tmp_path / "bad.pth", model=str(clip_json))
