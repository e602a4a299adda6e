"""Make the files of the text-to-image problem from drawn pictures: VAE, text encoders, teacher, reward, classifier.

    python tools/make_scenes.py                    # everything, in order; each part prints its seconds
    python tools/make_scenes.py --only teacher     # one part, from the parts already there

Writes to packages/dmdr-train/src/dmdr_train/problems/scenes/. Weights are stored in half precision, so
that all files together stay under 16 MB.
"""

import argparse
import json
import math
import string
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import open_clip
import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from dmdr_core import FlowMatching, VariancePreserving, denoising_loss
from dmdr_rewards import create
from dmdr_rewards.models.clip import ClipReward
from dmdr_train.problems import scenes
from dmdr_train.problems.scenes.captions import COLOURS, HORIZONTAL, SHAPE_NAMES, STYLES, VERTICAL, Scene, parse
from making import (
    Training,
    batches,
    encode,
    grain,
    reconstruct,
    regnet,
    report,
    run_parts,
    save,
    save_classifier,
    to_vae,
    train_classifier,
    train_vae,
)
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

HOME = Path(__file__).parents[1] / "packages/dmdr-train/src/dmdr_train/problems/scenes"
CAPTIONS = scenes.all_captions()
WORDS = sorted({word for caption in CAPTIONS for word in caption.split()})
TEXT_LENGTH = 12
NUM_PICTURES = 40_000
OPPOSITE = {"above": "below", "below": "above", "left of": "right of", "right of": "left of"}
HARD = 4
PARTS = ("vae", "text", "teacher", "reward", "classifier", "teacher_sdxl")
CLIP = {
    "embed_dim": 64,
    "vision_cfg": {"image_size": 32, "patch_size": 4, "width": 64, "layers": 4, "head_width": 16},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 48, "heads": 3, "layers": 3},
}


