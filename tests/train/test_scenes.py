import json
from pathlib import Path

import dmdr_rewards
import dmdr_train.problems.scenes
import pytest
import torch
from dmdr_rewards import Relative
from dmdr_rewards.networks.classifier import ImageClassifier
from dmdr_train.problems.scenes import all_captions, brightness, check, draw, held_out_captions, training_captions
from dmdr_train.problems.scenes.captions import COLOURS, RELATIONS, SHAPE_NAMES, Scene, parse

HOME = Path(dmdr_train.problems.scenes.__file__).parent
GUIDANCE = 1.5
PLAIN = "a red circle above a blue square"


def some(count: int, captions: list[str], seed: int = 0) -> list[str]:
    order = torch.randperm(len(captions), generator=torch.Generator().manual_seed(seed))
    return [captions[i] for i in order[:count]]


def drawn(captions: list[str], seed: int = 1) -> torch.Tensor:
    return draw(captions, torch.Generator().manual_seed(seed))


def one_word_wrong(caption: str) -> list[str]:
    """Every caption of ours that differs from this one in one colour, shape or relation."""
    wrong = []
    for words in (COLOURS, SHAPE_NAMES, RELATIONS):
        for word in words:
            for at in range(len(caption)):
                if caption.startswith(word, at):
                    wrong += [caption[:at] + other + caption[at + len(word) :] for other in words if other != word]
    return [each for each in wrong if is_ours(each)]


def is_ours(caption: str) -> bool:
    try:
        return bool(parse(caption))
    except ValueError:
        return False


def test_captions() -> None:
    everything = all_captions()
    assert len(everything) == len(set(everything)) == 3 * 24 * 20 * 4
    assert {PLAIN, "a bright red circle above a blue square", "a dull red circle above a blue square"} < set(everything)
    assert sorted(training_captions() + held_out_captions()) == sorted(everything)
    assert 0.1 < len(held_out_captions()) / len(everything) < 0.2
    assert all(parse(caption).caption == caption for caption in everything)


def test_what_is_held_out_is_a_thing_in_a_relation_either_way_round() -> None:
    training = set(training_captions())
    assert not any("green triangle above" in caption or "green triangle below" in caption for caption in training)
    assert not any(caption.endswith(("above a green triangle", "below a green triangle")) for caption in training)
    assert any("green triangle left of" in caption for caption in training)
    for caption in held_out_captions():
        assert all(any(word in other for other in training) for word in caption.split())
        scene = parse(caption)
        assert any(" ".join(scene.first) in other for other in training)
        assert any(scene.relation in other for other in training)


@pytest.mark.parametrize(
    "caption",
    [
        "",
        "a red circle",
        "a red circle above a red square",
        "a pink circle above a blue square",
        "a shiny red circle above a blue square",
        "A red circle above a blue square",
        "a red circle above a blue square.",
    ],
)
def test_a_caption_that_is_not_ours(caption: str) -> None:
    for call in (lambda: parse(caption), lambda: draw([caption]), lambda: check(torch.zeros(1, 3, 32, 32), [caption])):
        with pytest.raises(ValueError, match=r"caption: .* is not of the form"):
            call()


def test_pictures() -> None:
    captions, before = some(100, all_captions()), torch.get_rng_state()
    pictures = drawn(captions)
    assert pictures.shape == (100, 3, 32, 32)
    assert pictures.dtype == torch.float32
    assert pictures.min() >= 0
    assert pictures.max() <= 1
    assert torch.equal(pictures, drawn(captions))
    assert not torch.equal(pictures, drawn(captions, seed=2))
    assert torch.equal(torch.get_rng_state(), before)
    assert draw([]).shape == (0, 3, 32, 32)


def test_the_check_knows_what_is_drawn() -> None:
    captions = some(400, all_captions())
    assert check(drawn(captions), captions).float().mean() >= 0.995


def test_the_check_refuses_a_caption_that_is_wrong_by_one_word() -> None:
    captions = some(60, all_captions())
    wrong = [one_word_wrong(caption) for caption in captions]
    assert min(map(len, wrong)) == 4 + 4 + 3 + 3 + 3
    pictures = drawn(captions).repeat_interleave(torch.tensor([len(each) for each in wrong]), dim=0)
    assert check(pictures, [each for row in wrong for each in row]).float().mean() <= 0.005


def test_the_check_reads_a_scene_either_way_round_and_ignores_the_style() -> None:
    picture = drawn([PLAIN])
    for caption in ("a blue square below a red circle", "a bright red circle above a blue square"):
        assert check(picture, [caption]).item()
    for caption in ("a blue square above a red circle", "a blue circle above a red square"):
        assert not check(picture, [caption]).item()


