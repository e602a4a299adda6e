"""The reference is transformers' own model, tokenizer and processor (the one on PIL) on the same folder."""

import json
from pathlib import Path
from typing import Any

import dmdr_rewards
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from .conftest import PROMPTS, SHAPES, eight_bit, gradient_slopes, picture_gradients, randomise
from .conftest import cosines as dot

CONTEXT = 20


def write_tokenizer(folder: Path) -> int:
    """CLIP's kind of vocabulary, of single bytes and one merge -> the number of its entries."""
    from open_clip.tokenizer import bytes_to_unicode

    letters = list(bytes_to_unicode().values())
    words = [*letters, *(letter + "</w>" for letter in letters), "ca", "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: index for index, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\nc a\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "CLIPTokenizer"}))
    return len(words)


def clip_folder(folder: Path) -> Path:
    from transformers import CLIPConfig, CLIPModel

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    text = {"vocab_size": write_tokenizer(folder), "max_position_embeddings": CONTEXT, "eos_token_id": 2}
    pixels = {"image_size": 32, "patch_size": 8}
    model = CLIPModel(CLIPConfig(text_config={**sizes, **text}, vision_config={**sizes, **pixels}, projection_dim=16))
    randomise(model)
    with torch.no_grad():
        model.logit_scale.fill_(4.6)
    model.eval().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return clip_folder(tmp_path_factory.mktemp("pickscore"))


@pytest.fixture(scope="module")
def reward(folder: Path) -> Any:
    return dmdr_rewards.create("pickscore", folder)


def official(folder: Path, pictures: list[Any], prompts: list[str]) -> Tensor:
    from transformers import AutoTokenizer, CLIPModel
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    tokens = AutoTokenizer.from_pretrained(folder)(
        prompts, padding=True, truncation=True, max_length=CONTEXT, return_tensors="pt"
    )
    model = CLIPModel.from_pretrained(folder).eval()
    with torch.no_grad():
        rows = [model(**tokens, **processor(picture, return_tensors="pt")).logits_per_image[0] for picture in pictures]
    return torch.stack(rows).diagonal()


@pytest.mark.parametrize("shape", [*SHAPES.values(), (35, 32), (32, 37)])
def test_scores_are_the_official_ones(shape: tuple[int, int], reward: Any, folder: Path) -> None:
    pictures = [eight_bit(*shape, seed=seed) for seed in (0, 1)]
    expected = official(folder, pictures, PROMPTS)
    torch.testing.assert_close(reward.score(pictures, PROMPTS), expected, atol=1e-4, rtol=0)  # of up to 100


def test_long_prompts_are_cut_with_one_warning(folder: Path) -> None:
    reward = dmdr_rewards.create("pickscore", folder, preprocess="dmdr", gradient_checkpointing=True)
    pictures = [eight_bit(32, 32)] * 2
    with pytest.warns(UserWarning, match=f"more than {CONTEXT} tokens are truncated") as told:
        scores, _ = (reward.score(pictures, ["cat " * count, "a cat"]) for count in (20, 21))
    assert len([each for each in told if "truncated" in str(each.message)]) == 1
    torch.testing.assert_close(scores, official(folder, pictures, ["cat " * 20, "a cat"]), atol=1e-4, rtol=0)


def test_gradients_against_finite_differences(folder: Path, slope: Any) -> None:
    reward: Any = dmdr_rewards.create("pickscore", folder, dtype=torch.float64)
    given, expected = gradient_slopes(reward, PROMPTS, slope, dot(reward, PROMPTS, reward.scale))
    assert abs(expected) > 1e-2
    assert given == pytest.approx(expected, rel=1e-6)


@pytest.mark.bits
def test_gradient_checkpointing_changes_no_value(folder: Path, reward: Any) -> None:
    recomputing = dmdr_rewards.create("pickscore", folder, gradient_checkpointing=True)
    assert torch.equal(picture_gradients(reward, PROMPTS), picture_gradients(recomputing, PROMPTS))


def test_half_precision_is_close(folder: Path, reward: Any) -> None:
    pictures = torch.rand(2, 3, 40, 50, generator=torch.Generator().manual_seed(0))
    half = dmdr_rewards.create("pickscore", folder, dtype=torch.bfloat16).score(pictures, PROMPTS)
    exact = reward.score(pictures, PROMPTS)
    assert half.dtype == torch.float32
    assert not torch.equal(half, exact)
    torch.testing.assert_close(half / reward.scale, exact / reward.scale, atol=1.5e-2, rtol=0)


def test_texts_do_not_depend_on_their_company_in_half_precision(folder: Path, reward: Any) -> None:
    half: Any = dmdr_rewards.create("pickscore", folder, dtype=torch.bfloat16)
    half.remember_texts(0)
    many = ["cat " * number for number in range(1, 10)]
    alone = torch.cat([half.encode_text([text]) for text in many])
    torch.testing.assert_close(alone, half.encode_text(many), atol=1e-6, rtol=0)
    assert half.notes(["a cat", "cat " * 19]) == [None, f"reads {CONTEXT} of the prompt's 40 tokens"]


def test_info(reward: Any) -> None:
    assert reward.scale == pytest.approx(99.484, abs=1e-3)
    assert reward.info.range == (-reward.scale, reward.scale)
    assert reward.info.preprocess.startswith("shorter side to 32, bicubic, antialias; centre crop 32x32")
    assert reward.info.preprocess.endswith("; QuickGELU")


def test_the_dropped_constants_of_old_files_are_let_through(tmp_path: Path, reward: Any) -> None:
    folder = clip_folder(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    tensors["text_model.embeddings.position_ids"] = torch.arange(CONTEXT)[None]
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    picture = [eight_bit(40, 50)]
    scores = dmdr_rewards.create("pickscore", folder).score(picture, ["a"])
    torch.testing.assert_close(scores, reward.score(picture, ["a"]))


def test_another_tokenizer_is_not_taken_for_the_same(tmp_path: Path, reward: Any, folder: Path) -> None:
    clip_folder(tmp_path)
    same: Any = dmdr_rewards.create("pickscore", tmp_path)
    assert same.towers is reward.towers
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    other: Any = dmdr_rewards.create("pickscore", tmp_path)
    assert other.towers is not reward.towers
    assert not torch.allclose(other.encode_text(["cat"]), reward.encode_text(["cat"]))


def test_what_is_refused(tmp_path: Path) -> None:
    def refused(message: str) -> None:
        with pytest.raises(ValueError, match=message):
            dmdr_rewards.create("pickscore", tmp_path)

    refused(r"must be a folder with model\.safetensors or pytorch_model\.bin")
    clip_folder(tmp_path)
    (tmp_path / "merges.txt").unlink()
    (tmp_path / "vocab.json").unlink()
    refused("has no tokenizer: copy its CLIP's tokenizer.json")
    write_tokenizer(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["stowaway"] = tensors.pop("visual_projection.weight")
    tensors["text_projection.weight"] = torch.ones(3, 3)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    refused(
        r"missing: visual_projection\.weight; unexpected: stowaway; wrong shape: text_projection\.weight \(3, 3\), exp"
    )
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    refused(r"holds a bert model: give a CLIPModel \(clip\)")
