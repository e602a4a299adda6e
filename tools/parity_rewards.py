"""Compare our scores with the official ones, on the same random weights at full size (ViT-H-14).

    python tools/parity_rewards.py make FOLDER           # random weights in the official formats, 8 GB
    OFFICIAL/bin/python tools/parity_rewards.py hpsv2 FOLDER
    python tools/parity_rewards.py pickscore FOLDER
    python tools/parity_rewards.py table FOLDER          # score with dmdr-rewards, print the differences
    python tools/parity_rewards.py bf16 FOLDER           # differences of bfloat16 and float32; needs only `make`

`make`, `pickscore`, `table` and `bf16` run in an environment with dmdr-rewards and torchvision. OFFICIAL is an
environment for the package hpsv2 1.2.0. Its own requirements are years old, but it runs with new ones:

    python -m venv OFFICIAL
    OFFICIAL/bin/pip install torch==2.14.1 torchvision==0.29.1
    OFFICIAL/bin/pip install --no-deps hpsv2==1.2.0
    OFFICIAL/bin/pip install clint args braceexpand webdataset sentencepiece protobuf ftfy regex timm huggingface_hub \\
        transformers requests pandas tqdm datasets open_clip_torch
    cp OFFICIAL/lib/python3*/site-packages/open_clip/bpe_simple_vocab_16e6.txt.gz \\
        OFFICIAL/lib/python3*/site-packages/hpsv2/src/open_clip/

Everything runs on the CPU, with about 10 GB of memory, in a few minutes.
"""

import argparse
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

SHAPES = {"square": (256, 256), "exact": (224, 224), "portrait": (301, 200), "landscape": (180, 333), "wide": (90, 400)}
PROMPTS = {
    "short": "a photo of a cat",
    "entities": "salt &amp; pepper, &lt;b&gt;bold&lt;/b&gt;",
    "quotes": "the “quoted” dog’s bone… it\u2019s   spaced\tout",
    "truncated": "a very long description of many things, one after the other, " * 12,
}
HPS, PICKSCORE = "HPS_v2.1_compressed.pt", "PickScore_v1"


def make(folder: Path) -> None:
    """Write random weights in both formats, the pictures, and a tokenizer with CLIP's vocabulary."""
    import numpy as np
    import open_clip
    import torch
    from PIL import Image
    from transformers import CLIPConfig, CLIPModel

    folder.mkdir(parents=True, exist_ok=True)
    for index, (name, (height, width)) in enumerate(SHAPES.items()):
        noise = np.random.default_rng(index).integers(0, 256, (height // 4, width // 4, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC).save(folder / f"{name}.png")

    torch.manual_seed(0)
    model: Any = open_clip.create_model("ViT-H-14")
    torch.save({"state_dict": model.state_dict()}, folder / HPS)
    del model

    sizes = {"hidden_act": "gelu"}
    text = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    vision = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 16}
    config = CLIPConfig(
        text_config={**sizes, **text}, vision_config={**sizes, **vision, "patch_size": 14}, projection_dim=1024
    )
    clip = CLIPModel(config)
    with torch.no_grad():
        clip.logit_scale.fill_(4.6)
    clip.save_pretrained(folder / PICKSCORE)
    _write_tokenizer(folder / PICKSCORE)


def hpsv2(folder: Path) -> list[list[float]]:
    """Return the scores of the package's own score(), for every picture with every prompt."""
    from hpsv2 import img_score

    # It would download weights and replace them by those of `cp` before the first picture.
    made = img_score.create_model_and_transforms
    img_score.create_model_and_transforms = lambda model, tag, **options: made(model, None, **options)
    pictures, checkpoint = [str(path) for path in _pictures(folder)], str(folder / HPS)
    columns = [img_score.score(pictures, text, cp=checkpoint) for text in PROMPTS.values()]
    return [[float(score) for score in row] for row in zip(*columns, strict=True)]


def pickscore(folder: Path) -> list[list[float]]:
    """Return the scores of transformers' model, tokenizer and processor, combined as PickScore's authors show."""
    import torch
    from PIL import Image
    from transformers import AutoTokenizer, CLIPModel
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    model = CLIPModel.from_pretrained(folder / PICKSCORE).eval()
    tokens = AutoTokenizer.from_pretrained(folder / PICKSCORE)(
        list(PROMPTS.values()), padding=True, truncation=True, max_length=77, return_tensors="pt"
    )
    pixels = CLIPImageProcessorPil()([Image.open(path) for path in _pictures(folder)], return_tensors="pt")
    with torch.no_grad():
        return model(**tokens, **pixels).logits_per_image.tolist()


def table(folder: Path) -> None:
    """Print for each reward and picture the largest difference from the official score over all prompts."""
    import torch

    _print_head("max |ours - official|")
    for name, file in {"hpsv2.1": HPS, "pickscore": PICKSCORE}.items():
        path = folder / f"{name}.json"
        if path.exists():
            _print_row(name, _scores(folder, name, file), torch.tensor(json.loads(path.read_text(encoding="utf-8"))))


def bf16(folder: Path) -> None:
    """Print the same for our scores in bfloat16 and in float32."""
    _print_head("max |bfloat16 - float32|")
    for name, file in {"hpsv2.1": HPS, "dfn-clip": HPS, "pickscore": PICKSCORE}.items():
        _print_row(name, _scores(folder, name, file, "bfloat16"), _scores(folder, name, file))


def _scores(folder: Path, name: str, file: str, dtype: str = "float32") -> Any:
    """Return the scores of every picture with every prompt: Tensor[pictures, prompts]."""
    import dmdr_rewards
    import torch

    reward = dmdr_rewards.create(name, folder / file, dtype=getattr(torch, dtype))
    with torch.inference_mode():
        features = reward.features(reward.pixels(_pictures(folder)))
        columns = [reward.score_features(features, [text] * len(features)) for text in PROMPTS.values()]
    return torch.stack(columns, dim=1)


def _print_head(what: str) -> None:
    print(f"{what:24}" + "".join(f"{name:>12}" for name in [*SHAPES, "all", "of about"]))


def _print_row(name: str, scores: Any, others: Any) -> None:
    rows = (scores - others).abs().amax(dim=1).tolist()
    print(f"{name:24}" + "".join(f"{x:12.2e}" for x in [*rows, max(rows), others.abs().mean().item()]), flush=True)


def _pictures(folder: Path) -> list[Path]:
    return [folder / f"{name}.png" for name in SHAPES]


def _write_tokenizer(folder: Path) -> None:
    from open_clip import SimpleTokenizer

    names = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    tokenizer = SimpleTokenizer()
    vocabulary = {names.get(word, word): index for word, index in tokenizer.encoder.items()}
    merges = [" ".join(pair) for pair in tokenizer.bpe_ranks]
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "CLIPTokenizer"}', encoding="utf-8")


def main() -> None:
    official: dict[str, tuple[str, Callable[[Path], list[list[float]]]]] = {
        "hpsv2": ("hpsv2.1", hpsv2),
        "pickscore": ("pickscore", pickscore),
    }
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["make", *official, "table", "bf16", "clean"])
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    if options.what in official:
        name, score = official[options.what]
        (options.folder / f"{name}.json").write_text(json.dumps(score(options.folder)), encoding="utf-8")
    elif options.what == "clean":
        shutil.rmtree(options.folder)
    else:
        {"make": make, "table": table, "bf16": bf16}[options.what](options.folder)


if __name__ == "__main__":
    main()