def by_hand(*things: tuple[torch.Tensor, tuple[float, float, float]]) -> torch.Tensor:
    """A picture of masks and their colours on a dark ground, `[1, 3, 32, 32]`."""
    picture = torch.full((3, 32, 32), 0.1)
    for mask, colour in things:
        picture[:, mask] = torch.tensor(colour)[:, None]
    return picture[None]


RED, BLUE, GREEN = (0.9, 0.1, 0.1), (0.05, 0.3, 0.9), (0.1, 0.9, 0.1)
ROW, COLUMN = torch.meshgrid(torch.arange(32) - 15.5, torch.arange(32) - 15.5, indexing="ij")
DISTANCE = torch.hypot(ROW + 8, COLUMN)  # from the centre of a circle in the upper half
SQUARE = ((ROW - 8).abs() < 5) & (COLUMN.abs() < 5)


def test_the_check_reads_a_picture_drawn_otherwise() -> None:
    assert check(by_hand(CIRCLE, (SQUARE, BLUE)), [PLAIN]).item()


CIRCLE = (DISTANCE < 5.5, RED)
WRONG = {
    "one thing": by_hand(CIRCLE),
    "three things": by_hand(CIRCLE, (SQUARE, BLUE), ((ROW - 8).hypot(COLUMN - 11) < 4, GREEN)),
    "another colour": by_hand(CIRCLE, (SQUARE, GREEN)),
    "two colours": by_hand(CIRCLE, (SQUARE, BLUE), (SQUARE & (COLUMN < 0), GREEN)),
    "a ring": by_hand(((DISTANCE < 6.5) & (DISTANCE > 4), RED), (SQUARE, BLUE)),
    "a bar": by_hand(CIRCLE, (((ROW - 8).abs() < 4) & (COLUMN.abs() < 6.1), BLUE)),
    "dots": by_hand((DISTANCE < 1.8, RED), ((ROW - 8).abs().maximum(COLUMN.abs()) < 2, BLUE)),
    "two squares": by_hand(CIRCLE, (SQUARE.roll(10, 1), BLUE), (SQUARE.roll(-10, 1), BLUE)),
    "noise": torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)),
    "black": torch.zeros(1, 3, 32, 32),
    "white": torch.ones(1, 3, 32, 32),
}


@pytest.mark.parametrize("name", WRONG)
def test_the_check_refuses_what_is_no_such_scene(name: str) -> None:
    assert not check(WRONG[name], [PLAIN]).item()


def test_pictures_and_captions_must_be_as_many() -> None:
    with pytest.raises(ValueError, match=r"images must be \[2, 3, 32, 32\], one per caption, got \[1, 3, 32, 32\]"):
        check(torch.zeros(1, 3, 32, 32), [PLAIN, PLAIN])


def test_brightness() -> None:
    bright, dull = (drawn([f"a {style} red circle above a white cross"] * 50) for style in ("bright", "dull"))
    assert brightness(bright).min() > brightness(dull).max() + 0.05
    assert torch.allclose(brightness(0.5 * bright), 0.5 * brightness(bright), atol=0.02)


