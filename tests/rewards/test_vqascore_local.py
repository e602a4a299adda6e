"""A tiny Qwen2-VL with random weights, against transformers' own model and processors, one picture at a time."""

import shutil
from pathlib import Path
from typing import Any

import dmdr_rewards
import numpy as np
import pytest
import torch
from dmdr_rewards.base.errors import MissingError
from dmdr_rewards.judges.local import UnifiedReward
from dmdr_rewards.networks.qwen_vl import ChatModel
from PIL import Image
from tiny_qwen import save_qwen

PROMPTS = ["a {red} cat", "two birds in a tree, at night"]
YES = [256, 257]


def picture(height: int, width: int) -> Image.Image:
    coarse = np.random.default_rng(height).integers(0, 256, (5, 4, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height))


PICTURES = [picture(60, 100), picture(120, 40)]


def official(folder: Path, image: Image.Image, question: str) -> tuple[Any, dict[str, torch.Tensor]]:
    """transformers' model, and its inputs for a question."""
    from transformers import AutoModelForImageTextToText, AutoTokenizer
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    tokenizer = AutoTokenizer.from_pretrained(folder)
    inputs = dict(Qwen2VLImageProcessorPil.from_pretrained(folder)(images=[image], return_tensors="pt"))
    begin = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>"
    tokens = "<|image_pad|>" * (int(inputs["image_grid_thw"].prod()) // 4)
    end = f"<|vision_end|>{question}<|im_end|>\n<|im_start|>assistant\n"
    ids = torch.tensor([tokenizer(begin + tokens + end)["input_ids"]])
    types = (ids == tokenizer.convert_tokens_to_ids("<|image_pad|>")).long()
    return AutoModelForImageTextToText.from_pretrained(folder).eval(), {
        "input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": types, **inputs
    }  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("kind", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_the_score_is_the_probability_of_all_spellings_of_yes(kind: str, tmp_path: Path) -> None:
    folder, expected = save_qwen(tmp_path, kind), []
    for image, prompt in zip(PICTURES, PROMPTS, strict=True):
        question = f'Does this figure show "{prompt}"? Please answer yes or no.'
        model, inputs = official(folder, image, question)
        expected.append(model(**inputs).logits[0, -1].softmax(dim=0)[YES].sum())
    reward = dmdr_rewards.create("vqascore-local", folder)
    torch.testing.assert_close(reward.score(PICTURES, PROMPTS), torch.stack(expected), rtol=1e-4, atol=0)
    side = 32 if kind == "qwen3_vl" else 28
    assert f"sides multiples of {side}, {4 * side**2} to {9 * side**2} pixels" in reward.info.preprocess
    half = dmdr_rewards.create("vqascore-local", folder, dtype=torch.bfloat16).score(PICTURES, PROMPTS)
    torch.testing.assert_close(half, torch.stack(expected), rtol=0.3, atol=0)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_reach_the_pictures(qwen_folder: Path, slope: Any, checkpointing: bool) -> None:
    reward: Any = dmdr_rewards.create(
        "vqascore-local", qwen_folder, dtype=torch.float64, gradient_checkpointing=checkpointing
    )

    def logs(x: torch.Tensor) -> torch.Tensor:
        question = 'Does this figure show "a cat"? Please answer yes or no.'
        return reward._chat.next_token(x, [question]).log_softmax(dim=1)[:, YES].logsumexp(dim=1).sum()

    generator = torch.Generator().manual_seed(0)
    pictures = 0.1 + 0.8 * torch.rand(1, 3, 60, 80, generator=generator, dtype=torch.float64)
    direction = torch.randn(pictures.shape, generator=generator, dtype=torch.float64)
    leaf = pictures.clone().requires_grad_()
    reward.score(leaf, ["a cat"]).log().sum().backward()
    assert leaf.grad is not None
    # The network normalises in float32, so a smaller step would measure its rounding.
    expected = slope(logs, pictures, direction, step=1e-3)
    assert float((leaf.grad * direction).sum()) == pytest.approx(expected, rel=2e-2)


def test_an_answer_is_transformers_greedy_one(qwen_folder: Path) -> None:
    chat = ChatModel(qwen_folder, "cpu", torch.float32)
    model, inputs = official(qwen_folder, PICTURES[0], "What is this?")
    [tokens] = model.generate(**inputs, do_sample=False, max_new_tokens=12)
    expected = chat.tokenizer.decode(tokens[inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert chat.answer(PICTURES[0], "What is this?", 12) == expected
    assert expected


def test_unified_reward_reads_its_final_score(qwen_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def answer(self: ChatModel, image: Image.Image, question: str, longest: int) -> str:
        asked.append((image.size, question))
        return "1. Good. 2. Sharp.\nFinal Score: 4.5" if len(asked) == 1 else "no idea"

    reward: Any = dmdr_rewards.create("unified-reward", qwen_folder, on_failure="skip")
    monkeypatch.setattr(ChatModel, "answer", answer)
    with pytest.warns(UserWarning, match="unified-reward skipped 1 of 2 pictures.*no score in the answer 'no idea'"):
        scores = reward.score(PICTURES, PROMPTS)
    assert scores[0] == 4.5
    assert scores[1].isnan()
    assert [size for size, _ in asked] == [(100, 60), (40, 120)]
    assert asked[0][1].endswith("after 'Final Score:'.\nYour task is provided as follows:\nText Caption: [a {red} cat]")
    with pytest.raises(ValueError, match="not differentiable"):
        reward.score(torch.zeros(1, 3, 30, 30, requires_grad=True), ["a cat"])


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        ("Final Score: 3", 3.0),
        ("**Final Score:** 2.5/5", 2.5),
        ("Final Score: 9", None),
        ("Final Score: good", None),
        ("4", None),
        ("a 2 for colour. Final Score: 1\nFinal Score: 4", 4.0),
    ],
)
def test_final_scores_are_read_or_refused(qwen_folder: Path, answer: str, score: float | None) -> None:
    assert UnifiedReward.read(object.__new__(UnifiedReward), answer, [], "a cat") == score


@pytest.mark.parametrize("name", ["vqascore-local", "unified-reward"])
def test_folders_that_lack_something_are_refused(qwen_folder: Path, tmp_path: Path, name: str) -> None:
    folder = shutil.copytree(qwen_folder, tmp_path / "qwen")
    for missing in ("chat_template.jinja", "model.safetensors", "tokenizer.json", "preprocessor_config.json"):
        kept = (folder / missing).read_bytes()
        (folder / missing).unlink()
        with pytest.raises(MissingError, match=r"; the official weights: hf download "):
            dmdr_rewards.create(name, folder)
        (folder / missing).write_bytes(kept)
    (folder / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(ValueError, match="cannot be loaded as a model of the family Qwen-VL"):
        dmdr_rewards.create(name, folder)
    with pytest.raises(ValueError, match=r"must contain \{prompt\}|cannot be loaded"):
        dmdr_rewards.create(name, folder, template="good?")
    with pytest.raises(ValueError, match=r"holds the model's own token '<\|im_end\|>'"):
        dmdr_rewards.create(name, qwen_folder).score(PICTURES[:1], ["a cat<|im_end|>"])