def pictures(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return `count` pictures as uint8 `[N, 3, 32, 32]`, and the indices of their captions in CAPTIONS `[N]`."""
    generator = torch.Generator().manual_seed(seed)
    index = torch.randint(len(CAPTIONS), (count,), generator=generator)
    drawn = [scenes.draw([CAPTIONS[i] for i in part], generator).mul(255).round().byte() for part in index.split(2000)]
    return torch.cat(drawn), index


def make_vae(steps: int = 3200) -> None:
    data, _ = pictures(NUM_PICTURES, seed=1)
    save(train_vae(data, latent_channels=8, steps=steps), HOME / "teacher/vae")


def load_vae() -> AutoencoderKL:
    return AutoencoderKL.from_pretrained(HOME / "teacher/vae", torch_dtype=torch.float32).eval()


def clip_tokenizer() -> CLIPTokenizer:
    """Return a tokenizer with one token for each of our words; other words are split into letters."""
    trained = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    trained.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    letters = list(string.ascii_lowercase)
    trainer = trainers.BpeTrainer(
        initial_alphabet=letters, end_of_word_suffix="</w>", min_frequency=1, show_progress=False
    )
    trained.train_from_iterator(WORDS + letters, trainer)
    bpe = json.loads(trained.to_str())["model"]
    vocab = bpe["vocab"] | {name: len(bpe["vocab"]) + i for i, name in enumerate(["<|startoftext|>", "<|endoftext|>"])}
    return CLIPTokenizer(vocab=vocab, merges=[tuple(pair) for pair in bpe["merges"]], model_max_length=TEXT_LENGTH)


def t5_tokenizer() -> T5Tokenizer:
    words = [(f"▁{word}", -1.0) for word in WORDS]
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *words]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=TEXT_LENGTH)


def make_text() -> None:
    """Make three random, untrained text encoders, in which words and positions are far enough apart to distinguish."""
    torch.manual_seed(0)
    for suffix in ("", "_2"):
        clip = random_clip(CLIPTextModelWithProjection, width=32, layers=2, std=0.2)
        save(clip, HOME / f"teacher/text_encoder{suffix}")
        clip_tokenizer().save_pretrained(HOME / f"teacher/tokenizer{suffix}")
    pieces = t5_tokenizer()
    t5 = T5EncoderModel(
        T5Config(
            vocab_size=len(pieces),
            d_model=64,
            d_kv=16,
            d_ff=128,
            num_layers=2,
            num_heads=4,
            feed_forward_proj="gated-gelu",
            pad_token_id=pieces.pad_token_id,
            eos_token_id=pieces.eos_token_id,
        )
    )
    spread(t5, 0.2)
    nn.init.normal_(t5.get_input_embeddings().weight)
    # T5's only knowledge of positions; large enough that a word can recognise its neighbours.
    nn.init.normal_(t5.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight, std=2.0)
    save(t5, HOME / "teacher/text_encoder_3")
    pieces.save_pretrained(HOME / "teacher/tokenizer_3")
    make_index()


def random_clip(
    kind: type[CLIPTextModel | CLIPTextModelWithProjection], width: int, layers: int, std: float
) -> CLIPTextModel | CLIPTextModelWithProjection:
    """Return an untrained text encoder for `clip_tokenizer`."""
    words = clip_tokenizer()
    clip = kind(
        CLIPTextConfig(
            vocab_size=len(words),
            hidden_size=width,
            intermediate_size=2 * width,
            projection_dim=width,
            num_hidden_layers=layers,
            num_attention_heads=width // 16,
            max_position_embeddings=TEXT_LENGTH,
            bos_token_id=words.bos_token_id,
            eos_token_id=words.eos_token_id,
            pad_token_id=words.pad_token_id,
        )
    )
    spread(clip, std)
    for part in clip.modules():
        if isinstance(part, nn.Embedding):
            nn.init.normal_(part.weight)
    return clip.eval()


def spread(model: nn.Module, std: float) -> None:
    """Draw all matrices again, larger than the libraries' initial values, so that words influence each other."""
    for weight in model.parameters():
        if weight.ndim == 2:
            nn.init.normal_(weight, std=std)


def load_text() -> StableDiffusion3Pipeline:
    """Return the pipeline without its transformer and VAE; it turns captions into the teacher's conditions."""
    return StableDiffusion3Pipeline.from_pretrained(
        HOME / "teacher", transformer=None, vae=None, torch_dtype=torch.float32
    )


@torch.no_grad()
def conditions(captions: list[str]) -> tuple[Tensor, Tensor]:
    """Return text states `[N, 24, 64]` and pooled text `[N, 64]` of the captions, as in the stock pipeline."""
    text = load_text()
    parts = [captions[i : i + 500] for i in range(0, len(captions), 500)]
    encoded = [
        text.encode_prompt(part, None, None, do_classifier_free_guidance=False, max_sequence_length=TEXT_LENGTH)
        for part in parts
    ]
    return torch.cat([part[0] for part in encoded]), torch.cat([part[2] for part in encoded])


def make_index() -> None:
    """Write the files that complete the pipeline: scheduler, model_index.json, and the training prompts."""
    FlowMatchEulerDiscreteScheduler(shift=1.0).save_pretrained(HOME / "teacher/scheduler")
    names = {
        "scheduler": "diffusers FlowMatchEulerDiscreteScheduler",
        "text_encoder": "transformers CLIPTextModelWithProjection",
        "text_encoder_2": "transformers CLIPTextModelWithProjection",
        "text_encoder_3": "transformers T5EncoderModel",
        "tokenizer": "transformers CLIPTokenizer",
        "tokenizer_2": "transformers CLIPTokenizer",
        "tokenizer_3": "transformers T5Tokenizer",
        "transformer": "diffusers SD3Transformer2DModel",
        "vae": "diffusers AutoencoderKL",
    }
    index = {"_class_name": "StableDiffusion3Pipeline"} | {name: parts.split() for name, parts in names.items()}
    (HOME / "teacher/model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    (HOME / "prompts.txt").write_text("\n".join(scenes.training_captions()) + "\n")


def make_teacher(steps: int, snapshots: Path | None) -> None:
    """Train by flow matching with averaged weights and logit-normal times (arXiv 2403.03206), at which shapes form."""
    torch.manual_seed(0)
    model = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=8,
        out_channels=8,
        num_layers=4,
        attention_head_dim=32,
        num_attention_heads=3,
        joint_attention_dim=64,
        caption_projection_dim=96,
        pooled_projection_dim=64,
        pos_embed_max_size=8,
        qk_norm="rms_norm",
    )
    training = Training(model, "transformer_blocks.", steps)
    process = FlowMatching()
    images, index = pictures(NUM_PICTURES, seed=7)
    latents = encode(load_vae(), images)
    text, pooled = conditions([*CAPTIONS, ""])
    noise = torch.Generator().manual_seed(8)
    start = time.time()
    for step, (x0, caption) in enumerate(batches(latents, index, size=64, steps=steps, seed=9)):
        epsilon = torch.randn(x0.shape, generator=noise)
        t = torch.randn(len(x0), generator=noise).sigmoid()
        caption = torch.where(torch.rand(len(caption), generator=noise) < 0.1, len(CAPTIONS), caption)
        noisy = process.add_noise(x0, epsilon, t)
        velocity = model(noisy, text[caption], pooled[caption], t * 1000).sample
        loss = denoising_loss(velocity, process.target(x0, epsilon, t))
        training.step(loss)
        report("teacher", step, steps, start, loss)
        if snapshots and (step + 1) % 1000 == 0:
            save(training.average.module, snapshots / f"{step + 1}")
    save(training.average.module, HOME / "teacher/transformer")


def make_teacher_sdxl(steps: int, snapshots: Path | None) -> None:
    """Train noise prediction with averaged weights; noise levels and their weights equal the SD3 teacher's."""
    pipeline = sdxl_pipeline()
    training = Training(pipeline.unet, "block", steps)
    process = VariancePreserving(pipeline.scheduler.alphas_cumprod)
    # Noise divided by signal; flow matching's share of noise is t = ratio / (1 + ratio).
    ratio = (1 / process.alphas_cumprod - 1).sqrt()
    images, index = pictures(NUM_PICTURES, seed=7)
    latents = encode(pipeline.vae, images)
    text, pooled = sdxl_conditions(pipeline)
    size = torch.tensor([32.0, 32.0, 0.0, 0.0, 32.0, 32.0])
    noise = torch.Generator().manual_seed(8)
    start = time.time()
    for step, (x0, caption) in enumerate(batches(latents, index, size=64, steps=steps, seed=9)):
        epsilon = torch.randn(x0.shape, generator=noise)
        t = torch.bucketize(torch.randn(len(x0), generator=noise).exp(), ratio).clamp(max=len(ratio) - 1)
        caption = torch.where(torch.rand(len(caption), generator=noise) < 0.1, len(CAPTIONS), caption)
        added = {"text_embeds": pooled[caption], "time_ids": size.expand(len(x0), 6)}
        noisy = process.add_noise(x0, epsilon, t)
        prediction = pipeline.unet(noisy, t, text[caption], added_cond_kwargs=added).sample
        # This equals the error of flow matching's velocity.
        error = (prediction - epsilon) * (1 + ratio[t])[:, None, None, None]
        loss = error.square().mean()
        training.step(loss)
        report("teacher_sdxl", step, steps, start, loss)
        if snapshots and (step + 1) % 1000 == 0:
            save(training.average.module, snapshots / f"{step + 1}")
    pipeline.register_modules(unet=training.average.module)
    pipeline.to(dtype=torch.float16).save_pretrained(HOME / "teacher_sdxl")


def sdxl_pipeline() -> StableDiffusionXLPipeline:
    """Return a small SDXL: SDXL's noise schedule, random text encoders and UNet, and the SD3 teacher's VAE."""
    torch.manual_seed(0)
    parts: dict[str, Any] = {
        "text_encoder": random_clip(CLIPTextModel, width=32, layers=3, std=0.1),
        "text_encoder_2": random_clip(CLIPTextModelWithProjection, width=64, layers=3, std=0.1),
        "vae": without_shift(load_vae()),
        "tokenizer": clip_tokenizer(),
        "tokenizer_2": clip_tokenizer(),
        "scheduler": EulerDiscreteScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            timestep_spacing="leading",
            steps_offset=1,
        ),
    }
    for name in ("text_encoder", "text_encoder_2", "vae"):
        parts[name] = parts[name].half().float()  # the UNet learns from the rounded weights that are saved
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=8,
        out_channels=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(64, 80),
        layers_per_block=1,
        transformer_layers_per_block=1,
        attention_head_dim=(2, 5),
        norm_num_groups=16,
        cross_attention_dim=96,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=16,
        projection_class_embeddings_input_dim=64 + 6 * 16,
    )
    return StableDiffusionXLPipeline(unet=unet, **parts, force_zeros_for_empty_prompt=True)


