"""Code that make_demo.py and make_scenes.py share: training of a VAE, a classifier and small denoisers."""

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor, nn
from transformers import RegNetConfig, RegNetForImageClassification, ViTImageProcessor


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


def train_vae(data: Tensor, latent_channels: int, steps: int) -> AutoencoderKL:
    """Train a VAE of factor 4 on pictures `[N, 3, 32, 32]` of bytes, and measure scaling and shift of its latents."""
    torch.manual_seed(0)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 64),
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=latent_channels,
        sample_size=data.shape[-1],
    )
    # A small start variance: otherwise the KL term switches latent channels off before they carry information.
    with torch.no_grad():
        vae.quant_conv.bias[latent_channels:] = -5.0
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
    return vae


@torch.no_grad()
def reconstruct(vae: AutoencoderKL, images: Tensor) -> Tensor:
    parts = [vae.decode(vae.encode(to_vae(part)).latent_dist.mean).sample for part in images.split(500)]
    return torch.cat([((part + 1) * 127.5).clamp(0, 255).round().byte() for part in parts])


@torch.no_grad()
def encode(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """Return the means of the scaled latents, `[N, C, 8, 8]`; their spread is noise that the decoder ignores."""
    means = torch.cat([vae.encode(to_vae(part)).latent_dist.mean for part in images.split(1000)])
    return (means - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor


def grain(x: Tensor, generator: torch.Generator) -> Tensor:
    """Add light noise, with a different amount per picture."""
    return x + 0.15 * torch.rand(len(x), 1, 1, 1, generator=generator) * torch.randn(x.shape, generator=generator)


def regnet(names: Sequence[str], **options: Any) -> RegNetForImageClassification:
    """Return a small convolutional classifier with these class names."""
    config = RegNetConfig(
        embedding_size=32,
        hidden_sizes=[32, 48, 64],
        depths=[1, 2, 1],
        groups_width=16,
        layer_type="x",
        downsample_in_first_stage=False,
        **class_names(names),
        **options,
    )
    return RegNetForImageClassification(config)


def class_names(names: Sequence[str]) -> dict[str, dict[Any, Any]]:
    return {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}


def train_classifier(
    name: str,
    model: nn.Module,
    images: Tensor,
    targets: Tensor,
    loss: Callable[[Tensor, Tensor], Tensor],
    steps: int,
    seed: int,
) -> None:
    """Train with light noise, so that grain does not decide the class. Uses `seed` and `seed + 1`."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.02)
    schedule = one_cycle(optimizer, steps, 2e-3)
    noise = torch.Generator().manual_seed(seed)
    start = time.time()
    model.train()
    for step, (batch, target) in enumerate(batches(images, targets, size=96, steps=steps, seed=seed + 1)):
        value = loss(model(pixel_values=grain(to_vae(batch), noise)).logits, target)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        schedule.step()
        report(name, step, steps, start, value)
    model.eval()


def save_classifier(model: nn.Module, path: Path, size: int) -> None:
    save(model, path)
    ViTImageProcessor(size={"height": size, "width": size}, do_resize=False).save_pretrained(path)


class Training:
    """Optimizers, schedules and averaged weights of a small network; the names of its blocks contain `blocks`."""

    def __init__(self, model: nn.Module, blocks: str, steps: int) -> None:
        self.model = model
        self.average = torch.optim.swa_utils.AveragedModel(
            model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9985)
        )
        self.matrices = _matrices(model, blocks)
        self.optimizers = _optimizers(model, self.matrices)
        self.schedules = [
            torch.optim.lr_scheduler.LambdaLR(
                optimizer, lambda step: min(1.0, (step + 1) / 200, (steps - step) / (0.35 * steps))
            )
            for optimizer in self.optimizers
        ]

    def step(self, loss: Tensor) -> None:
        self.model.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for weight, flat in self.matrices.items():
            flat.grad = cast(Tensor, weight.grad).flatten(1)
        for optimizer, schedule in zip(self.optimizers, self.schedules, strict=True):
            optimizer.step()
            schedule.step()
        self.average.update_parameters(self.model)


def _matrices(model: nn.Module, blocks: str) -> dict[nn.Parameter, nn.Parameter]:
    """Return the weights of linear layers and convolutions inside the blocks, each with its view as a matrix."""
    return {
        weight: nn.Parameter(weight.detach().flatten(1))
        for name, weight in model.named_parameters()
        if blocks in name and weight.ndim > 1 and "modulation" not in name and ".norm" not in name
    }


def _optimizers(model: nn.Module, matrices: dict[nn.Parameter, nn.Parameter]) -> list[torch.optim.Optimizer]:
    """Return Muon for the matrices inside the blocks, which reduces the steps a lot, and AdamW for everything else."""
    others = [weight for weight in model.parameters() if weight not in matrices]
    return [
        torch.optim.Muon(matrices.values(), lr=0.02, momentum=0.95, weight_decay=0.01),
        torch.optim.AdamW(others, lr=1e-3, betas=(0.9, 0.99), weight_decay=0.01, fused=True),
    ]


def run_parts(parts: dict[str, Callable[[], None]], only: str | None) -> None:
    for name, make in parts.items():
        if only in (None, name):
            make()
