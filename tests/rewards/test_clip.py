"""The reference is open_clip's own factory, transforms and tokenizer on the same file."""

import json
import re
import warnings
from pathlib import Path
from typing import Any

import dmdr_rewards
import pytest
import torch
import torch.nn.functional as F
from dmdr_rewards.compare.networks import load
from PIL import Image
from torch import Tensor

from .conftest import PROMPTS, SHAPES, TINY_CLIP, cosines, eight_bit, gradient_slopes, open_clip_model

QUICK = {**TINY_CLIP, "quick_gelu": True}


def official(prompts: list[str], pictures: list[Image.Image], config: dict[str, Any], mode: str) -> Tensor:
    import open_clip
    from open_clip.transform import image_transform

    model = open_clip_model(config)
    transform = image_transform(32, is_train=False, resize_mode=mode, interpolation="bicubic")
    tokens = open_clip.SimpleTokenizer(context_length=12)(prompts)
    with torch.no_grad():
        images = model.encode_image(torch.stack([transform(picture) for picture in pictures]))
        return F.cosine_similarity(images, model.encode_text(tokens))


@pytest.fixture(scope="module")
def dfn(clip_file: Path, clip_json: Path) -> Any:
    return dmdr_rewards.create("dfn-clip", clip_file, model=str(clip_json))


@pytest.fixture(scope="module")
def clip(clip_file: Path, clip_json: Path) -> Any:
    return dmdr_rewards.create("clip", clip_file, model=str(clip_json))


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_scores_are_the_official_ones(shape: tuple[int, int], clip: Any, dfn: Any) -> None:
    pictures = [eight_bit(*shape, seed=seed) for seed in (0, 1)]
    expected = official(PROMPTS, pictures, TINY_CLIP, "shortest")
    torch.testing.assert_close(clip.score(pictures, PROMPTS), expected, atol=1e-6, rtol=0)
    expected = official(PROMPTS, pictures, QUICK, "squash")
    torch.testing.assert_close(dfn.score(pictures, PROMPTS), expected, atol=1e-6, rtol=0)


def test_a_batch_of_several_sizes_is_scored(dfn: Any) -> None:
    pictures = [eight_bit(*shape) for shape in SHAPES.values()]
    prompts = [f"prompt {index}" for index in range(len(pictures))]
    single = [dfn.score([picture], [prompt]) for picture, prompt in zip(pictures, prompts, strict=True)]
    assert all(score.shape == (1,) for score in single)
    torch.testing.assert_close(dfn.score(pictures, prompts), torch.cat(single), atol=1e-6, rtol=0)


def test_the_authors_way_is_plain_gelu_and_a_squash(clip_file: Path, clip_json: Path, clip: Any) -> None:
    pictures = [eight_bit(48, 70), eight_bit(60, 33)]
    expected = official(PROMPTS, pictures, TINY_CLIP, "squash")
    for name in ("dfn-clip", "clip"):
        reward = dmdr_rewards.create(name, clip_file, model=str(clip_json), preprocess="dmdr")
        torch.testing.assert_close(reward.score(pictures, PROMPTS), expected, atol=1e-6, rtol=0)
        assert reward.info.preprocess.startswith("squash")
    assert (clip.score(pictures, PROMPTS) - expected).abs().max() > 1e-4
    with pytest.raises(ValueError, match="preprocess 'other': choose 'reference' or 'dmdr'"):
        dmdr_rewards.create("clip", clip_file, model=str(clip_json), preprocess="other")  # type: ignore[arg-type]


def test_a_folder_says_how_it_is_used(tmp_path: Path) -> None:
    from open_clip.transform import image_transform

    mean, std = [0.5, 0.4, 0.3], [0.2, 0.3, 0.4]
    steps = {"mean": mean, "std": std, "interpolation": "bilinear", "resize_mode": "squash"}
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": QUICK, "preprocess_cfg": steps}))
    torch.save(open_clip_model(QUICK).state_dict(), tmp_path / "open_clip_pytorch_model.bin")
    reward: Any = dmdr_rewards.create("clip", tmp_path)
    transform = image_transform(
        32, is_train=False, mean=tuple(mean), std=tuple(std), resize_mode="squash", interpolation="bilinear"
    )
    picture = eight_bit(40, 50)
    torch.testing.assert_close(reward.preprocess.picture(picture), transform(picture), atol=1e-6, rtol=0)

    (tmp_path / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": QUICK, "preprocess_cfg": {"interpolation": "x"}})
    )
    with pytest.raises(ValueError, match="interpolation 'x' is not supported"):
        dmdr_rewards.create("clip", tmp_path)
    (tmp_path / "open_clip_config.json").unlink()
    with pytest.raises(ValueError, match=r"open_clip_config\.json cannot be read: give a folder with it, or model="):
        dmdr_rewards.create("clip", tmp_path)


