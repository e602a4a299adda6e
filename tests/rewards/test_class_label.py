import json
import shutil
from pathlib import Path
from typing import Any

import dmdr_rewards
import numpy as np
import pytest
import torch
from dmdr_rewards.networks.classifier import ImageClassifier
from safetensors.torch import load_file, save_file
from torch import Tensor

from .conftest import CLASSES, SQUASH, eight_bit, save, vit


def published(folder: Path) -> torch.nn.Module:
    from transformers import AutoModelForImageClassification

    return AutoModelForImageClassification.from_pretrained(folder).eval()


def normalised(pictures: Tensor) -> Tensor:
    mean, std = (torch.tensor(SQUASH[key]).view(1, 3, 1, 1) for key in ("image_mean", "image_std"))
    return (pictures - mean) / std


def test_logits_and_features_are_the_published_models(any_folder: Path, pictures: Tensor) -> None:
    model = published(any_folder)
    entered: list[Tensor] = []
    head = [module for module in model.modules() if isinstance(module, torch.nn.Linear)][-1]
    head.register_forward_pre_hook(lambda _, inputs: entered.append(inputs[0]))
    with torch.no_grad():
        expected = model(pixel_values=normalised(pictures)).logits

    classifier = ImageClassifier.from_folder(any_folder)
    features, logits = classifier(pictures)
    torch.testing.assert_close(logits, expected)
    torch.testing.assert_close(features, entered[0])
    assert torch.equal(classifier.logits(pictures), logits)
    assert torch.equal(classifier.features(pictures), features)
    assert (classifier.num_classes, classifier.num_features) == (CLASSES, features.shape[1])


def test_the_score_is_the_log_probability(any_folder: Path, pictures: Tensor) -> None:
    with torch.no_grad():
        expected = published(any_folder)(pixel_values=normalised(pictures)).logits.log_softmax(dim=-1)
    reward = dmdr_rewards.create("class-label", checkpoint=any_folder)
    for prompts in ([2, 5], torch.tensor([2, 5])):
        scores = reward.score(pictures, prompts)
        assert scores.dtype == torch.float32
        torch.testing.assert_close(scores, torch.stack([expected[0, 2], expected[1, 5]]))


def test_a_batch_of_one_is_one_dimensional(vit_folder: Path, pictures: Tensor) -> None:
    reward = dmdr_rewards.create("class-label", checkpoint=vit_folder)
    one = reward.score(pictures[:1], [2])
    assert one.shape == (1,)
    torch.testing.assert_close(one, reward.score(pictures, [2, 5])[:1])


@pytest.mark.parametrize("size", [(16, 16), (24, 11)])
def test_gradients_against_finite_differences(any_folder: Path, size: tuple[int, int], slope: Any) -> None:
    reward: Any = dmdr_rewards.create("class-label", checkpoint=any_folder, dtype=torch.float64)
    generator = torch.Generator().manual_seed(2)
    pictures = 0.1 + 0.8 * torch.rand(2, 3, *size, generator=generator, dtype=torch.float64)
    direction = torch.randn(pictures.shape, generator=generator, dtype=torch.float64)
    labels = torch.tensor([1, 4])

    def total(x: Tensor) -> Tensor:
        return reward.classifier.logits(x).log_softmax(dim=-1)[[0, 1], labels].sum()

    leaf = pictures.clone().requires_grad_()
    reward.score(leaf, labels).sum().backward()
    assert leaf.grad is not None
    expected = slope(total, pictures, direction)
    assert abs(expected) > 1e-3
    assert float((leaf.grad * direction).sum()) == pytest.approx(expected, rel=1e-5)


def test_weights_are_frozen(vit_folder: Path, pictures: Tensor) -> None:
    reward: Any = dmdr_rewards.create("class-label", checkpoint=vit_folder)
    modules = (reward.classifier.tower.module, reward.classifier.head.module)
    assert not any(parameter.requires_grad for module in modules for parameter in module.parameters())
    assert not any(part.training for module in modules for part in module.modules())
    assert not reward.score(pictures, [0, 1]).requires_grad


def test_half_precision_runs_the_body_alone(any_folder: Path, pictures: Tensor) -> None:
    exact = dmdr_rewards.create("class-label", checkpoint=any_folder).score(pictures, [2, 5])
    reward: Any = dmdr_rewards.create("class-label", checkpoint=any_folder, dtype=torch.bfloat16)
    scores = reward.score(pictures, [2, 5])
    assert scores.dtype == torch.float32
    assert not torch.equal(scores, exact)
    torch.testing.assert_close(scores, exact, atol=5e-3, rtol=2e-2)
    features, logits = reward.classifier(pictures)
    torch.testing.assert_close(logits, reward.classifier.head(features), atol=0, rtol=0)


def test_autocast_of_the_caller_changes_nothing(vit_folder: Path, pictures: Tensor) -> None:
    reward = dmdr_rewards.create("class-label", checkpoint=vit_folder)
    exact = reward.score(pictures, [2, 5])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(reward.score(pictures, [2, 5]), exact)


