"""The reference is written from the paper and the file format: plain torch, the release's names, float64."""

import math
import warnings
from pathlib import Path
from typing import Any

import dmdr_rewards
import numpy as np
import pytest
import torch
from dmdr_rewards.models import imagereward
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

WIDTH, PATCH, GRID, DEPTH = 128, 4, 3, 2
TEXT_WIDTH, HIDDEN, TOKENS = 192, 80, 35
SIDE = PATCH * GRID
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "cat", "dog", "red", "on", "mat", "##s", "##ter", ",", "!"]
State = dict[str, Tensor]


def checkpoint(seed: int = 0) -> State:
    """Random tensors under the release's names, biases and scales far from 0 and 1, so that each one counts."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, std: float = 0.3, mean: float = 0.0) -> Tensor:
        return mean + std * torch.randn(shape, generator=generator)

    state: State = {}

    def linear(name: str, outputs: int, inputs: int, gain: float = 1.5) -> None:
        state[f"{name}.weight"] = draw(outputs, inputs, std=gain / math.sqrt(inputs))
        state[f"{name}.bias"] = draw(outputs)

    def norm(name: str, width: int) -> None:
        state[f"{name}.weight"], state[f"{name}.bias"] = draw(width, mean=1), draw(width)

    image, text = "blip.visual_encoder", "blip.text_encoder"
    state[f"{image}.cls_token"] = draw(1, 1, WIDTH, std=1)
    state[f"{image}.pos_embed"] = draw(1, 1 + GRID * GRID, WIDTH, std=1)
    state[f"{image}.patch_embed.proj.weight"] = draw(WIDTH, 3, PATCH, PATCH)
    state[f"{image}.patch_embed.proj.bias"] = draw(WIDTH)
    for block in (f"{image}.blocks.{index}" for index in range(DEPTH)):
        for name, outputs, inputs in [("attn.qkv", 3, 1), ("attn.proj", 1, 1), ("mlp.fc1", 2, 1), ("mlp.fc2", 1, 2)]:
            linear(f"{block}.{name}", outputs * WIDTH, inputs * WIDTH)
        norm(f"{block}.norm1", WIDTH)
        norm(f"{block}.norm2", WIDTH)
    norm(f"{image}.norm", WIDTH)

    state[f"{text}.embeddings.position_ids"] = torch.arange(40)[None]
    state[f"{text}.embeddings.word_embeddings.weight"] = draw(len(WORDS) + 2, TEXT_WIDTH, std=1)
    state[f"{text}.embeddings.position_embeddings.weight"] = draw(40, TEXT_WIDTH)
    norm(f"{text}.embeddings.LayerNorm", TEXT_WIDTH)
    for layer in (f"{text}.encoder.layer.{index}" for index in range(DEPTH + 1)):
        for attention, source in [("attention", TEXT_WIDTH), ("crossattention", WIDTH)]:
            linear(f"{layer}.{attention}.self.query", TEXT_WIDTH, TEXT_WIDTH)
            linear(f"{layer}.{attention}.self.key", TEXT_WIDTH, source)
            linear(f"{layer}.{attention}.self.value", TEXT_WIDTH, source)
            linear(f"{layer}.{attention}.output.dense", TEXT_WIDTH, TEXT_WIDTH)
            norm(f"{layer}.{attention}.output.LayerNorm", TEXT_WIDTH)
        linear(f"{layer}.intermediate.dense", HIDDEN, TEXT_WIDTH)
        linear(f"{layer}.output.dense", TEXT_WIDTH, HIDDEN)
        norm(f"{layer}.output.LayerNorm", TEXT_WIDTH)
    linear("blip.vision_proj", 16, WIDTH)
    linear("blip.text_proj", 16, TEXT_WIDTH)
    for index, outputs, inputs in [(0, 1024, TEXT_WIDTH), (2, 128, 1024), (4, 64, 128), (6, 16, 64), (7, 1, 16)]:
        linear(f"mlp.layers.{index}", outputs, inputs, gain=0.7)
    return state


def reference(state: State, pixels: Tensor, ids: list[list[int]]) -> Tensor:
    """Normalised pixels and token ids without padding -> float64 scores. Every text runs alone, with no mask."""
    weights = {name: tensor.double() for name, tensor in state.items()}

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def norm(x: Tensor, name: str, eps: float) -> Tensor:
        x = (x - x.mean(dim=-1, keepdim=True)) / (x.var(dim=-1, correction=0, keepdim=True) + eps).sqrt()
        return x * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def gelu(x: Tensor) -> Tensor:
        return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        heads = [
            (q @ k.T / 8).softmax(dim=-1) @ v
            for q, k, v in zip(*(each.split(64, dim=-1) for each in (query, key, value)), strict=True)
        ]
        return torch.cat(heads, dim=-1)

    def image_tokens(picture: Tensor) -> Tensor:
        name = "blip.visual_encoder"
        patches = (
            picture.unfold(1, PATCH, PATCH).unfold(2, PATCH, PATCH).permute(1, 2, 0, 3, 4).flatten(2).flatten(0, 1)
        )
        patches = patches @ weights[f"{name}.patch_embed.proj.weight"].flatten(1).T
        patches = patches + weights[f"{name}.patch_embed.proj.bias"]
        x = torch.cat([weights[f"{name}.cls_token"][0], patches]) + weights[f"{name}.pos_embed"][0]
        for block in (f"{name}.blocks.{index}" for index in range(DEPTH)):
            qkv = linear(norm(x, f"{block}.norm1", 1e-6), f"{block}.attn.qkv")
            x = x + linear(attention(*qkv.split(WIDTH, dim=-1)), f"{block}.attn.proj")
            x = x + linear(gelu(linear(norm(x, f"{block}.norm2", 1e-6), f"{block}.mlp.fc1")), f"{block}.mlp.fc2")
        return norm(x, f"{name}.norm", 1e-6)

    def attended(x: Tensor, source: Tensor, name: str) -> Tensor:
        parts = [linear(x, f"{name}.self.query"), *(linear(source, f"{name}.self.{part}") for part in ("key", "value"))]
        return norm(linear(attention(*parts), f"{name}.output.dense") + x, f"{name}.output.LayerNorm", 1e-12)

    def score(picture: Tensor, text: list[int]) -> Tensor:
        tokens = image_tokens(picture)
        name = "blip.text_encoder"
        x = weights[f"{name}.embeddings.word_embeddings.weight"][text]
        x = x + weights[f"{name}.embeddings.position_embeddings.weight"][: len(text)]
        x = norm(x, f"{name}.embeddings.LayerNorm", 1e-12)
        for layer in (f"{name}.encoder.layer.{index}" for index in range(DEPTH + 1)):
            x = attended(x, x, f"{layer}.attention")
            x = attended(x, tokens, f"{layer}.crossattention")
            x = norm(linear(gelu(linear(x, f"{layer}.intermediate.dense")), f"{layer}.output.dense") + x,
                     f"{layer}.output.LayerNorm", 1e-12)  # fmt: skip
        x = x[0]
        for index in (0, 2, 4, 6, 7):
            x = linear(x, f"mlp.layers.{index}")
        return (x[0] - 0.16717362830052426) / 1.0333394966054072

    return torch.stack([score(picture, text) for picture, text in zip(pixels.double(), ids, strict=True)])


def normalised(pictures: Tensor) -> Tensor:
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073], dtype=pictures.dtype).view(3, 1, 1)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711], dtype=pictures.dtype).view(3, 1, 1)
    return (pictures - mean) / std


def ids(*pieces: str) -> list[int]:
    return [[*WORDS, "[DEC]", "[ENC]"].index(piece) for piece in ("[CLS]", *pieces, "[SEP]")]


PROMPTS = ["A cat on a RED mat!", "dogs, cats"]
IDS = [ids("a", "cat", "on", "a", "red", "mat", "!"), ids("dog", "##s", ",", "cat", "##s")]


@pytest.fixture(scope="module")
def state() -> State:
    return checkpoint()


@pytest.fixture(scope="module")
def file(state: State, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As published, with the vocabulary beside it."""
    return written(tmp_path_factory.mktemp("imagereward"), state)