def test_the_score_is_the_dot_product_of_its_embeddings(dfn: Any) -> None:
    pictures = [eight_bit(*shape) for shape in SHAPES.values()]
    prompts = [f"prompt {index}" for index in range(len(pictures))]
    images, texts = dfn.encode_image(pictures), dfn.encode_text(prompts)
    for embeddings in (images, texts):
        torch.testing.assert_close(embeddings.norm(dim=-1), torch.ones(len(pictures)))
    torch.testing.assert_close(dfn.score(pictures, prompts), (images * texts).sum(-1))
    features = dfn.features(dfn.pixels(pictures))
    torch.testing.assert_close(dfn.score_features(features, prompts), dfn.score(pictures, prompts))


def test_gradients_against_finite_differences(clip_file: Path, clip_json: Path, slope: Any) -> None:
    for name in ("clip", "dfn-clip"):
        reward: Any = dmdr_rewards.create(name, clip_file, model=str(clip_json), dtype=torch.float64)
        given, expected = gradient_slopes(reward, PROMPTS, slope, cosines(reward, PROMPTS))
        assert abs(expected) > 1e-3
        assert given == pytest.approx(expected, rel=1e-6)


def test_half_precision_is_close(clip_file: Path, clip_json: Path, dfn: Any) -> None:
    pictures = torch.rand(2, 3, 40, 50, generator=torch.Generator().manual_seed(0))
    reward: Any = dmdr_rewards.create("dfn-clip", clip_file, model=str(clip_json), dtype=torch.bfloat16)
    scores, exact = reward.score(pictures, PROMPTS), dfn.score(pictures, PROMPTS)
    assert scores.dtype == torch.float32
    assert not torch.equal(scores, exact)
    torch.testing.assert_close(scores, exact, atol=5e-3, rtol=0)
    torch.testing.assert_close(reward.encode_image(pictures).norm(dim=-1), torch.ones(2))


def test_the_callers_autocast_has_no_say(dfn: Any) -> None:
    pictures = torch.rand(2, 3, 40, 50, generator=torch.Generator().manual_seed(0))
    exact = dfn.score(pictures, ["not", "met before"])
    dfn.towers.texts._known.clear()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(dfn.score(pictures, ["not", "met before"]), exact)


@pytest.mark.bits
def test_gradient_checkpointing_changes_no_value(clip_file: Path, clip_json: Path) -> None:
    results = []
    for recompute in (False, True):
        reward: Any = dmdr_rewards.create("clip", clip_file, model=str(clip_json), gradient_checkpointing=recompute)
        calls: list[int] = []
        block = reward.tower.module.transformer.resblocks[0]
        handle = block.register_forward_pre_hook(lambda *_, seen=calls: seen.append(1))
        pictures = torch.rand(2, 3, 40, 50, generator=torch.Generator().manual_seed(0)).requires_grad_()
        scores = reward.score(pictures, PROMPTS)
        scores.sum().backward()
        handle.remove()
        assert len(calls) == 1 + recompute
        results.append((scores.detach(), pictures.grad))
    for plain, recomputed in zip(*results, strict=True):
        assert torch.equal(plain, recomputed)


def test_weights_are_frozen(dfn: Any) -> None:
    modules = (dfn.tower.module, dfn.towers._text.module)
    assert not any(parameter.requires_grad for module in modules for parameter in module.parameters())
    assert not any(part.training for module in modules for part in module.modules())


def test_long_prompts_are_cut_with_one_warning(clip_file: Path, clip_json: Path) -> None:
    reward = dmdr_rewards.create(
        "clip", clip_file, model=str(clip_json), preprocess="dmdr", gradient_checkpointing=True
    )
    long = ["many " * 20 + end for end in ("cats", "dogs")]
    pictures = [eight_bit(32, 32)] * 2
    with pytest.warns(
        UserWarning, match="prompts of more than 12 tokens are truncated, the first of 23: 'many"
    ) as told:
        scores, _ = (reward.score(pictures, prompts) for prompts in (long, [prompt + "!" for prompt in long]))
    assert len([each for each in told if "truncated" in str(each.message)]) == 1
    torch.testing.assert_close(scores, official(long, pictures, TINY_CLIP, "squash"), atol=1e-6, rtol=0)


