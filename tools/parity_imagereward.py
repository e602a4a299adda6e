"""Compare the reward `imagereward` with the package image-reward 1.5, on the same random weights at full size.

The package runs in a separate environment, since its pinned versions conflict with those of other packages:

    python3.11 -m venv official
    official/bin/pip install torch==2.3.1 torchvision==0.18.1 "numpy<2" "setuptools<81" transformers==4.40.2 \\
        timm==0.6.13 diffusers==0.29.2 fairscale==0.4.13 "huggingface_hub<0.26" accelerate==0.30.1 \\
        datasets==2.19.2 pyarrow==16.1.0
    official/bin/pip install --no-deps image-reward==1.5
    python tools/parity_imagereward.py official/bin/python

In that environment, this file makes a checkpoint and scores pictures. It draws every tensor at random, since the mlp's
own initial values give every picture the same score. In the current environment, dmdr_rewards scores the same pictures
with the same file. Nothing is downloaded. The package imports `clip` for other scores; here it gets an empty module.
The vocabulary is a stand-in of the right size, unless --vocab gives bert-base-uncased's vocab.txt. The comparison takes
6 GB of memory, 2 GB of disk and some minutes.
"""

import argparse
import json
import string
import subprocess
import sys
import tempfile
import types
from pathlib import Path

import numpy as np
import torch
from PIL import Image

SIZES = {"square": (224, 224), "portrait": (300, 517), "landscape": (641, 400), "small": (90, 61), "wide": (1000, 225)}
PROMPTS = {
    "plain": "a cat on a red mat",
    "empty": "",
    "truncated": "an old lighthouse above the sea in a storm " * 6,
    "entities, quotes": "salt &amp; pepper, “it’s fine” – 50% off!",
    "accents, capitals": "Crème BRÛLÉE in Zürich",
    "Chinese": "一只猫 on a table",
    "special token": "[ENC] a dog [SEP] a house",
}
MED_CONFIG = {
    "architectures": ["BertModel"],
    "attention_probs_dropout_prob": 0.1,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "hidden_size": 768,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": 512,
    "model_type": "bert",
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "pad_token_id": 0,
    "type_vocab_size": 2,
    "vocab_size": 30524,
    "encoder_width": 768,
    "add_cross_attention": True,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("python", help="python of the official package's environment")
    parser.add_argument("--vocab", help="bert-base-uncased's vocab.txt; without it, a stand-in")
    parser.add_argument("--inside", metavar="FOLDER", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inside:
        return official(Path(options.inside))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder, options.vocab)
        subprocess.run([options.python, __file__, options.python, "--inside", name], check=True, stdout=sys.stderr)
        compare(folder)


def cases() -> list[tuple[str, str]]:
    """Return every picture with the plain prompt, and every prompt with the square picture."""
    return [(size, "plain") for size in SIZES] + [("square", prompt) for prompt in PROMPTS if prompt != "plain"]


def prepare(folder: Path, vocab: "str | None") -> None:
    """Write the vocabulary, the text encoder's configuration and the pictures."""
    (folder / "vocab.txt").write_text(Path(vocab).read_text() if vocab else stand_in_vocabulary())
    (folder / "med_config.json").write_text(json.dumps(MED_CONFIG))
    generator = np.random.default_rng(0)
    for name, size in SIZES.items():
        coarse = Image.fromarray(generator.integers(0, 256, (7, 9, 3), dtype=np.uint8)).resize(size)
        fine = generator.integers(-30, 31, (size[1], size[0], 3))
        Image.fromarray((np.asarray(coarse) + fine).clip(0, 255).astype(np.uint8)).save(folder / f"{name}.png")


def stand_in_vocabulary() -> str:
    """Return a vocabulary of BERT's size, with its special tokens in their places and pieces of the prompts' words."""
    entries = [f"[unused{index}]" for index in range(30522)]
    entries[0], entries[100:104] = "[PAD]", ["[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    letters = [*string.ascii_lowercase, *string.digits]
    words = ["cat", "light", "##house", "storm", "the", "red", "##er", "amp", "table", "cr", "##eme", "zu", "##rich"]
    pieces = [*letters, *(f"##{letter}" for letter in letters), *string.punctuation, *"“”’–一猫", *words]
    entries[1000 : 1000 + len(pieces)] = pieces
    return "\n".join(entries) + "\n"


def official(folder: Path) -> None:
    """Make the checkpoint and score the pictures; runs in the official package's environment."""
    sys.modules["clip"] = types.ModuleType("clip")
    import transformers

    vocabulary = str(folder / "vocab.txt")
    transformers.BertTokenizer.from_pretrained = lambda _: transformers.BertTokenizer(vocabulary)
    import ImageReward
    from ImageReward.ImageReward import ImageReward as Network

    med_config = str(folder / "med_config.json")
    state = Network(med_config=med_config).state_dict()
    generator = torch.Generator().manual_seed(0)
    for name, tensor in state.items():
        if tensor.is_floating_point():
            noise = torch.randn(tensor.shape, generator=generator)
            linear = tensor.ndim > 1 and "embed" not in name
            scale = tensor[0].numel() ** -0.5 if linear else 0.3
            ones = 1.0 if "norm" in name.lower() and name.endswith("weight") else 0.0
            tensor.copy_(ones + scale * noise)
    torch.save(state, folder / "ImageReward.pt")

    model = ImageReward.load(str(folder / "ImageReward.pt"), device="cpu", med_config=med_config)
    with torch.no_grad():
        scores = [model.score(PROMPTS[prompt], str(folder / f"{size}.png")) for size, prompt in cases()]
    (folder / "official.json").write_text(json.dumps(scores))


def compare(folder: Path) -> None:
    """Score the same pictures with dmdr_rewards, and print the table."""
    import dmdr_rewards

    expected = json.loads((folder / "official.json").read_text())
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        reward = dmdr_rewards.create("imagereward", checkpoint=folder / "ImageReward.pt", dtype=dtype)
        with torch.inference_mode():
            results.append(
                [reward.score([folder / f"{size}.png"], [PROMPTS[prompt]]).item() for size, prompt in cases()]
            )
    print(
        f"{'picture':10} {'prompt':18} {'image-reward 1.5':>17} {'dmdr_rewards':>13} {'difference':>11} {'in bf16':>9}"
    )
    for (size, prompt), there, here, half in zip(cases(), expected, *results, strict=True):
        print(f"{size:10} {prompt:18} {there:17.7f} {here:13.7f} {here - there:11.1e} {half - there:9.1e}")
    largest = [max(abs(a - b) for a, b in zip(expected, scores, strict=True)) for scores in results]
    print(
        f"largest difference: {largest[0]:.1e}, in bf16 {largest[1]:.1e}; spread of the scores {np.std(expected):.2f}"
    )


if __name__ == "__main__":
    main()
