"""A tiny Qwen2-VL with random weights, in the release's file format, against transformers' own model and processor.

The package hpsv3 1.0.0 builds the same inputs with these classes; `docs/rewards.md` says what was compared with it.
"""

import hashlib
from pathlib import Path
from typing import Any

import dmdr_rewards
import numpy as np
import pytest
import torch
from dmdr_rewards.models import hpsv3
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_qwen import save_hpsv3
from torch import Tensor

PROMPTS = ["a {red} cat", "two birds in a tree, at night"]
END = "<|Reward|>\n\nEND\n"
TAIL = f"{END}<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files that `describe("hpsv3").fetch` downloads, tiny."""
    return save_hpsv3(tmp_path_factory.mktemp("hpsv3"))


@pytest.fixture(scope="module")
def reward(folder: Path) -> hpsv3.HPSv3:
    return dmdr_rewards.create("hpsv3", folder)  # type: ignore[return-value]


def official(folder: Path, picture: Image.Image, prompt: str) -> Tensor:
    """The steps of the package hpsv3: PIL's bicubic resize to about 256·28·28 pixels, Qwen2-VL's processor, its model
    with every position one further than the last, and the head at <|Reward|>."""
    from transformers import AutoConfig, AutoTokenizer, Qwen2VLModel
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|Reward|>"]})
    processor = Qwen2VLImageProcessorPil(min_pixels=hpsv3.AREA, max_pixels=hpsv3.AREA)
    inputs = processor(images=[picture], return_tensors="pt")
    content = [{"type": "image"}, {"type": "text", "text": hpsv3.QUESTION.replace("{prompt}", prompt) + END}]
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    assert text.endswith(TAIL)
    count = int(inputs["image_grid_thw"].prod()) // 4
    ids = torch.tensor([tokenizer(text.replace("<|image_pad|>", "<|image_pad|>" * count))["input_ids"]])

    config = AutoConfig.from_pretrained(folder)
    config.text_config.vocab_size = len(tokenizer)
    tensors = {"visual.": "visual.", "model.": "language_model.", "rm_head.": "rm_head."}
    named: dict[str, dict[str, Tensor]] = {"visual.": {}, "model.": {}, "rm_head.": {}, "lm_head.": {}}
    for name, tensor in load_file(folder / "HPSv3.safetensors").items():
        prefix = name.split(".")[0] + "."
        named[prefix][tensors.get(prefix, "") + name.removeprefix(prefix)] = tensor
    model = Qwen2VLModel(config).eval()
    model.load_state_dict({**named["visual."], **named["model."]})
    head = {name.removeprefix("rm_head."): tensor for name, tensor in named["rm_head."].items()}
    positions = torch.arange(ids.shape[1]).expand(3, 1, -1)
    with torch.no_grad():
        states = model(input_ids=ids, position_ids=positions, **inputs).last_hidden_state
        hidden = states[ids == tokenizer.convert_tokens_to_ids("<|Reward|>")]
        for layer in ("0", "3", "5"):
            hidden = torch.relu(hidden) if layer != "0" else hidden
            hidden = hidden @ head[f"{layer}.weight"].T + head[f"{layer}.bias"]
    return hidden[0]


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 4, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height))


def test_scores_are_those_of_the_official_steps_for_pictures_of_any_shape(reward: Any, folder: Path) -> None:
    pictures = [picture(90, 160), picture(300, 120, seed=1)]
    expected = torch.stack([official(folder, *pair) for pair in zip(pictures, PROMPTS, strict=True)])
    torch.testing.assert_close(reward.score(pictures, PROMPTS), expected[:, 0], rtol=1e-4, atol=1e-4)
    _, spread = reward.distribution(pictures, PROMPTS)
    torch.testing.assert_close(spread.log(), expected[:, 1], rtol=1e-4, atol=1e-4)
    assert expected[:, 0].diff().abs() > 0.01


def test_the_question_is_the_releases() -> None:
    spelled = hpsv3.QUESTION.replace("{prompt}", "{text_prompt}") + "<|Reward|>\n\nEND\n"
    digest = "f6ee57479d4e9eee76b49c00dc962e1e696a5a2b3cc32cebd9b1fa76fe27502c"  # of hpsv3 1.0.0's
    assert hashlib.sha256(spelled.encode()).hexdigest() == digest


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_reach_the_pictures(
    folder: Path, slope: Any, checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hpsv3, "AREA", 9 * 28 * 28)
    monkeypatch.setattr(hpsv3, "QUESTION", "Asked for: {prompt}. Rated: ")
    reward: Any = dmdr_rewards.create("hpsv3", folder, dtype=torch.float64, gradient_checkpointing=checkpointing)
    generator = torch.Generator().manual_seed(0)
    pictures = 0.1 + 0.8 * torch.rand(1, 3, 40, 60, generator=generator, dtype=torch.float64)
    direction = torch.randn(pictures.shape, generator=generator, dtype=torch.float64)
    leaf = pictures.clone().requires_grad_()
    reward.score(leaf, PROMPTS[:1]).sum().backward()
    assert leaf.grad is not None
    # The network normalises in float32, so a smaller step would measure its rounding.
    expected = slope(lambda x: reward.distribution(x, PROMPTS[:1])[0].sum(), pictures, direction, step=1e-3)
    assert float((leaf.grad * direction).sum()) == pytest.approx(expected, rel=2e-2)


def test_files_of_other_models_are_refused(folder: Path, tmp_path: Path) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(folder / "HPSv3.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, tmp_path / "HPSv3.safetensors")
    with pytest.raises(ValueError, match=r"HPSv3\.safetensors is not of this model; missing: .*norm\.weight"):
        dmdr_rewards.create("hpsv3", tmp_path / "HPSv3.safetensors")
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][1:]
    save_file(tensors, tmp_path / "HPSv3.safetensors")
    with pytest.raises(ValueError, match=r"knows 263 tokens, the tokenizer beside it 264 with <\|Reward\|>: give"):
        dmdr_rewards.create("hpsv3", tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(ValueError, match="model_type 'vit' is not of the family Qwen-VL"):
        dmdr_rewards.create("hpsv3", tmp_path)


def test_a_prompt_with_the_models_own_tokens_is_refused(reward: Any) -> None:
    for token in ("<|image_pad|>", "<|Reward|>", "<|im_end|>"):
        with pytest.raises(ValueError, match=r"prompt 'a cat.*holds the model's own token"):
            reward.score([picture(30, 30)], [f"a cat{token}"])
    with pytest.raises(ValueError, match="1 images but 2 prompts"):
        reward.score([picture(30, 30)], PROMPTS)
