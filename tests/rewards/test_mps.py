"""A tiny MPS with random weights, in the release's file format.

`expected` is written from the formulas, with loops over heads and tokens. `docs/rewards.md` says how close the code of
the authors is.
"""

import math
from pathlib import Path
from typing import Any

import dmdr_rewards
import pytest
import torch
import torch.nn.functional as F
from dmdr_rewards.models.mps import CONDITIONS
from dmdr_rewards.networks.word_attention import turned
from safetensors.torch import load_file, save_file
from tiny_mps import save_mps
from torch import Tensor

from .conftest import SHAPES, eight_bit, gradient_slopes, picture_gradients

PROMPTS = ["red light, position", "birds, texture"]
CONTEXT = 77
FILE = "MPS_overall_checkpoint.safetensors"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_mps(tmp_path_factory.mktemp("mps"))


@pytest.fixture(scope="module")
def reward(folder: Path) -> Any:
    return dmdr_rewards.create("mps", folder)


def normalised(x: Tensor, block: dict[str, Tensor]) -> Tensor:
    scaled = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
    return scaled * block["norm.weight"] + block["norm.bias"]


def attended(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Tensor[N, heads·64], Tensor[M, 64] twice -> Tensor[N, heads·64]; every head by itself."""
    heads = [(q_h @ k.T / 8).softmax(dim=-1) @ v for q_h in q.split(64, dim=-1)]
    return torch.cat(heads, dim=-1)


def gated(h: Tensor, widen: Tensor, narrow: Tensor) -> Tensor:
    value, gate = (h @ widen.T).chunk(2, dim=-1)
    return (value * gate * gate.sigmoid()) @ narrow.T


def rotated(x: Tensor) -> Tensor:
    """Row n of Tensor[N, 64] as 32 complex numbers, of which number i turns by n / 10000^(i / 32)."""
    numbers = torch.complex(x[:, :32].double(), x[:, 32:].double())
    angles = torch.arange(len(x))[:, None] / 10000 ** (torch.arange(32).double() / 32)
    turned = numbers * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([turned.real, turned.imag], dim=1).float()


def read_by(tensors: dict[str, Tensor], x: Tensor, words: Tensor) -> Tensor:
    """The picture's first token after both layers on the CLIP, for tokens x and the words that count."""
    for layer in (0, 1):
        first, second = (
            {name.removeprefix(block): tensor for name, tensor in tensors.items() if name.startswith(block)}
            for block in (f"cross_model.layers.{layer}.0.fn.", f"cross_model.layers.{layer}.1.fn.")
        )
        h = normalised(x, first)
        k, v = (words @ first["to_kv.weight"].T).split(64, dim=-1)
        seen = attended(h @ first["to_q.weight"].T, k, v) @ first["to_out.weight"].T
        x = x + seen + gated(h, first["ff.0.weight"], first["ff.2.weight"])
        h = normalised(x, second)
        fused = second["fused_attn_ff_proj.weight"]
        q, k, v = (h @ fused[: -8 * x.shape[1]].T).split([128, 64, 64], dim=-1)
        q = torch.cat([rotated(q_h) for q_h in q.split(64, dim=-1)], dim=-1)
        seen = attended(q, rotated(k), v) @ second["attn_out.weight"].T
        x = x + seen + gated(h, fused[-8 * x.shape[1] :], second["ff_out.1.weight"])
    return x[0]


def expected(folder: Path, pictures: list[Any], prompts: list[str], condition: str = "overall") -> Tensor:
    from transformers import AutoTokenizer, CLIPConfig, CLIPModel
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    tensors = load_file(folder / FILE)
    model = CLIPModel(CLIPConfig.from_pretrained(folder)).eval()
    model.load_state_dict({n.removeprefix("model."): t for n, t in tensors.items() if n.startswith("model.")})
    processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def states(text: str) -> tuple[Tensor, int]:
        ids = tokenizer(
            [text], padding="max_length", truncation=True, max_length=CONTEXT, return_tensors="pt"
        ).input_ids
        last = model.text_model(input_ids=ids).last_hidden_state
        return model.text_projection(last)[0], ids[0].tolist().index(tokenizer.eos_token_id)

    scores = []
    with torch.no_grad():
        asked, _ = states(CONDITIONS[condition])
        for picture, prompt in zip(pictures, prompts, strict=True):
            hidden = model.vision_model.embeddings(processor(picture, return_tensors="pt")["pixel_values"])
            hidden = model.vision_model.encoder(model.vision_model.pre_layrnorm(hidden)).last_hidden_state
            words, end = states(prompt)
            near = torch.stack([max(word @ other for other in asked) for word in words])
            first = read_by(tensors, model.visual_projection(hidden)[0], words[near > 0.3 * near.max()])
            scores.append(math.exp(4.6) * F.cosine_similarity(first, words[end], dim=0))
    return torch.stack(scores)


@pytest.mark.parametrize("shape", [SHAPES["portrait"], SHAPES["landscape"], (35, 32)])
def test_scores_follow_the_formulas(shape: tuple[int, int], reward: Any, folder: Path) -> None:
    pictures = [eight_bit(*shape, seed=seed) for seed in (0, 1)]
    scores = reward.score(pictures, PROMPTS)
    assert scores.std() > 0.1
    torch.testing.assert_close(scores, expected(folder, pictures, PROMPTS), atol=2e-3, rtol=0)  # of up to 100


@pytest.mark.parametrize("condition", ["aesthetics", "alignment", "detail"])
def test_a_condition_changes_the_words_that_count(condition: str, reward: Any, folder: Path) -> None:
    other: Any = dmdr_rewards.create("mps", folder, condition=condition)
    assert other.tower is reward.tower  # the picture's work is done once for all conditions
    assert condition in other.info.description
    pictures = [eight_bit(40, 32, seed=seed) for seed in (0, 1)]
    scores = other.score(pictures, PROMPTS)
    torch.testing.assert_close(scores, expected(folder, pictures, PROMPTS, condition), atol=2e-3, rtol=0)
    words = other.towers.texts([*PROMPTS, "a cat with hands in the light, and a word on its texture"])[:, :-1]
    assert other.counts(words).any(dim=1).all()
    assert not other.counts(words).all()
    assert not torch.equal(other.counts(words), reward.counts(words))


def test_a_score_does_not_depend_on_the_other_prompts(reward: Any) -> None:
    pictures = [eight_bit(32, 32, seed=seed) for seed in (0, 1)]
    reward.remember_texts(0)
    alone = torch.cat([reward.score([each], [text]) for each, text in zip(pictures, PROMPTS, strict=True)])
    torch.testing.assert_close(alone, reward.score(pictures, PROMPTS), atol=1e-3, rtol=0)
    one, other = reward.towers.texts(PROMPTS)[:, :-1]
    assert torch.equal(reward.counts(torch.stack([one, 10 * other])), reward.counts(torch.stack([one, other])))


def test_gradients_against_finite_differences(folder: Path, slope: Any) -> None:
    reward: Any = dmdr_rewards.create("mps", folder, dtype=torch.float64)

    def exact(pictures: Tensor) -> Tensor:
        states = reward.towers.texts(PROMPTS)
        picture = reward.towers.reader(reward.features_of(pictures), states[:, :-1], reward.counts(states[:, :-1]))
        return reward.scale * F.cosine_similarity(picture, states[:, -1], dim=-1)

    given, expected = gradient_slopes(reward, PROMPTS, slope, exact)
    assert abs(expected) > 1e-2
    assert given == pytest.approx(expected, rel=1e-6)


@pytest.mark.bits
def test_gradient_checkpointing_changes_no_value(folder: Path, reward: Any) -> None:
    recomputing = dmdr_rewards.create("mps", folder, gradient_checkpointing=True)
    assert torch.equal(picture_gradients(reward, PROMPTS), picture_gradients(recomputing, PROMPTS))


def test_half_precision_is_close_and_leaves_texts_alone(folder: Path, reward: Any) -> None:
    pictures = torch.rand(2, 3, 40, 50, generator=torch.Generator().manual_seed(0))
    half: Any = dmdr_rewards.create("mps", folder, dtype=torch.bfloat16)
    exact = reward.score(pictures, PROMPTS)
    scores = half.score(pictures, PROMPTS)
    assert scores.dtype == torch.float32
    assert not torch.equal(scores, exact)
    torch.testing.assert_close(scores / reward.scale, exact / reward.scale, atol=3e-2, rtol=0)
    torch.testing.assert_close(half.towers.texts(PROMPTS), reward.towers.texts(PROMPTS), atol=1e-5, rtol=0)


def test_angles_are_rounded_as_in_a_file_of_float16(tmp_path: Path) -> None:
    tensors = load_file(save_mps(tmp_path) / FILE)
    save_file({name: tensor.half() for name, tensor in tensors.items()}, tmp_path / FILE)
    reward: Any = dmdr_rewards.create("mps", tmp_path)
    angles = reward.towers.reader.module.layers[0][1].angles
    speeds = tensors["cross_model.layers.0.1.fn.rotary_emb.inv_freq"].half()
    assert torch.equal(angles[16], (16 * speeds).float())
    assert torch.isfinite(reward.score([eight_bit(32, 32)], ["a"])).all()


def test_a_turn_by_a_quarter() -> None:
    pair = torch.tensor([[3.0, 5.0]])
    torch.testing.assert_close(turned(pair, torch.tensor([[math.pi / 2]])), torch.tensor([[-5.0, 3.0]]))


def test_long_prompts_are_cut_with_a_note(folder: Path, reward: Any) -> None:
    fresh: Any = dmdr_rewards.create("mps", folder, preprocess="dmdr", gradient_checkpointing=True)
    with pytest.warns(UserWarning, match=f"more than {CONTEXT} tokens are truncated"):
        fresh.score([eight_bit(32, 32)], ["cat " * 30])
    assert reward.notes(["cat", "cat " * 30]) == [None, f"reads {CONTEXT} of the prompt's 92 tokens"]


def test_info(reward: Any) -> None:
    assert reward.info.range == (-reward.scale, reward.scale)
    assert reward.scale == pytest.approx(99.484, abs=1e-3)
    assert reward.info.preprocess.startswith("shorter side to 32, bicubic, antialias; centre crop 32x32")
    assert reward.info.preprocess.endswith("; GELU")


def test_what_is_refused(tmp_path: Path, folder: Path) -> None:
    def refused(message: str, **options: Any) -> None:
        with pytest.raises(ValueError, match=message) as caught:
            dmdr_rewards.create("mps", tmp_path, **options)
        assert "\n" not in str(caught.value)

    refused("condition 'colour': choose one of overall, aesthetics, alignment, detail", condition="colour")
    save_mps(tmp_path)
    tensors = load_file(tmp_path / FILE)
    save_file({**tensors, "model.stowaway": torch.zeros(1)}, tmp_path / FILE)
    refused("unexpected: stowaway")
    save_file({**tensors, "stowaway": torch.zeros(1)}, tmp_path / FILE)
    refused("unexpected: stowaway")
    fused = "layers.1.1.fn.fused_attn_ff_proj.weight"
    save_file({**tensors, f"cross_model.{fused}": torch.zeros(3, 16)}, tmp_path / FILE)
    refused(rf"wrong shape: {fused} \(3, 16\), expected \(768, 64\)")
    save_file({n: t for n, t in tensors.items() if n.startswith("model.")}, tmp_path / FILE)
    refused(r"missing: layers\.0\.0\.fn\.ff\.0\.weight, ")
    (tmp_path / FILE).unlink()
    torch.save(torch.nn.Linear(1, 1), tmp_path / "MPS_overall_checkpoint.pth")
    refused(r"none of its code was run.*torch\.nn\.modules\.linear\.Linear; .*save its state_dict\(\) as \.safetensors")
