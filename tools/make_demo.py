"""Make the files of the built-in problem: VAE, teacher and two classifiers, from nothing but drawn pictures.

    python tools/make_demo.py                    # everything, in order; each part prints its seconds
    python tools/make_demo.py --only teacher     # one part, from the parts already there

Writes to packages/dmdr-train/src/dmdr_train/demo/: `teacher/` (vae and transformer) and `classifiers/` (cnn and vit).
Weights are stored in half precision, which keeps all files together under 8 MB.
"""

import argparse
import copy
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from dmdr_core import FlowMatching, denoising_loss
from dmdr_models.sit.transformer import SiTTransformer
from dmdr_train.demo import drawing
from torch import Tensor, nn
from transformers import (
    RegNetConfig,
    RegNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

HOME = Path(__file__).parents[1] / "packages/dmdr-train/src/dmdr_train/demo"
NUM_CLASSES = len(drawing.CLASSES)
NUM_PICTURES = 60_000


def pictures(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """`count` pictures as uint8 `[N, 3, 32, 32]`, and their labels `[N]`."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(NUM_CLASSES, (count,), generator=generator)
    drawn = [drawing.draw(part, generator).mul(255).round().byte() for part in labels.split(2000)]
    return torch.cat(drawn), labels


def batches(*data: Tensor, size: int, steps: int, seed: int) -> Iterator[tuple[Tensor, ...]]:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        index = torch.randint(len(data[0]), (size,), generator=generator)
        yield tuple(part[index] for part in data)


def one_cycle(optimizer: torch.optim.Optimizer, steps: int, rate: float) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=rate, total_steps=steps, pct_start=0.05)


def report(name: str, step: int, steps: int, start: float, loss: Tensor) -> None:
    if step % 200 == 0 or step == steps - 1:
        print(f"{name} {step}/{steps} loss {loss.item():.4f} {time.time() - start:.0f} s", flush=True)


def save(model: nn.Module, path: Path) -> None:
    copy.deepcopy(model).half().save_pretrained(path)


def to_vae(images: Tensor) -> Tensor:
    return images.float() / 127.5 - 1


def make_vae(steps: int = 3200) -> None:
    torch.manual_seed(0)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 64),
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=4,
        sample_size=drawing.SIZE,
    )
    # A small start variance: otherwise the KL term switches latent channels off before they carry anything.
    with torch.no_grad():
        vae.quant_conv.bias[4:] = -5.0
    data, _ = pictures(NUM_PICTURES, seed=1)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, weight_decay=1e-4, fused=True)
    schedule = one_cycle(optimizer, steps, 2e-3)
    start = time.time()
    for step, (batch,) in enumerate(batches(data, size=16, steps=steps, seed=2)):
        x = to_vae(batch)
        posterior = vae.encode(x).latent_dist
        y = vae.decode(posterior.sample()).sample
        loss = (y - x).abs().mean() + 0.2 * F.mse_loss(y, x) + 1e-5 * posterior.kl().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        report("vae", step, steps, start, loss)

    with torch.no_grad():
        x = to_vae(data[:2000])
        latents = vae.encode(x).latent_dist.mean
        error = F.mse_loss(vae.decode(latents).sample.clamp(-1, 1), x) / 4
        print(f"vae PSNR {-10 * error.log10():.2f} dB, std per channel {latents.std(dim=(0, 2, 3)).tolist()}")
    vae.register_to_config(scaling_factor=float(1 / latents.std()), shift_factor=float(latents.mean()))
    save(vae, HOME / "teacher/vae")


def load_vae() -> AutoencoderKL:
    return AutoencoderKL.from_pretrained(HOME / "teacher/vae", torch_dtype=torch.float32).eval()


def make_classifier(name: str, steps: int) -> None:
    """Trained on drawings and on reconstructions of the VAE, both with light noise, so that neither grain nor the
    decoder's softness decides the class."""
    torch.manual_seed(0)
    labels = {"id2label": dict(enumerate(drawing.CLASSES)), "label2id": {c: i for i, c in enumerate(drawing.CLASSES)}}
    model: nn.Module
    if name == "cnn":
        model = RegNetForImageClassification(
            RegNetConfig(
                embedding_size=32,
                hidden_sizes=[32, 48, 64],
                depths=[1, 2, 1],
                groups_width=16,
                layer_type="x",
                downsample_in_first_stage=False,
                **labels,
            )
        )
    else:
        model = ViTForImageClassification(
            ViTConfig(
                image_size=drawing.SIZE,
                patch_size=4,
                hidden_size=64,
                num_hidden_layers=4,
                num_attention_heads=4,
                intermediate_size=192,
                **labels,
            )
        )
    data, classes = pictures(40_000, seed=3)
    data[:20_000] = reconstruct(load_vae(), data[:20_000])
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.02)
    schedule = one_cycle(optimizer, steps, 2e-3)
    noise = torch.Generator().manual_seed(4)
    start = time.time()
    model.train()
    for step, (batch, y) in enumerate(batches(data, classes, size=96, steps=steps, seed=5)):
        x = to_vae(batch)
        x = x + 0.15 * torch.rand(len(x), 1, 1, 1, generator=noise) * torch.randn(x.shape, generator=noise)
        loss = F.cross_entropy(model(pixel_values=x).logits, y, label_smoothing=0.02)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        report(name, step, steps, start, loss)
    model.eval()
    test, truth = pictures(4000, seed=6)
    with torch.no_grad():
        correct = (model(pixel_values=to_vae(test)).logits.argmax(dim=1) == truth).float().mean()
    print(f"{name} accuracy on fresh drawings {correct:.4f}")
    save(model, HOME / "classifiers" / name)
    processor = ViTImageProcessor(size={"height": drawing.SIZE, "width": drawing.SIZE}, do_resize=False)
    processor.save_pretrained(HOME / "classifiers" / name)


@torch.no_grad()
def reconstruct(vae: AutoencoderKL, images: Tensor) -> Tensor:
    parts = [vae.decode(vae.encode(to_vae(part)).latent_dist.mean).sample for part in images.split(500)]
    return torch.cat([((part + 1) * 127.5).clamp(0, 255).round().byte() for part in parts])


@torch.no_grad()
def encode(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """The means of the scaled latents, `[N, 4, 8, 8]`: their spread is noise that the decoder ignores."""
    means = torch.cat([vae.encode(to_vae(part)).latent_dist.mean for part in images.split(1000)])
    return (means - vae.config.shift_factor) * vae.config.scaling_factor


def teacher_optimizers(model: nn.Module) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the blocks, which then need far fewer steps; AdamW for everything else."""
    matrices = {
        name: weight
        for name, weight in model.named_parameters()
        if name.startswith("blocks.") and weight.ndim == 2 and "modulation" not in name
    }
    others = [weight for name, weight in model.named_parameters() if name not in matrices]
    return [
        torch.optim.Muon(matrices.values(), lr=0.02, momentum=0.95, weight_decay=0.01),
        torch.optim.AdamW(others, lr=1e-3, betas=(0.9, 0.99), weight_decay=0.01, fused=True),
    ]


def make_teacher(steps: int, snapshots: Path | None) -> None:
    """Flow matching with averaged weights. Times are logit-normal, where shapes are decided (arXiv 2403.03206)."""
    torch.manual_seed(0)
    model = SiTTransformer(
        sample_size=8, patch_size=2, width=128, depth=4, num_heads=4, num_classes=NUM_CLASSES, fused_attention=True
    )
    average = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9985)
    )
    process = FlowMatching()
    images, labels = pictures(NUM_PICTURES, seed=7)
    latents = encode(load_vae(), images)
    optimizers = teacher_optimizers(model)
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min(1.0, (step + 1) / 200, (steps - step) / (0.35 * steps))
        )
        for optimizer in optimizers
    ]
    noise = torch.Generator().manual_seed(8)
    start = time.time()
    for step, (x0, y) in enumerate(batches(latents, labels, size=64, steps=steps, seed=9)):
        epsilon = torch.randn(x0.shape, generator=noise)
        t = torch.randn(len(x0), generator=noise).sigmoid()
        y = torch.where(torch.rand(len(y), generator=noise) < 0.1, NUM_CLASSES, y)
        loss = denoising_loss(model(process.add_noise(x0, epsilon, t), t, y), process.target(x0, epsilon, t))
        model.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
        average.update_parameters(model)
        report("teacher", step, steps, start, loss)
        if snapshots and (step + 1) % 2000 == 0:
            save(average.module, snapshots / f"{step + 1}")
    save(average.module, HOME / "teacher/transformer")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["vae", "cnn", "vit", "teacher"], help="make this part alone")
    parser.add_argument("--teacher-steps", type=int, default=18_000)
    parser.add_argument("--snapshots", type=Path, help="also keep the teacher of every 2,000 steps in this folder")
    args = parser.parse_args()
    parts = {
        "vae": make_vae,
        "cnn": lambda: make_classifier("cnn", steps=2500),
        "vit": lambda: make_classifier("vit", steps=4000),
        "teacher": lambda: make_teacher(args.teacher_steps, args.snapshots),
    }
    for name, make in parts.items():
        if args.only in (None, name):
            make()


if __name__ == "__main__":
    main()