@torch.no_grad()
def without_shift(vae: AutoencoderKL) -> AutoencoderKL:
    """Move the shift of a VAE's latents, which SDXL pipelines ignore, into its biases."""
    shift = vae.config.shift_factor
    vae.quant_conv.bias[: vae.config.latent_channels] -= shift
    vae.post_quant_conv.bias += shift * vae.post_quant_conv.weight.sum(dim=(1, 2, 3))
    vae.register_to_config(shift_factor=None, _name_or_path=None)  # also drops the path of its files
    return vae


@torch.no_grad()
def sdxl_conditions(pipeline: StableDiffusionXLPipeline) -> tuple[Tensor, Tensor]:
    """Return text states `[N, 12, 96]` and pooled text `[N, 64]` of all captions, and a row of zeros for none."""
    parts = [CAPTIONS[i : i + 500] for i in range(0, len(CAPTIONS), 500)]
    encoded = [pipeline.encode_prompt(part, do_classifier_free_guidance=False) for part in parts]
    states, pooled = (torch.cat([part[i] for part in encoded]) for i in (0, 2))
    return F.pad(states, (0, 0, 0, 0, 0, 1)), F.pad(pooled, (0, 0, 0, 1))


def neighbours() -> Tensor:
    """Return for every caption the indices of captions that are wrong by one word or by swapped colours, `[N, K]`.

    The opposite relation comes first. Shorter lists are filled up with their own first entries.
    """
    place = {caption: i for i, caption in enumerate(CAPTIONS)}
    rows = []
    for caption in CAPTIONS:
        scene = parse(caption)
        (colour, shape), (other, form) = scene.first, scene.second
        wrong = [replace(scene, relation=OPPOSITE[scene.relation])]
        wrong += [replace(scene, first=(each, shape)) for each in COLOURS if each not in (colour, other)]
        wrong += [replace(scene, second=(each, form)) for each in COLOURS if each not in (colour, other)]
        wrong += [replace(scene, first=(colour, each)) for each in SHAPE_NAMES if each != shape]
        wrong += [replace(scene, second=(other, each)) for each in SHAPE_NAMES if each != form]
        wrong += [replace(scene, relation=each) for each in (VERTICAL if scene.relation in HORIZONTAL else HORIZONTAL)]
        wrong += [replace(scene, first=(other, shape), second=(colour, form))] * (shape != form)
        wrong += [replace(scene, style=each) for each in STYLES[1:] if scene.style and each != scene.style]
        rows.append([place[each.caption] for each in wrong])
    longest = max(map(len, rows))
    return torch.tensor([(row * 2)[:longest] for row in rows])


