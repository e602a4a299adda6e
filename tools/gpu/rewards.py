"""Rewards at their real size: write their files with random weights, and measure scoring and its gradient."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import dmdr_rewards
import torch
from dmdr_rewards.networks.clip_towers import open_clip_config
from dmdr_rewards.networks.score_head import score_head
from safetensors.torch import save_file
from torch import Tensor, nn

from gpu.measure import Bench
from gpu.plan import Measured
from gpu.weights import once, random_state, shapes_of

PROMPT, LABEL = "a photo of a cat on a red sofa", 3
TINY_CLIP = {
    "embed_dim": 8,
    "vision_cfg": {"image_size": 16, "layers": 2, "width": 64, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 1},
}


class Files(NamedTuple):
    """The part of a recipe for a reward: its checkpoint and its options."""

    checkpoint: Path
    options: dict[str, Any]


def reward(bench: Bench, name: str) -> Measured:
    """Score four pictures of 1024 x 1024 pixels in bf16, and take the gradient at the pixels.

    Texts are embedded every time, as in training.

    Raises:
        ValueError: the gradient is zero.
    """
    batch, side = (2, 32) if bench.tiny else (4, 1024)
    checkpoint, options = files(bench, name)
    made = dmdr_rewards.create(name, checkpoint, bench.device, torch.bfloat16, **options)
    if isinstance(made, dmdr_rewards.TowerReward):
        made.remember_texts(0)
    torch.manual_seed(0)
    pictures = torch.rand(batch, 3, side, side, device=bench.device, requires_grad=True)
    prompts: list[Any] = [LABEL if made.info.prompt == "class_label" else PROMPT] * batch

    def step() -> dict[str, Tensor]:
        pictures.grad = None
        scores = made.score(pictures, prompts)
        scores.sum().backward()
        assert pictures.grad is not None
        return {"score": scores.detach().mean(), "gradient": pictures.grad.norm()}

    found = bench.measure(step, batch)
    if found.numbers["gradient"] == 0:
        raise ValueError("no gradient reaches the pixels")
    found.notes += ["bf16", f"{side}² pictures"]
    return found


def files(bench: Bench, name: str) -> Files:
    """Write the files of a reward in its own format, and return them."""
    return WRITERS[name](bench)


# -- CLIP, as open_clip saves it


def vit_h(bench: Bench) -> Files:
    """Write a ViT-H-14, whose tensors HPS v2.1 and DFN-CLIP both read."""
    return open_clip(bench, "ViT-H-14")


def vit_l(bench: Bench) -> Files:
    found = open_clip(bench, "ViT-L-14")
    return found._replace(options={"model": "ViT-L-14", **found.options})


def aesthetic(bench: Bench) -> Files:
    found = vit_l(bench)
    width = json.loads(Path(found.options["model"]).read_text())["embed_dim"] if bench.tiny else 768
    shapes = shapes_of(lambda: nn.ModuleDict({"layers": score_head(width)}))
    head = once(bench.work / "head.pth", lambda path: torch.save(random_state(shapes, bench.device), path))
    return found._replace(options={**found.options, "head": str(head)})


def open_clip(bench: Bench, model: str) -> Files:
    """Write a file of an open_clip model; with `--tiny`, of a tiny model, with its configuration beside it."""
    import open_clip

    config = TINY_CLIP if bench.tiny else open_clip_config(model)
    shapes = shapes_of(lambda: open_clip.CLIP(**config))
    file = once(
        bench.work / f"{model}.pt",
        lambda path: torch.save({"state_dict": random_state(shapes, bench.device)}, path),
    )
    if not bench.tiny:
        return Files(file, {})
    described = once(bench.work / "clip.json", lambda path: path.write_text(json.dumps(config)))
    return Files(file, {"model": str(described)})


# -- folders of transformers


def pickscore(bench: Bench) -> Files:
    """Write a CLIPModel of the size of ViT-H-14, with CLIP's own tokenizer."""
    from transformers import CLIPConfig, CLIPModel

    text: dict[str, Any] = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24}
    vision: dict[str, Any] = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32}
    if bench.tiny:
        text = vision = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": text["hidden_size"] // 64, "hidden_act": "gelu"}
    vision = {**vision, "patch_size": 14, "image_size": 28 if bench.tiny else 224, "hidden_act": "gelu"}
    config = CLIPConfig(
        text_config={**text, **heads},
        vision_config={**vision, "num_attention_heads": 1 if bench.tiny else 16},
        projection_dim=text["hidden_size"],
    )

    def write(folder: Path) -> None:
        write_folder(bench, folder, config, lambda: CLIPModel(config))
        write_tokenizer(folder)

    return Files(once(bench.work / "pickscore", write), {})