def test_texts_do_not_depend_on_their_company_in_half_precision(clip_file: Path, clip_json: Path, clip: Any) -> None:
    half: Any = dmdr_rewards.create("clip", clip_file, model=str(clip_json), dtype=torch.bfloat16)
    many = [f"text {'of more words ' * (number % 3)}{number}" for number in range(40)]
    half.remember_texts(0)
    alone = torch.cat([half.encode_text([text]) for text in many])
    torch.testing.assert_close(alone, half.encode_text(many), atol=1e-6, rtol=0)
    torch.testing.assert_close(alone, clip.encode_text(many), atol=1e-6, rtol=0)
    picture = [eight_bit(32, 32)]
    assert not torch.equal(half.encode_image(picture), clip.encode_image(picture))


def test_a_note_says_which_prompts_were_cut(clip: Any) -> None:
    assert clip.notes(["a cat", "many " * 20 + "cats", "many " * 10]) == [
        None, "reads 12 of the prompt's 23 tokens", None,
    ]  # fmt: skip


def test_the_activation_is_said(clip: Any, dfn: Any, clip_file: Path, tmp_path: Path) -> None:
    """Nothing in a file tells GELU's weights from QuickGELU's, and the scores of both look alike."""
    assert clip.info.preprocess.endswith("; GELU")
    assert dfn.info.preprocess.endswith("; QuickGELU")
    (tmp_path / "quick.json").write_text(json.dumps(QUICK))
    quick = dmdr_rewards.create("clip", clip_file, model=str(tmp_path / "quick.json"))
    assert quick.info.preprocess.endswith("; QuickGELU")
    for side in (None, 40):  # `dmdr-score compare` tells it, too
        network = load(
            "clip", str(clip_file), torch.device("cpu"), torch.float32, {"model": tmp_path / "quick.json"}, side
        )
        assert network.preprocess.endswith("; QuickGELU")


@pytest.mark.parametrize(("model", "tags"), [("ViT-B-32", "openai, .*metaclip"), ("ViT-B-32-quickgelu", None)])
def test_a_name_with_a_sibling_for_quick_gelu_is_told(model: str, tags: str | None, clip_file: Path) -> None:
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        with pytest.raises(ValueError, match="is not of this model"):
            dmdr_rewards.create("clip", clip_file, model=model)
    found = [str(each.message) for each in told if "QuickGELU" in str(each.message)]
    if tags is None:
        assert found == []
    else:
        [message] = found
        assert re.search(f"model ViT-B-32 uses GELU.*need model=ViT-B-32-quickgelu: {tags}", message)


def test_info(dfn: Any, clip: Any) -> None:
    assert (dfn.info.name, dfn.info.range, dfn.info.image_size) == ("dfn-clip", (-1.0, 1.0), (32, 32))
    assert dfn.info.preprocess.startswith("squash to 32x32, bicubic")
    assert dfn.info.preprocess.endswith("QuickGELU")
    assert clip.info.preprocess.startswith("shorter side to 32, bicubic, antialias; centre crop 32x32")
    described = dmdr_rewards.describe("dfn-clip")
    assert (described.image_size, described.prompt, described.differentiable) == ((224, 224), "text", True)
    assert "open_clip_pytorch_model.bin" in described.checkpoint


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ("a cat", "prompts is the text 'a cat': give a list"),
        (["a cat"], "2 images but 1 prompts: give one prompt per picture"),
        ([], "2 images but 0 prompts"),
        (["a cat", 3], "prompt 3 is a int: this reward takes texts"),
        (torch.tensor([1, 2]), "prompts is a Tensor: this reward takes a list of texts"),
    ],
)
def test_prompts_that_are_refused(prompts: Any, message: str, dfn: Any) -> None:
    with pytest.raises(ValueError, match=message):
        dfn.score([eight_bit(32, 32)] * 2, prompts)


def test_pictures_are_checked(dfn: Any) -> None:
    with pytest.raises(ValueError, match=r"outside \[0, 1\]: clamp"):
        dfn.score(torch.rand(2, 3, 32, 32) * 2, PROMPTS)


@pytest.mark.filterwarnings("ignore:model ViT-B-32 uses GELU")
def test_the_architecture_must_be_known(clip_file: Path) -> None:
    with pytest.raises(ValueError, match="give the name of its architecture too, such as model='ViT-B-32'"):
        dmdr_rewards.create("clip", clip_file)
    with pytest.raises(ValueError, match=r"model 'ViT-B-33' is unknown to open_clip: choose one of .*ViT-B-32"):
        dmdr_rewards.create("clip", clip_file, model="ViT-B-33")
    with pytest.raises(ValueError, match=r"bin is not of this model; .*wrong shape: .*positional_embedding"):
        dmdr_rewards.create("clip", clip_file, model="ViT-B-32")
