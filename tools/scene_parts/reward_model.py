"""The reward: a CLIP that knows which thing is where."""

import json
import math
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import cast

import open_clip
import torch
import torch.nn.functional as F
from dmdr_rewards import create
from dmdr_rewards.models.clip import ClipReward
from dmdr_train.problems.scenes.captions import COLOURS, HORIZONTAL, SHAPE_NAMES, STYLES, VERTICAL, Scene, parse
from safetensors.torch import save_file
from small_models import (
    Training,
    batches,
    grain,
    reconstruct,
    report,
)
from torch import Tensor, nn

from scene_parts.drawn_pictures import CAPTIONS, HOME, NUM_PICTURES, load_vae, pictures

OPPOSITE = {"above": "below", "below": "above", "left of": "right of", "right of": "left of"}
HARD = 4
THINGS = [f"{place} {name}" for place in ("first", "second") for name in (*COLOURS, *SHAPE_NAMES)]
PLACES = [*THINGS, "vertical"]
CLIP = {
    "embed_dim": 64,
    "vision_cfg": {"image_size": 32, "patch_size": 4, "width": 64, "layers": 4, "head_width": 16},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 48, "heads": 3, "layers": 3},
}


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


def places_of(captions: list[str]) -> Tensor:
    """Return which thing is where according to the captions, `[N, 21]` of 0 and 1. The upper or left thing is first."""
    rows = []
    for scene in map(parse, captions):
        things = (scene.first, scene.second) if scene.relation in ("above", "left of") else (scene.second, scene.first)
        true = {f"{place} {word}" for place, thing in zip(("first", "second"), things, strict=True) for word in thing}
        rows.append([*(label in true for label in THINGS), scene.relation in VERTICAL])
    return torch.tensor(rows).float()