def class_label(bench: Bench) -> Files:
    """Write a ViT-B/16 for the thousand classes of ImageNet."""
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(num_labels=1000)
    if bench.tiny:
        sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
        config = ViTConfig(num_labels=10, num_attention_heads=2, image_size=16, patch_size=4, **sizes)
    side = config.image_size
    preprocessor = {"size": {"height": side, "width": side}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}

    def write(folder: Path) -> None:
        write_folder(bench, folder, config, lambda: ViTForImageClassification(config))
        (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))

    return Files(once(bench.work / "classifier", write), {})


def write_folder(bench: Bench, folder: Path, config: Any, make: Callable[[], nn.Module]) -> None:
    config.architectures = [type(make).__name__]
    config.save_pretrained(folder)
    save_file(random_state(shapes_of(make), bench.device), folder / "model.safetensors", metadata={"format": "pt"})


def write_tokenizer(folder: Path) -> None:
    """Write CLIP's tokenizer in transformers' format, from the vocabulary inside open_clip."""
    from open_clip import SimpleTokenizer

    known = SimpleTokenizer()
    names = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocabulary = {names.get(token, token): number for token, number in known.encoder.items()}
    merges = [" ".join(pair) for pair in known.bpe_ranks]
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "CLIPTokenizer"}))


# -- the formats of ImageReward and of DINOv2


def imagereward(bench: Bench) -> Files:
    """Write ImageReward.pt, with BLIP's ViT-L/16 and BERT-base, and a vocabulary of BERT's size beside it."""
    from timm.models.vision_transformer import VisionTransformer
    from transformers import BlipTextConfig, BlipTextModel

    width, depth, side, text_width, layers = (64, 2, 32, 64, 2) if bench.tiny else (1024, 24, 224, 768, 12)
    words = 128 if bench.tiny else 30522
    config = BlipTextConfig(
        vocab_size=words + 2,  # BLIP adds two
        hidden_size=text_width,
        encoder_hidden_size=width,
        intermediate_size=4 * text_width,
        num_hidden_layers=layers,
        num_attention_heads=text_width // 64,
        bos_token_id=None,
    )

    def network() -> nn.Module:
        image = VisionTransformer(
            side, 16, embed_dim=width, depth=depth, num_heads=width // 64, num_classes=0, global_pool=""
        )
        text = BlipTextModel(config, add_pooling_layer=False)
        blip = nn.ModuleDict({"visual_encoder": image, "text_encoder": text})
        return nn.ModuleDict({"blip": blip, "mlp": nn.ModuleDict({"layers": score_head(text_width)})})

    def write(folder: Path) -> None:
        folder.mkdir()
        torch.save(random_state(shapes_of(network), bench.device), folder / "ImageReward.pt")
        letters = "abcdefghijklmnopqrstuvwxyz"
        known = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters)]
        unused = [f"[unused{number}]" for number in range(words - len(known))]
        (folder / "vocab.txt").write_text("\n".join([*known, *unused, ""]))

    return Files(once(bench.work / "imagereward", write) / "ImageReward.pt", {})


def dinov2(bench: Bench) -> Files:
    """Write a ViT-L/14 with the head of four layers, in torch.hub's layout."""
    width, depth, patch, side, classes = (64, 4, 14, 4, 10) if bench.tiny else (1024, 24, 14, 37, 1000)
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, 1 + side**2, width),
        "mask_token": (1, width),
        "patch_embed.proj.weight": (width, 3, patch, patch),
        "patch_embed.proj.bias": (width,),
        "norm.weight": (width,),
        "norm.bias": (width,),
    }
    linears = {"attn.qkv": (3, 1), "attn.proj": (1, 1), "mlp.fc1": (4, 1), "mlp.fc2": (1, 4)}
    for block in (f"blocks.{number}" for number in range(depth)):
        for name, (outputs, inputs) in linears.items():
            shapes |= {f"{block}.{name}.weight": (outputs * width, inputs * width)}
            shapes |= {f"{block}.{name}.bias": (outputs * width,)}
        for name in ("norm1.weight", "norm1.bias", "ls1.gamma", "norm2.weight", "norm2.bias", "ls2.gamma"):
            shapes[f"{block}.{name}"] = (width,)
    head: dict[str, tuple[int, ...]] = {"weight": (classes, 5 * width), "bias": (classes,)}

    def write(folder: Path) -> None:
        folder.mkdir()
        torch.save(random_state(shapes, bench.device), folder / "backbone.pth")
        torch.save(random_state(head, bench.device), folder / "head.pth")

    return Files(once(bench.work / "dinov2", write), {})


WRITERS: dict[str, Callable[[Bench], Files]] = {
    "hpsv2.1": vit_h,
    "dfn-clip": vit_h,
    "clip": vit_l,
    "aesthetic": aesthetic,
    "pickscore": pickscore,
    "class-label": class_label,
    "imagereward": imagereward,
    "dinov2": dinov2,
}