def meanings() -> tuple[Tensor, Tensor, Tensor]:
    """Return for every caption: its content, whichever thing comes first; its style; its index without the style."""
    place = {caption: i for i, caption in enumerate(CAPTIONS)}
    scenes_of = [parse(caption) for caption in CAPTIONS]
    plain = [replace(scene, style="") for scene in scenes_of]
    turned = [replace(p, first=p.second, relation=OPPOSITE[p.relation], second=p.first) for p in plain]
    content = [min(place[p.caption], place[t.caption]) for p, t in zip(plain, turned, strict=True)]
    style = [STYLES.index(scene.style) for scene in scenes_of]
    return torch.tensor(content), torch.tensor(style), torch.tensor([place[p.caption] for p in plain])


def captions_as(form: str) -> list[str]:
    """Return all captions; with `form` "srpo" as "bright. a red …", otherwise as "a bright red …"."""
    parsed = [(parse(caption).style, replace(parse(caption), style="").caption) for caption in CAPTIONS]
    return [f"{style}. {rest}" if style else rest for style, rest in parsed] if form == "srpo" else CAPTIONS


def make_reward(steps: int) -> None:
    """Train a CLIP in open_clip's architecture that distinguishes right captions from nearly right ones.

    The contrastive loss of a picture covers the captions of its batch and `HARD` wrong captions for each of them; other
    captions that are also true of the picture do not count. A third of the styled captions lose their style word. A
    linear layer, which is not saved, reads from either embedding which thing is where. At first it is trained alone:
    without it, or with contrast from the start, the model does not learn the words for positions.
    """
    torch.manual_seed(0)
    tokenizer = open_clip.SimpleTokenizer(context_length=CLIP["text_cfg"]["context_length"])
    tokens = torch.stack([tokenizer(captions_as(form)) for form in ("plain", "srpo")])
    # Only the tokens of our captions are trained, of 49,408.
    used, forms = tokens.unique(return_inverse=True)
    model = open_clip.CLIP(**CLIP)
    model.token_embedding = nn.Embedding.from_pretrained(model.token_embedding.weight[used], freeze=False)
    model.places = nn.Linear(CLIP["embed_dim"], len(PLACES))
    training = Training(model, "resblocks.", steps)
    images, index = pictures(NUM_PICTURES, seed=10)
    said = places_of(CAPTIONS)
    images[: NUM_PICTURES // 2] = reconstruct(load_vae(), images[: NUM_PICTURES // 2])
    wrong, (content, style, plain) = neighbours(), meanings()
    noise = torch.Generator().manual_seed(11)
    start = time.time()
    for step, (batch, drawn) in enumerate(batches(images, index, size=64, steps=steps, seed=12)):
        named = torch.where(torch.rand(len(drawn), generator=noise) < 1 / 3, plain[drawn], drawn)
        choice = torch.randint(wrong.shape[1], (len(named), HARD), generator=noise)
        choice[:, 0] = 0  # A CLIP learns relations last, since they depend on the order of the words.
        hard = wrong[named].gather(1, choice)
        texts = torch.cat([named, hard.flatten()])
        words = forms[torch.randint(2, texts.shape, generator=noise), texts]
        image = model.encode_image(clip_pixels(grain(batch / 255, noise)), normalize=True)
        text = model.encode_text(words, normalize=True)
        logits = model.logit_scale.exp() * image @ text.T
        same = content[drawn][:, None] == content[texts]
        other_style = (style[drawn][:, None] != style[texts]) & (style[drawn] > 0)[:, None] & (style[texts] > 0)
        also_true = same & ~other_style
        also_true.fill_diagonal_(False)
        logits = logits.masked_fill(also_true, -torch.inf)
        truth = torch.arange(len(batch))
        loss = F.cross_entropy(logits, truth) + 0.5 * F.cross_entropy(logits[:, : len(batch)].T, truth)
        read = 8 * model.places(torch.cat([image, text]))  # unit features are too small for a linear layer
        place = F.binary_cross_entropy_with_logits(read, said[torch.cat([drawn, texts])])
        loss = place if step < steps // 3 else loss + 5 * place
        training.step(loss)
        with torch.no_grad():
            model.logit_scale.clamp_(max=math.log(30))
        report("reward", step, steps, start, loss)
    del training.average.module.places
    save_reward(training.average.module, used)
    print_reward()


@torch.no_grad()
def print_reward() -> None:
    """Print how often the saved reward prefers a drawing's caption to a caption that is wrong by one word."""
    reward = cast(ClipReward, create("clip", checkpoint=str(HOME / "reward")))
    images, index = pictures(1000, seed=15)
    features = reward.encode_image(images.float() / 255)
    drawn = [parse(CAPTIONS[i]) for i in index]

    def score(captions: list[Scene]) -> Tensor:
        return (features * reward.encode_text([each.caption for each in captions])).sum(dim=-1)

    def other(names: Sequence[str], *but: str) -> str:
        return next(name for name in names if name not in but)

    truth = score(drawn)
    wrong = {
        "colour": [
            replace(each, first=(other(COLOURS, each.first[0], each.second[0]), each.first[1])) for each in drawn
        ],
        "shape": [replace(each, first=(each.first[0], other(SHAPE_NAMES, each.first[1]))) for each in drawn],
        "opposite relation": [replace(each, relation=OPPOSITE[each.relation]) for each in drawn],
    }
    for name, captions in wrong.items():
        print(f"reward: right by {name} {(truth > score(captions)).float().mean():.3f}")
    styled = torch.tensor([bool(each.style) for each in drawn])
    turned = [replace(each, style=other(STYLES[1:], each.style)) for each in drawn]
    print(f"reward: right by style {(truth > score(turned))[styled].float().mean():.3f}")


def clip_pixels(images: Tensor) -> Tensor:
    mean, std = (
        torch.tensor(each).view(3, 1, 1) for each in (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)
    )
    return (images - mean) / std


def save_reward(model: nn.Module, used: Tensor) -> None:
    """Save in open_clip's format for the hub. Tokens that occur in none of our captions have embeddings of zero."""
    tensors = {name: tensor.detach().half().contiguous() for name, tensor in model.state_dict().items()}
    words = tensors["token_embedding.weight"]
    tensors["token_embedding.weight"] = words.new_zeros(49408, words.shape[1]).index_copy(0, used, words)
    folder = HOME / "reward"
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "open_clip_model.safetensors")
    steps = {
        "mean": open_clip.OPENAI_DATASET_MEAN,
        "std": open_clip.OPENAI_DATASET_STD,
        "interpolation": "bicubic",
        "resize_mode": "shortest",
    }
    config = {"model_cfg": CLIP, "preprocess_cfg": steps}
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n")


