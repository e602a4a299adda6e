"""Write the inputs that recipes name: model folders, prompts, their embeddings, pairs, and LPIPS's weights."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from dmdr_models import tiny
from dmdr_train.data.embedding_cache import HASH, cache_folder, prompt_hash
from dmdr_train.data.pairs import pairs_folder
from dmdr_train.data.shard_folder import Made, ShardFolder
from dmdr_train.planning.model_configs import FOLDERS
from safetensors.torch import save_file
from torch import nn

from gpu.measure import Bench
from gpu.weights import once, random_state, shapes_of

PROMPTS = (
    "a lighthouse on a cliff at night",
    "two red cubes on a blue plate",
    "a portrait of an old sailor",
    "a fox in the snow",
    "a bowl of oranges",
    "a train that leaves a station",
    "a street in the rain",
    "a cat on a red sofa",
)
SHARD = "shard-00000000.safetensors"
CLIP_LENGTH, T5_LENGTH = 77, 128


def model(bench: Bench, name: str) -> Path:
    """Return a folder with the configs of a published model; with `--tiny`, a tiny model of its family."""
    return once(bench.work / name, lambda folder: write_tiny(folder, name) if bench.tiny else write_full(folder, name))


def write_full(folder: Path, name: str) -> None:
    for part, config in FOLDERS[name].items():
        (folder / part).mkdir(parents=True, exist_ok=True)
        file = "scheduler_config.json" if part == "scheduler" else "config.json"
        (folder / part / file).write_text(json.dumps(config))
        if part != "scheduler":
            save_file({}, folder / part / "diffusion_pytorch_model.safetensors")  # the weights are made on the device


def write_tiny(folder: Path, name: str) -> None:
    writers: dict[str, Any] = {
        "sd3-medium": tiny.sd3,
        "sd35-large": lambda path: tiny.sd3(path, qk_norm="rms_norm"),
        "sdxl-base": tiny.sdxl,
        "taesdxl": tiny.taesd,
        "sit-xl-2": tiny.sit,
        "sd-vae-ft-ema": lambda path: (tiny.sit(path), [f.rename(path / f.name) for f in (path / "vae").glob("*")]),
    }
    writers[name](folder)


def prompts(bench: Bench) -> Path:
    return once(bench.work / "prompts.txt", lambda path: path.write_text("".join(f"{text}\n" for text in PROMPTS)))


def embeddings(bench: Bench, name: str) -> Path:
    """Return a cache like that of `dmdr-train encode`, with random embeddings of the prompts for the model `name`.

    With it no text encoder is loaded.
    """
    generator = torch.Generator().manual_seed(0)
    texts = ["", *PROMPTS]

    def make(rows: Sequence[int], done: Any) -> Made:
        made = {
            key: torch.randn(len(rows), *shape, generator=generator).bfloat16()
            for key, shape in condition_shapes(model(bench, name)).items()
        }
        return {**made, HASH: torch.tensor([prompt_hash(texts[row]) for row in rows])}, None

    return once(
        bench.work / f"{name}-embeddings",
        lambda path: write(cache_folder("data.embeddings", path), len(texts), make),
    )


def condition_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Return the shapes of one prompt's embeddings: for SD3, with T5 at its default length, or for SDXL."""
    if (folder / "unet").exists():
        config = json.loads((folder / "unet/config.json").read_text())
        times = 6 * config["addition_time_embed_dim"]
        return {
            "encoder_hidden_states": (CLIP_LENGTH, config["cross_attention_dim"]),
            "text_embeds": (config["projection_class_embeddings_input_dim"] - times,),
        }
    config = json.loads((folder / "transformer/config.json").read_text())
    return {
        "encoder_hidden_states": (CLIP_LENGTH + T5_LENGTH, config["joint_attention_dim"]),
        "pooled_projections": (config["pooled_projection_dim"],),
    }


def pairs(bench: Bench, name: str) -> Path:
    """Return a folder like that of `dmdr-train pairs`, with random noise and random pictures."""
    generator = torch.Generator().manual_seed(1)

    def make(rows: Sequence[int], done: Any) -> Made:
        config = json.loads((model(bench, name) / "unet/config.json").read_text())
        shape = (len(rows), config["in_channels"], config["sample_size"], config["sample_size"])
        made = {key: torch.randn(shape, generator=generator) for key in ("noise", "x0")}
        return made, {"prompts": json.dumps([PROMPTS[row] for row in rows])}

    return once(bench.work / f"{name}-pairs", lambda path: write(pairs_folder("data.pairs", path), len(PROMPTS), make))


def vgg16(bench: Bench) -> Path:
    """Return a file with random weights of VGG16's convolutions, under torchvision's names."""
    from torchvision.models import vgg16

    shapes = shapes_of(lambda: nn.ModuleDict({"features": vgg16().features}))
    return once(bench.work / "vgg16.pth", lambda path: torch.save(random_state(shapes, bench.device), path))


def write(folder: ShardFolder, count: int, make: Any) -> None:
    folder.prepare({"format": 1})
    folder.write({SHARD: range(count)}, make, lambda: 0)