def written(folder: Path, state: State) -> Path:
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    torch.save(state, folder / "ImageReward.pt")
    return folder / "ImageReward.pt"


def load(file: Path, **options: Any) -> Any:
    return imagereward.reward(file, **options)


def pictures(count: int = 2, height: int = SIDE, width: int = SIDE) -> Tensor:
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(3))


def test_the_score_is_the_released_networks(file: Path, state: State) -> None:
    expected = reference(state, normalised(pictures()), IDS)
    assert (expected[0] - expected[1]).abs() > 0.1
    scores = load(file).score(pictures(), PROMPTS)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores.double(), expected, atol=2e-5, rtol=1e-5)
    precise = load(file, dtype=torch.float64).score(pictures().double(), PROMPTS)
    torch.testing.assert_close(precise, expected.float(), atol=1e-7, rtol=1e-6)


def test_files_without_the_unused_tensors_and_safetensors(file: Path, state: State, tmp_path: Path) -> None:
    needed = {name: tensor for name, tensor in state.items() if name not in imagereward._UNUSED}
    save_file(needed, tmp_path / "reward.safetensors")
    reward = load(tmp_path / "reward.safetensors", tokenizer=file.parent)
    # Tensors lie elsewhere in that file, and how they are aligned shows in the last bit.
    torch.testing.assert_close(reward.score(pictures(), PROMPTS), load(file).score(pictures(), PROMPTS))