def test_files() -> None:
    files = [path for path in HOME.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert sum(path.stat().st_size for path in files) < 16e6
    assert not [path for path in files if path.suffix in {".bin", ".pt", ".pkl"}]
    configs = [path for path in files if path.suffix == ".json"]
    assert not [path for path in configs if json.loads(path.read_text()).get("_name_or_path")], "where they were made"
    assert (HOME / "prompts.txt").read_text().splitlines() == training_captions()


def test_a_stock_pipeline_draws_the_captions() -> None:
    from diffusers import StableDiffusion3Pipeline

    pipeline = StableDiffusion3Pipeline.from_pretrained(HOME / "teacher", torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    captions = some(12, all_captions())
    ids = pipeline.tokenizer(captions).input_ids
    assert [len(each) for each in ids] == [len(caption.split()) + 2 for caption in captions]
    pictures = pipeline(
        captions,
        guidance_scale=GUIDANCE,
        num_inference_steps=10,
        max_sequence_length=12,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
    ).images
    assert check(pictures, captions).float().mean() >= 0.7


def test_a_stock_sdxl_pipeline_draws_the_captions() -> None:
    from diffusers import StableDiffusionXLPipeline

    pipeline = StableDiffusionXLPipeline.from_pretrained(HOME / "teacher_sdxl", torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    assert (pipeline.vae_scale_factor, pipeline.default_sample_size) == (4, 8)
    assert pipeline.config.force_zeros_for_empty_prompt
    captions = some(40, all_captions())
    for tokenizer in (pipeline.tokenizer, pipeline.tokenizer_2):
        ids = tokenizer(captions).input_ids
        assert [len(each) for each in ids] == [len(caption.split()) + 2 for caption in captions]
    pictures = pipeline(
        captions,
        guidance_scale=2.0,
        num_inference_steps=12,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
    ).images
    assert pictures.shape == (40, 3, 32, 32)
    assert check(pictures, captions).float().mean() >= 0.8, "0.90 to 0.98 of 40 to 200 captions were measured"
    assert not check(pictures, captions[1:] + captions[:1]).any()


def test_the_vae_of_the_sdxl_teacher_is_the_other_one_without_a_shift() -> None:
    from diffusers import AutoencoderKL

    old = AutoencoderKL.from_pretrained(HOME / "teacher/vae", torch_dtype=torch.float32).eval()
    new = AutoencoderKL.from_pretrained(HOME / "teacher_sdxl/vae", torch_dtype=torch.float32).eval()
    assert (new.config.shift_factor, new.config.scaling_factor) == (None, old.config.scaling_factor)
    shift, images = old.config.shift_factor, drawn([PLAIN] * 4) * 2 - 1
    with torch.no_grad():
        was, latents = (vae.encode(images).latent_dist for vae in (old, new))
        assert torch.allclose(latents.mean, was.mean - shift, atol=1e-3)
        assert torch.allclose(latents.std, was.std)
        assert torch.allclose(new.decode(latents.mean).sample, old.decode(was.mean).sample, atol=4e-3)


def test_captions_that_differ_in_order_alone_are_far_apart_for_the_sdxl_teacher() -> None:
    from diffusers import StableDiffusionXLPipeline

    pipeline = StableDiffusionXLPipeline.from_pretrained(
        HOME / "teacher_sdxl", unet=None, vae=None, torch_dtype=torch.float32
    )
    captions = [caption for caption in some(40, all_captions()) if not parse(caption).style]
    swapped = [Scene(scene.second, scene.relation, scene.first).caption for scene in map(parse, captions)]
    with torch.no_grad():
        states, others = (
            pipeline.encode_prompt(each, do_classifier_free_guidance=False)[0] for each in (captions, swapped)
        )
    assert states.shape[1:] == (12, 96)
    apart = (states - others).flatten(1).norm(dim=1)
    assert apart.min() >= 0.5 * torch.pdist(states.flatten(1)).median()


def test_the_reward_prefers_what_is_right() -> None:
    reward = dmdr_rewards.create("clip", checkpoint=HOME / "reward")
    captions = some(60, all_captions())
    wrong = [one_word_wrong(caption) for caption in captions]
    pictures = drawn(captions).requires_grad_()
    right = reward.score(pictures, captions)
    with torch.no_grad():
        others = [reward.score(pictures, row) for row in zip(*wrong, strict=True)]
    better = (right > torch.stack(others)).float().mean(dim=1)
    assert better.mean() >= 0.98
    assert better[-3:].min() >= 0.9, "the last three have another relation"
    right.sum().backward()
    assert pictures.grad is not None
    assert pictures.grad.abs().amax(dim=(1, 2, 3)).min() > 0


def test_the_reward_knows_bright_from_dull_in_the_form_of_srpo() -> None:
    relative = Relative(dmdr_rewards.create("clip", checkpoint=HOME / "reward"), "bright", "dull", k=0.0)
    plain = [caption for caption in some(150, all_captions()) if not parse(caption).style]
    bright, dull = (
        drawn([caption.replace("a ", f"a {style} ", 1) for caption in plain]) for style in ("bright", "dull")
    )
    assert (relative.score(bright, plain) > relative.score(dull, plain)).float().mean() >= 0.95


def test_the_classifier_has_features() -> None:
    features = ImageClassifier.from_folder(HOME / "classifier").features(drawn([PLAIN, PLAIN]))
    assert features.shape == (2, 64)
    assert torch.isfinite(features).all()


def test_the_check_is_a_reward_without_a_gradient() -> None:
    """1 for pictures of their captions, and 0 for those of a caption with another colour."""
    from dmdr_train.problems.scenes_check import ScenesCheck

    captions = [PLAIN, "a bright green cross left of a white circle"]
    pictures = drawn(captions)
    assert ScenesCheck().score(pictures, captions).tolist() == [1.0, 1.0]
    assert ScenesCheck().score(pictures, [PLAIN, "a green cross left of a blue circle"]).tolist() == [1.0, 0.0]
    assert not ScenesCheck.info.differentiable
