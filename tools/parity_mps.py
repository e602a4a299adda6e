"""Compare the reward `mps` with the code of its authors, on the same random network.

    git clone https://github.com/Kwai-Kolors/MPS
    python tools/parity_mps.py MPS

The release's own modules and its `infer_one_sample` run in this process, with transformers' CLIP processor on PIL; it
needs einops. The CLIP is small (2 layers of width 32, 17 tokens of a picture), the network on it is of the release's
size: 4 layers, width 1024, 16 heads. The release computes in float16 on a GPU; here its `half()` does nothing, so both
compute in float32. What it imports for other purposes is replaced by empty modules. Nothing is downloaded.
"""

import argparse
import importlib
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import dmdr_rewards
import numpy as np
import torch
import transformers
from dmdr_rewards.models.mps import CONDITIONS
from PIL import Image
from safetensors.torch import load_file
from tiny_mps import save_mps

SIZES = {"square": (256, 256), "portrait": (301, 200), "landscape": (180, 333), "small": (20, 31), "wide": (90, 400)}
PROMPTS = {
    "plain": "a cat on a red mat",
    "empty": "",
    "long": "a long description of a cat, " * 12,
    "é": "crème brûlée",
}
CASES = {name: [("square", label) for label in PROMPTS] for name in CONDITIONS}
CASES["overall"] += [(size, "plain") for size in SIZES if size != "square"]
SIDE = 32
UNUSED = ("fire", "cv2", "matplotlib", "matplotlib.pyplot")


def pictures(folder: Path) -> dict[str, Path]:
    """One picture file for each of `SIZES`."""
    paths = {}
    for seed, (name, (height, width)) in enumerate(SIZES.items()):
        coarse = np.random.default_rng(seed).integers(0, 256, (9, 7, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((width, height)).save(folder / f"{name}.png")
        paths[name] = folder / f"{name}.png"
    return paths


def release(clone: Path, folder: Path) -> Any:
    """The release's score: (picture, prompt, condition's words) -> float."""
    sys.path.insert(0, str(clone))
    sys.modules.update({name: MagicMock() for name in UNUSED})
    sys.modules["transformers"].CLIPFeatureExtractor = object  # type: ignore[attr-defined]  # imported and not used
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    torch.Tensor.half = lambda self: self  # type: ignore[method-assign, assignment, return-value]
    code: Any = importlib.import_module("eval_overall_mps_on_hpdv2")
    module: Any = importlib.import_module("trainer.models.clip_model")
    clip = transformers.CLIPConfig.from_pretrained(folder)
    module.XCLIPModel.from_pretrained = classmethod(lambda cls, place: cls(clip))
    model = module.CLIPModel(None)
    model.load_state_dict(load_file(folder / "MPS_overall_checkpoint.safetensors"))
    model.eval()
    processor = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, model_max_length=77)

    def score(picture: Path, prompt: str, words: str) -> float:
        return float(code.infer_one_sample(str(picture), prompt, model, processor, tokenizer, "cpu", words))

    return score


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clone", type=Path, help="the folder of Kwai-Kolors/MPS")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = save_mps(Path(name), width=1024, depth=4, heads=16)
        paths = pictures(folder)
        official = release(options.clone, folder)
        print(f"{'condition':12}{'picture':11}{'prompt':8}{'Kwai-Kolors/MPS':>16}{'dmdr_rewards':>14}{'difference':>12}"
              f"{'in bf16':>10}{'words':>7}")  # fmt: skip
        apart, scores = [0.0], []
        for condition, words in CONDITIONS.items():
            reward, half = (
                dmdr_rewards.create("mps", folder, condition=condition, dtype=dtype)
                for dtype in (torch.float32, torch.bfloat16)
            )
            for picture, label in CASES[condition]:
                path, text = paths[picture], PROMPTS[label]
                theirs = official(path, text, words)
                ours, rounded = (float(each.score([path], [text])) for each in (reward, half))
                read = int(reward.counts(reward.towers.texts([text])[:, :-1]).sum())  # type: ignore[attr-defined]
                apart.append(abs(ours - theirs))
                scores.append(theirs)
                print(f"{condition:12}{picture:11}{label:8}{theirs:16.5f}{ours:14.5f}{ours - theirs:12.1e}"
                      f"{rounded - theirs:10.1e}{read:7}")  # fmt: skip
    print(
        f"largest difference: {max(apart):.1e}; mean |score| {np.abs(scores).mean():.3g}, spread {np.std(scores):.2g}"
    )


if __name__ == "__main__":
    main()