def test_equal_files_share_their_networks(file: Path) -> None:
    first, second = load(file), load(file, preprocess="dmdr")
    assert first.tower is second.tower
    assert load(file, dtype=torch.float64).tower is not first.tower


def test_it_is_created_by_name(file: Path) -> None:
    reward = dmdr_rewards.create("imagereward", checkpoint=file)
    assert isinstance(reward, dmdr_rewards.Reward)
    assert (reward.info.name, reward.info.prompt, reward.info.image_size) == ("imagereward", "text", (SIDE, SIDE))
    assert reward.info.differentiable


def test_gradients_against_finite_differences(file: Path, state: State, slope: Any) -> None:
    """Of the reference, since scores are rounded to float32."""
    generator = torch.Generator().manual_seed(2)
    images = 0.1 + 0.8 * torch.rand(2, 3, SIDE, SIDE, generator=generator, dtype=torch.float64)
    direction = torch.randn(images.shape, generator=generator, dtype=torch.float64)
    leaf = images.clone().requires_grad_()
    reward = load(file, dtype=torch.float64)
    reward.score(leaf, PROMPTS).sum().backward()
    assert leaf.grad is not None
    expected = slope(lambda x: reference(state, normalised(x), IDS).sum(), images, direction)
    assert abs(expected) > 1e-2
    assert float((leaf.grad * direction).sum()) == pytest.approx(expected, rel=1e-6)
    assert not any(each.requires_grad for part in (reward.tower, reward._networks.text, reward._networks.mlp)
                   for each in part.module.parameters())  # fmt: skip


@pytest.mark.bits
def test_gradient_checkpointing_recomputes_and_changes_no_value(file: Path) -> None:
    results = []
    for switch in (False, True):
        reward = load(file, gradient_checkpointing=switch)
        runs: list[int] = []
        reward.tower.module.blocks[0].attn.register_forward_hook(lambda *_, runs=runs: runs.append(1))
        leaf = pictures().requires_grad_()
        scores = reward.score(leaf, PROMPTS)
        scores.sum().backward()
        assert len(runs) == (2 if switch else 1)
        results.append((scores.detach(), leaf.grad))
    assert torch.equal(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1], results[1][1], atol=0, rtol=0)


def test_bfloat16_is_close_and_the_callers_autocast_has_no_say(file: Path) -> None:
    expected = load(file).score(pictures(), PROMPTS)
    half = load(file, dtype=torch.bfloat16)
    kinds: dict[str, torch.dtype] = {}
    half.tower.module.blocks[0].mlp.fc1.register_forward_hook(lambda *io: kinds.update(image=io[2].dtype))
    text = half._networks.text.module.encoder.encoder.layer[0]
    text.crossattention.self.key.register_forward_hook(lambda *io: kinds.update(text=io[2].dtype))
    half._networks.mlp.module[-1].register_forward_hook(lambda *io: kinds.update(mlp=io[2].dtype))
    torch.testing.assert_close(half.score(pictures(), PROMPTS), expected, atol=5e-3, rtol=0)
    assert kinds == {"image": torch.bfloat16, "text": torch.float32, "mlp": torch.float32}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(load(file).score(pictures(), PROMPTS), expected)


def test_a_batch_changes_nothing_for_its_members(file: Path) -> None:
    reward = load(file)
    images, prompts = pictures(3), ["a", *PROMPTS]
    together = reward.score(images, prompts)
    for index in range(3):
        alone = reward.score(images[index : index + 1], prompts[index : index + 1])
        assert alone.shape == (1,)
        torch.testing.assert_close(alone, together[index : index + 1], atol=2e-6, rtol=1e-6)


@pytest.mark.bits
def test_one_picture_serves_several_prompts(file: Path) -> None:
    reward = load(file)
    features = reward.features(reward.pixels(pictures()))
    assert features.shape == (2, 1 + GRID * GRID, WIDTH)
    for prompts in (PROMPTS, PROMPTS[::-1]):
        assert torch.equal(reward.score_features(features, prompts), reward.score(pictures(), prompts))