THINGS = [f"{place} {name}" for place in ("first", "second") for name in (*COLOURS, *SHAPE_NAMES)]
PLACES = [*THINGS, "vertical"]
LABELS = [*PLACES, "bright", "warm ground"]


def places_of(captions: list[str]) -> Tensor:
    """Return which thing is where according to the captions, `[N, 21]` of 0 and 1. The upper or left thing is first."""
    rows = []
    for scene in map(parse, captions):
        things = (scene.first, scene.second) if scene.relation in ("above", "left of") else (scene.second, scene.first)
        true = {f"{place} {word}" for place, thing in zip(("first", "second"), things, strict=True) for word in thing}
        rows.append([*(label in true for label in THINGS), scene.relation in VERTICAL])
    return torch.tensor(rows).float()


def labels_of(images: Tensor, captions: list[str]) -> Tensor:
    """Return the labels of drawings, `[N, 23]` of 0 and 1."""
    ground = images[:, :, 0].float().mean(dim=2)
    looks = torch.stack([scenes.brightness(images / 255) > 0.68, ground[:, 0] > ground[:, 2]], dim=1)
    return torch.cat([places_of(captions), looks], dim=1)


def make_classifier(steps: int) -> None:
    """Train a convolutional network to say which things are where; the evaluation uses its features.

    It is trained on drawings and on reconstructions of the VAE.
    """
    torch.manual_seed(0)
    model = regnet(LABELS, problem_type="multi_label_classification")
    data, index = pictures(NUM_PICTURES, seed=13)
    labels = labels_of(data, [CAPTIONS[i] for i in index])
    data[: NUM_PICTURES // 2] = reconstruct(load_vae(), data[: NUM_PICTURES // 2])
    loss = F.binary_cross_entropy_with_logits
    train_classifier("classifier", model, data, labels, loss, steps=steps, seed=14)
    test, index = pictures(2000, seed=16)
    with torch.no_grad():
        right = (model(pixel_values=to_vae(test)).logits > 0) == (labels_of(test, [CAPTIONS[i] for i in index]) > 0)
    print(f"classifier: share of right labels {dict(zip(LABELS, right.float().mean(dim=0).tolist(), strict=True))}")
    save_classifier(model, HOME / "classifier", size=32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=PARTS, help="make only this part")
    parser.add_argument("--teacher-steps", type=int, default=6_000)
    parser.add_argument("--teacher-sdxl-steps", type=int, default=5_500)
    parser.add_argument("--snapshots", type=Path, help="also save the teacher to this folder every 1,000 steps")
    args = parser.parse_args()
    parts = {
        "vae": make_vae,
        "text": make_text,
        "teacher": lambda: make_teacher(args.teacher_steps, args.snapshots),
        "reward": lambda: make_reward(steps=2400),
        "classifier": lambda: make_classifier(steps=2500),
        "teacher_sdxl": lambda: make_teacher_sdxl(args.teacher_sdxl_steps, args.snapshots),
    }
    run_parts(parts, args.only)


if __name__ == "__main__":
    main()
