"""Compare the reward `hpsv3` with the package hpsv3 1.0.0, on the same small random network.

The package runs in a separate environment, because it needs transformers 4:

    python3.11 -m venv official
    official/bin/pip install torch torchvision pandas requests packaging safetensors transformers==4.51.3
    official/bin/pip install --no-deps hpsv3==1.0.0
    python tools/parity_hpsv3.py official/bin/python

In that environment, this file writes the files that HPSv3 consists of, with the release's names and a flat config.json
like Qwen2-VL-7B-Instruct's, and scores pictures. The network has 4 layers of width 64 instead of 28 of 3584, and a
tokenizer of single bytes; the picture sizes, the question and the head are the release's. In the current environment,
dmdr_rewards scores the same pictures with the same files, in float32. What the package imports for training only is
replaced by empty modules. Nothing is downloaded.
"""

import argparse
import importlib.abc
import importlib.machinery
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import torch
from PIL import Image

SIZES = {"square": (512, 512), "portrait": (300, 517), "landscape": (641, 400), "small": (90, 61), "wide": (1000, 225)}
PROMPTS = {"plain": "a cat on a red mat", "empty": "", "braces, accents": "{a} crème brûlée & 一只猫"}
SPECIAL = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
TRAINING = ("accelerate", "datasets", "deepspeed", "fire", "matplotlib", "omegaconf", "peft", "trl", "tensorboard",
            "torch.utils.tensorboard", "prettytable", "yaml")  # fmt: skip
CHAT = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{% for content in message['content'] %}{% if content['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


class Empty(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds empty modules in place of those in `TRAINING`."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        found = name in TRAINING or name.split(".")[0] in TRAINING
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if found else None

    def create_module(self, spec: Any) -> Any:
        module = MagicMock(__spec__=spec, __path__=[], __name__=spec.name)
        module.RewardTrainer = object
        return module

    def exec_module(self, module: Any) -> None:
        pass


def pictures(folder: Path) -> list[Path]:
    """One picture file for each of `SIZES`."""
    paths = []
    for seed, (name, size) in enumerate(SIZES.items()):
        coarse = np.random.default_rng(seed).integers(0, 256, (9, 7, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize(size).save(folder / f"{name}.png")
        paths.append(folder / f"{name}.png")
    return paths


def configuration(tokenizer: Any) -> dict[str, Any]:
    """A config.json with the fields of Qwen2-VL-7B-Instruct's, in small."""
    vision = {"depth": 3, "embed_dim": 32, "hidden_size": 64, "mlp_ratio": 4, "num_heads": 2, "in_chans": 3}
    vision |= {"patch_size": 14, "spatial_merge_size": 2, "spatial_patch_size": 14, "temporal_patch_size": 2}
    ids = {
        f"{name}_token_id": tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in ("vision_start", "vision_end")
    }
    ids |= {f"{name}_token_id": tokenizer.convert_tokens_to_ids(f"<|{name}_pad|>") for name in ("image", "video")}
    return {
        "architectures": ["Qwen2VLForConditionalGeneration"],
        "attention_dropout": 0.0,
        **ids,
        "hidden_act": "silu",
        "hidden_size": 64,
        "initializer_range": 0.02,
        "intermediate_size": 96,
        "max_position_embeddings": 32768,
        "model_type": "qwen2_vl",
        "num_attention_heads": 4,
        "num_hidden_layers": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
        "tie_word_embeddings": False,
        "use_sliding_window": False,
        "vision_config": vision,
        "vocab_size": 320,
    }


def official(folder: Path) -> None:
    """Write the files of a random HPSv3 and the package's scores of the pictures into the folder."""
    sys.meta_path.insert(0, Empty())
    from hpsv3.inference import HPSv3RewardInferencer
    from hpsv3.model.qwen2vl_trainer import Qwen2VLRewardModelBT
    from safetensors.torch import save_file
    from transformers import Qwen2TokenizerFast, Qwen2VLConfig, Qwen2VLImageProcessor, Qwen2VLProcessor
    from transformers.models.qwen2.tokenization_qwen2 import bytes_to_unicode

    (folder / "vocab.json").write_text(json.dumps({byte: i for i, byte in enumerate(bytes_to_unicode().values())}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = Qwen2TokenizerFast(str(folder / "vocab.json"), str(folder / "merges.txt"), padding_side="right")
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL})
    tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(configuration(tokenizer)))

    tokenizer.add_special_tokens({"additional_special_tokens": ["<|Reward|>"]})
    special = tokenizer.convert_tokens_to_ids(["<|Reward|>"])
    config = Qwen2VLConfig.from_pretrained(folder)
    model = Qwen2VLRewardModelBT(
        config, output_dim=2, reward_token="special", special_token_ids=special, rm_head_type="ranknet"
    )
    model.resize_token_embeddings(len(tokenizer))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.copy_(0.2 * torch.randn(tensor.shape, generator=generator))
    model.config.pad_token_id = tokenizer.pad_token_id
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, folder / "HPSv3.safetensors")

    inferencer = object.__new__(HPSv3RewardInferencer)
    inferencer.device, inferencer.use_special_tokens, inferencer.model = "cpu", True, model.eval()
    inferencer.processor = Qwen2VLProcessor(Qwen2VLImageProcessor(), tokenizer, chat_template=CHAT)
    paths = [str(path) for path in pictures(folder)]
    with torch.no_grad():
        scores = {name: inferencer.reward(paths, [text] * len(paths)).tolist() for name, text in PROMPTS.items()}
    (folder / "official.json").write_text(json.dumps(scores))


def compare(python: str) -> None:
    """Run the package in its environment, and print its scores beside ours."""
    import dmdr_rewards

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        subprocess.run([python, __file__, "--official", str(folder)], check=True)
        expected = json.loads((folder / "official.json").read_text())
        made: dict[torch.dtype, Any] = {
            dtype: dmdr_rewards.create("hpsv3", folder, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)
        }
        paths = [folder / f"{size}.png" for size in SIZES]
        ours: dict[Any, Any] = {}
        with torch.inference_mode():
            for prompt, text in PROMPTS.items():
                for dtype, reward in made.items():
                    mean, spread = reward.distribution(paths, [text] * len(paths))
                    ours[dtype, prompt] = torch.stack([mean, spread.log()], dim=1)
    print(f"{'picture':11}{'prompt':18}{'hpsv3 1.0.0':>12}{'dmdr_rewards':>14}{'difference':>12}{'in bf16':>10}")
    for prompt, rows in expected.items():
        for row, picture in enumerate(SIZES):
            theirs, mine = rows[row][0], float(ours[torch.float32, prompt][row, 0])
            half = float(ours[torch.bfloat16, prompt][row, 0])
            print(f"{picture:11}{prompt:18}{theirs:12.6f}{mine:14.6f}{mine - theirs:12.1e}{half - theirs:10.1e}")
    apart = max(float((ours[torch.float32, name] - torch.tensor(rows)).abs().max()) for name, rows in expected.items())
    means = torch.tensor([row[0] for rows in expected.values() for row in rows])
    print(f"largest difference of μ and log σ: {apart:.1e}; spread of the scores {means.std():.2g}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("python", nargs="?", help="the Python of the environment with hpsv3")
    parser.add_argument("--official", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.official:
        official(arguments.official)
    elif arguments.python:
        compare(arguments.python)
    else:
        parser.error("give the Python of the environment with hpsv3")