def test_long_prompts_are_truncated_with_one_warning(file: Path, state: State) -> None:
    reward = load(file)
    longest = " ".join(["cat"] * 33)
    too_long = [longest + " dog", longest + " a red mat"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        exact = reward.score(pictures(), [longest, "a"])
    with pytest.warns(UserWarning, match="more than 35 tokens are truncated, the first of 38: 'cat cat") as told:
        scores = reward.score(pictures(), too_long)
    assert len(told) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(reward.score(pictures(), too_long), scores)
    torch.testing.assert_close(scores[0], exact[0])
    assert reward.notes([longest, *too_long]) == [None, *(f"reads 35 of the prompt's {n} tokens" for n in (36, 38))]
    expected = reference(state, normalised(pictures()), [ids(*["cat"] * 33)] * 2)
    torch.testing.assert_close(scores.double(), expected, atol=2e-5, rtol=1e-5)


def test_special_tokens_in_a_prompt_are_the_releases(file: Path, state: State) -> None:
    expected = reference(state, normalised(pictures()), [ids("[ENC]", "cat", "[UNK]", "[DEC]"), ids()])
    scores = load(file).score(pictures(), ["[ENC] cat zebra [DEC]", ""])
    torch.testing.assert_close(scores.double(), expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize(("height", "width"), [(30, 21), (20, 45), (SIDE, SIDE)])
def test_reference_preprocessing_is_torchvisions(file: Path, height: int, width: int) -> None:
    from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Normalize, Resize, ToTensor

    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    steps = [Resize(SIDE, InterpolationMode.BICUBIC), CenterCrop(SIDE), ToTensor(), Normalize(mean, std)]
    torch.testing.assert_close(load(file).pixels([picture])[0], Compose(steps)(picture), atol=1e-6, rtol=0)
    squashed = picture.resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    expected = Compose(steps[2:])(squashed)
    torch.testing.assert_close(load(file, preprocess="dmdr").pixels([picture])[0], expected, atol=1e-6, rtol=0)


def test_unknown_preprocessing_is_refused(file: Path) -> None:
    with pytest.raises(ValueError, match=r"preprocess 'squash'.*reference.*dmdr"):
        load(file, preprocess="squash")


def test_other_files_are_refused_by_name(state: State, tmp_path: Path) -> None:
    query = "blip.text_encoder.encoder.layer.0.crossattention.self.query.weight"
    wrong = {name: tensor for name, tensor in state.items() if name != "blip.visual_encoder.norm.bias"}
    wrong |= {"blip.itm_head.weight": torch.zeros(2), query: torch.zeros(3, 5)}
    message = (
        r"missing: blip\.visual_encoder\.norm\.bias; unexpected: blip\.itm_head\.weight; "
        rf"wrong shape: {query} \(3, 5\), expected \(192, 192\)"
    )
    with pytest.raises(ValueError, match=message):
        load(written(tmp_path, wrong))
    with pytest.raises(ValueError, match=r"not an ImageReward\.pt.*patch_embed"):
        load(written(tmp_path, {"visual.proj": torch.zeros(2, 2)}))
    flat = {**state, "blip.visual_encoder.pos_embed": torch.zeros(3)}
    with pytest.raises(ValueError, match=r"not an ImageReward\.pt"):
        load(written(tmp_path, flat))


def test_the_vocabulary_must_be_the_checkpoints(file: Path, state: State, tmp_path: Path) -> None:
    torch.save(state, tmp_path / "ImageReward.pt")
    with pytest.raises(ValueError, match=r"vocab\.txt: no vocabulary there\. Download vocab\.txt of bert-base-uncased"):
        load(tmp_path / "ImageReward.pt")
    for name, text, message in [
        ("short.txt", "\n".join(WORDS[:-1]), "has 16 entries, .* knows 17"),
        ("words.txt", "cat\ndog\n", "not a vocabulary of BERT"),
        ("bad.json", "{", "not a vocabulary of BERT"),
    ]:
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match=message):
            load(file, tokenizer=tmp_path / name)


def test_a_transformers_tokenizer_folder_will_do(file: Path, tmp_path: Path) -> None:
    from transformers import BertTokenizer

    BertTokenizer.from_pretrained(str(file.parent)).save_pretrained(tmp_path)
    reward = load(file, tokenizer=tmp_path)
    assert torch.equal(reward.score(pictures(), PROMPTS), load(file).score(pictures(), PROMPTS))


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        (["a"], "2 images but 1 prompts"),
        ("a cat", "prompts is the text"),
        (["a", 3], "prompt 3 is a int"),
        (torch.tensor([1, 2]), "prompts is a Tensor"),
    ],
)
def test_wrong_prompts_are_refused(file: Path, prompts: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load(file).score(pictures(), prompts)