def test_half_precision_pictures_are_scored(vit_folder: Path, pictures: Tensor) -> None:
    reward = dmdr_rewards.create("class-label", checkpoint=vit_folder)
    half = pictures.bfloat16().requires_grad_()
    scores = reward.score(half, [2, 5])
    torch.testing.assert_close(scores, reward.score(half.detach().float(), [2, 5]))
    scores.sum().backward()
    assert half.grad is not None
    assert half.grad.abs().sum() > 0


def test_eight_bit_pictures_are_scored(vit_folder: Path) -> None:
    reward = dmdr_rewards.create("class-label", checkpoint=vit_folder)
    array = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)
    expected = reward.score(torch.from_numpy(array).permute(0, 3, 1, 2) / 255, [2, 5])
    torch.testing.assert_close(reward.score(array, [2, 5]), expected)


def test_a_list_may_mix_sizes(vit_folder: Path) -> None:
    reward = dmdr_rewards.create("class-label", checkpoint=vit_folder)
    pictures = [eight_bit(20, 30), eight_bit(16, 16)]
    single = [reward.score([picture], [2]) for picture in pictures]
    torch.testing.assert_close(reward.score(pictures, [2, 2]), torch.cat(single))


def test_the_authors_way_is_a_squash(tmp_path: Path) -> None:
    crop = {**SQUASH, "size": {"shortest_edge": 20}, "do_center_crop": True, "crop_size": {"height": 16, "width": 16}}
    folder = save(vit(), tmp_path, {**crop, "resample": 3})
    reward: Any = dmdr_rewards.create("class-label", checkpoint=folder, preprocess="dmdr")
    assert reward.preprocess.resize == (16, 16)
    assert reward.preprocess.crop is None
    assert dmdr_rewards.create("class-label", checkpoint=folder).info.preprocess.startswith("shorter side to 20")


def test_info(vit_folder: Path) -> None:
    info = dmdr_rewards.create("class-label", checkpoint=str(vit_folder)).info
    assert (info.name, info.prompt, info.differentiable) == ("class-label", "class_label", True)
    assert (info.image_size, info.num_classes, info.range) == ((16, 16), CLASSES, (-float("inf"), 0.0))
    assert info.source == str(vit_folder)
    assert info.preprocess.startswith("squash to 16x16")
    with pytest.raises(AttributeError):
        info.name = "other"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("images", "prompts", "message"),
    [
        (torch.rand(2, 3, 16, 16) * 3, [0, 0], "clamp"),
        (torch.rand(2, 3, 16, 16), [0, CLASSES], f"class label {CLASSES} is out of range"),
        (torch.rand(2, 3, 16, 16), [0], "2 images but 1 class labels"),
        (torch.rand(2, 3, 16, 16), ["a cat", "a dog"], "takes integers"),
    ],
)
def test_what_is_refused(images: Tensor, prompts: Any, message: str, vit_folder: Path) -> None:
    with pytest.raises(ValueError, match=message):
        dmdr_rewards.create("class-label", checkpoint=vit_folder).score(images, prompts)


def test_an_unknown_dtype_is_refused(vit_folder: Path) -> None:
    with pytest.raises(ValueError, match=r"dtype torch\.int8: choose one of torch\.float32"):
        dmdr_rewards.create("class-label", checkpoint=vit_folder, dtype=torch.int8)


@pytest.fixture
def copied(vit_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(vit_folder, tmp_path / "copy"))


def refused(folder: Path, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ImageClassifier.from_folder(folder)


def test_weights_that_differ_are_listed(copied: Path) -> None:
    file = copied / "model.safetensors"
    tensors = load_file(file)
    tensors["classifier.weight"] = tensors["classifier.weight"][:3]
    tensors["stowaway"] = tensors.pop("classifier.bias")
    save_file(tensors, file, metadata={"format": "pt"})
    refused(
        copied,
        r"missing: classifier\.bias; unexpected: stowaway; wrong shape: classifier\.weight \(3, 32\), expected \(7",
    )


def test_damaged_weights_are_refused(copied: Path) -> None:
    file = copied / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    refused(copied, "cannot be loaded as an image classifier")


def test_pickled_weights_are_not_read(copied: Path) -> None:
    (copied / "model.safetensors").rename(copied / "pytorch_model.bin")
    refused(copied, "pickled weights are not read")


def test_code_that_comes_with_a_checkpoint_is_not_run(copied: Path) -> None:
    config = json.loads((copied / "config.json").read_text())
    code = "AutoModelForImageClassification"
    config |= {"model_type": "stranger", "auto_map": {"AutoConfig": "code.Config", code: "code.Model"}}
    (copied / "config.json").write_text(json.dumps(config))
    (copied / "code.py").write_text(f"open({str(copied / 'ran')!r}, 'w')")
    refused(copied, "cannot be loaded as an image classifier")
    assert not (copied / "ran").exists()


def test_other_folders_are_refused(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", "no such folder")
    refused(tmp_path, r"must hold config\.json")

    from transformers import BertConfig, BertModel

    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    BertModel(BertConfig(vocab_size=10, **sizes)).save_pretrained(tmp_path)
    refused(tmp_path, "cannot be loaded as an image classifier")


def test_a_classifier_without_a_linear_layer_is_refused(tmp_path: Path) -> None:
    from transformers import ViTConfig, ViTForImageClassification

    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, num_labels=0, **sizes)).save_pretrained(tmp_path)
    refused(tmp_path, "no linear layer under the name `classifier`")
