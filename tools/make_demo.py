"""Make the files of the built-in problem from drawn pictures alone: VAE, teacher and two classifiers.

    python tools/make_demo.py                    # everything, in order; each part prints its seconds
    python tools/make_demo.py --only teacher     # one part, from the parts already there

Writes to packages/dmdr-train/src/dmdr_train/problems/shapes/: `teacher/` (vae and transformer) and `classifiers/` (cnn
and vit). Weights are stored in half precision, which keeps all files together under 8 MB.
"""

import argparse
import time
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from dmdr_core import FlowMatching, denoising_loss
from dmdr_models.sit.transformer import SiTTransformer
from dmdr_train.problems.shapes import drawing
from small_models import (
    Training,
    batches,
    class_names,
    encode,
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
from torch import Tensor, nn
from transformers import ViTConfig, ViTForImageClassification

HOME = Path(__file__).parents[1] / "packages/dmdr-train/src/dmdr_train/problems/shapes"
NUM_CLASSES = len(drawing.CLASSES)
NUM_PICTURES = 60_000


def pictures(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return `count` pictures as uint8 `[N, 3, 32, 32]`, and their labels `[N]`."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(NUM_CLASSES, (count,), generator=generator)
    drawn = [drawing.draw(part, generator).mul(255).round().byte() for part in labels.split(2000)]
    return torch.cat(drawn), labels


def make_vae(steps: int = 3200) -> None:
    data, _ = pictures(NUM_PICTURES, seed=1)
    save(train_vae(data, latent_channels=4, steps=steps), HOME / "teacher/vae")


def load_vae() -> AutoencoderKL:
    return AutoencoderKL.from_pretrained(HOME / "teacher/vae", torch_dtype=torch.float32).eval()


def make_classifier(name: str, steps: int) -> None:
    """Train on drawings and on reconstructions, so that the decoder's softness does not decide the class."""
    torch.manual_seed(0)
    model: nn.Module
    if name == "cnn":
        model = regnet(drawing.CLASSES)
    else:
        model = ViTForImageClassification(
            ViTConfig(
                image_size=drawing.SIZE,
                patch_size=4,
                hidden_size=64,
                num_hidden_layers=4,
                num_attention_heads=4,
                intermediate_size=192,
                **class_names(drawing.CLASSES),
            )
        )
    data, classes = pictures(40_000, seed=3)
    data[:20_000] = reconstruct(load_vae(), data[:20_000])
    loss = partial(F.cross_entropy, label_smoothing=0.02)
    train_classifier(name, model, data, classes, loss, steps=steps, seed=4)
    test, truth = pictures(4000, seed=6)
    with torch.no_grad():
        correct = (model(pixel_values=to_vae(test)).logits.argmax(dim=1) == truth).float().mean()
    print(f"{name} accuracy on fresh drawings {correct:.4f}")
    save_classifier(model, HOME / "classifiers" / name, drawing.SIZE)


def make_teacher(steps: int, snapshots: Path | None) -> None:
    """Train by flow matching with averaged weights and logit-normal times (arXiv 2403.03206), at which shapes form."""
    torch.manual_seed(0)
    model = SiTTransformer(
        sample_size=8, patch_size=2, width=128, depth=4, num_heads=4, num_classes=NUM_CLASSES, fused_attention=True
    )
    training = Training(model, "blocks.", steps)
    process = FlowMatching()
    images, labels = pictures(NUM_PICTURES, seed=7)
    latents = encode(load_vae(), images)
    noise = torch.Generator().manual_seed(8)
    start = time.time()
    for step, (x0, y) in enumerate(batches(latents, labels, size=64, steps=steps, seed=9)):
        epsilon = torch.randn(x0.shape, generator=noise)
        t = torch.randn(len(x0), generator=noise).sigmoid()
        y = torch.where(torch.rand(len(y), generator=noise) < 0.1, NUM_CLASSES, y)
        loss = denoising_loss(model(process.add_noise(x0, epsilon, t), t, y), process.target(x0, epsilon, t))
        training.step(loss)
        report("teacher", step, steps, start, loss)
        if snapshots and (step + 1) % 2000 == 0:
            save(training.average.module, snapshots / f"{step + 1}")
    save(training.average.module, HOME / "teacher/transformer")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["vae", "cnn", "vit", "teacher"], help="make only this part")
    parser.add_argument("--teacher-steps", type=int, default=18_000)
    parser.add_argument("--snapshots", type=Path, help="also save the teacher to this folder every 2,000 steps")
    args = parser.parse_args()
    parts = {
        "vae": make_vae,
        "cnn": lambda: make_classifier("cnn", steps=2500),
        "vit": lambda: make_classifier("vit", steps=4000),
        "teacher": lambda: make_teacher(args.teacher_steps, args.snapshots),
    }
    run_parts(parts, args.only)


if __name__ == "__main__":
    main()
