"""The discriminator: a small head on the guidance network's features, which tells real samples from the generator's.

It looks at renoised samples x_τ, at the times and the noise of the step. With the logistic loss its logit approaches
log p(x_τ)/q(x_τ), with p the density of real samples and q the generator's. Three things can use it: the adversarial
term of the generator's loss (DMD2, arXiv 2405.14867), the density ratio of an f-divergence (arXiv 2502.15681), and a
reward that is trained online, on predictions from all steps of the rollout (AdvDMD, arXiv 2604.28126).

Real samples are pictures of a data set, `data.pictures`, or the teacher's own, which can be reached and need no data
set (Z-Image Turbo++, arXiv 2606.12575). The teacher draws its own in a few steps, for the prompts of the generator's
samples, or they come from `data.pairs`.
"""

from typing import Any

import torch
import torch.nn.functional as F
from dmdr_core import discriminator_loss, gradient_penalty, randn, rollout
from dmdr_models.drawing.sampling import guided_prediction
from dmdr_models.families.protocols import Condition, Family
from dmdr_models.networks.features import MiddleFeatures
from torch import Tensor, nn

from dmdr_train.base.random_draws import named_generator
from dmdr_train.data.stored_samples import StoredSamples
from dmdr_train.distributed.collectives import mean_tensor_over_processes
from dmdr_train.recipe import schema
from dmdr_train.training.sample import Sample


class Head(nn.Module):
    """Tokens `[B, N, C]` to logits `[B]`: a layer for each token, their mean, and a layer; the logits start at 0."""

    def __init__(self, channels: int, width: int, generator: torch.Generator):
        super().__init__()
        self.each = nn.Linear(channels, width)
        self.all = nn.Linear(width, width)
        self.logit = nn.Linear(width, 1)
        with torch.no_grad():
            for layer in (self.each, self.all):
                bound = layer.in_features**-0.5
                layer.weight.uniform_(-bound, bound, generator=generator)
                layer.bias.zero_()
            self.logit.weight.zero_()
            self.logit.bias.zero_()

    def forward(self, tokens: Tensor) -> Tensor:
        return self.logit(F.silu(self.all(F.silu(self.each(tokens)).mean(dim=1)))).squeeze(1)


class Discriminator:
    """The head, its optimizer, and the real samples it learns from.

    All processes hold the same head and average its gradients. Its update belongs to the generator's: `learn` takes the
    gradients of each micro-batch, and `update` takes the step.

    Args:
        guidance: the section `guidance` of a recipe, with its `discriminator`.
        engine: engine (or module) of the guidance network, a `LoRANetwork`.
        seed: of the head's start values.
        shift: of the grid on which the teacher draws real samples.
        stored: the real samples, unless the teacher draws them.

    Raises:
        ValueError: the network names no blocks whose features could be read.
    """

    def __init__(
        self, guidance: schema.Guidance, family: Family, engine: Any, device: torch.device, seed: int,
        shift: float = 1.0, stored: StoredSamples | None = None,
    ):  # fmt: skip
        assert guidance.discriminator is not None
        self.settings, self.cfg = guidance.discriminator, guidance.drawing_cfg
        self.scale = guidance.fake_scale if self.settings.features == "fake_score" else 0.0
        self.family, self.engine, self.stored = family, engine, stored
        self.middle = MiddleFeatures(getattr(engine, "module", engine).base)
        if self.settings.teacher_steps is not None:
            self.grid = family.grid(self.settings.teacher_steps, shift)
        channels = self._channels(device)
        self.head = Head(channels, self.settings.width, named_generator(seed, "discriminator")).to(device)
        self.parameters = dict(self.head.named_parameters())
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(), lr=self.settings.lr, betas=(0.0, 0.99), weight_decay=0.0
        )
        self.gradients: list[Tensor] = []
        self.batches = 0

    # -- logits

    def logit(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """The logits `[B]` of noisy samples or states of a rollout at their times; gradients flow to `x_t`.

        As a reward of `x_t`, higher is better.
        """
        return self.head(self.features(x_t, t, condition))

    def features(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """What the head sees: the middle block's tokens `[B, N, C]`, each normalised."""
        with self.middle:
            self.family.predict(self.engine, x_t, t, condition, lora_scale=self.scale)
            tokens = self.middle.tokens()
        return F.layer_norm(tokens, tokens.shape[-1:])

    # -- training

    def noisy(self, sample: Sample, t: Tensor) -> Tensor:
        """The sample's x0 at the times t `[B]`, with the noise of its step; gradients flow to x0."""
        noise = randn(sample.x0.shape, sample.draws.each("renoise_noise"), device=sample.x0.device)
        return self.family.process.add_noise(sample.x0, noise, t)

    def learn(self, sample: Sample, t: Tensor) -> dict[str, Tensor]:
        """Take the head's gradients on a micro-batch: the generator's samples and real ones, at the same times.

        Args:
            sample: without gradient.
            t: `[B]`, the times that they are renoised to.

        Returns:
            Values to log, without graph.
        """
        with torch.no_grad():
            fresh, condition = self.real(sample)
            noise = randn(fresh.shape, sample.draws.each("real_noise"), device=fresh.device)
            fake = self.features(self.noisy(sample, t), t, sample.condition)
            real = self.features(self.family.process.add_noise(fresh, noise, t), t, condition)
        real.requires_grad_()
        of_real, of_fake = self.head(real), self.head(fake)
        loss = discriminator_loss(self.settings.loss, of_real, of_fake)
        penalty = gradient_penalty(of_real, real) if self.settings.r1 else torch.zeros_like(loss)
        found = torch.autograd.grad(loss + self.settings.r1 * penalty, list(self.parameters.values()))
        self.gradients = [a + b for a, b in zip(self.gradients, found, strict=True)] if self.batches else list(found)
        self.batches += 1
        return {
            "loss/discriminator": loss.detach(),
            "discriminator/real": of_real.detach().mean(),
            "discriminator/fake": of_fake.detach().mean(),
        }

    def update(self) -> None:
        """Take a step of the head by the mean gradient over the micro-batches of all processes, if it is finite.

        All processes must call this together.
        """
        if not self.batches:
            return
        whole = torch.cat([gradient.flatten() for gradient in self.gradients]) / self.batches
        whole = mean_tensor_over_processes(whole)
        self.gradients, self.batches = [], 0
        if not bool(whole.isfinite().all()):
            return
        parts = whole.split([p.numel() for p in self.parameters.values()])
        for parameter, gradient in zip(self.parameters.values(), parts, strict=True):
            parameter.grad = gradient.view_as(parameter)
        self.optimizer.step()
        self.optimizer.zero_grad()

    @torch.no_grad()
    def real(self, sample: Sample) -> tuple[Tensor, Condition]:
        """Real samples `[B, C, H, W]` and their condition: of the sample's prompts, or the next stored ones."""
        if self.settings.teacher_steps is None:
            assert self.stored is not None
            prompts, samples = self.stored.real(sample.draws)
            return samples, self.family.condition(prompts)

        def predict(x: Tensor, t: Tensor) -> Tensor:
            return guided_prediction(self.family, self.engine, x, t, sample.condition, self.cfg, lora_scale=0.0)

        noise = randn(sample.x0.shape, sample.draws.each("teacher"), device=sample.x0.device)
        return rollout(predict, self.family.process, self.grid, noise, mode="ode").x0, sample.condition

    # -- state

    def state_dict(self) -> dict[str, Tensor]:
        """The head and the moments of its optimizer; the same on all processes."""
        state = {f"head.{name}": p.detach().clone() for name, p in self.parameters.items()}
        for name, p in self.parameters.items():
            for key, value in self.optimizer.state[p].items():
                state[f"{key}.{name}"] = value.clone()
        return state

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore what `state_dict` returned.

        Raises:
            KeyError, RuntimeError: it is that of another head.
        """
        self.head.load_state_dict({name: state[f"head.{name}"] for name in self.parameters})
        for name, p in self.parameters.items():
            if f"step.{name}" in state:
                moments = {key: state[f"{key}.{name}"].to(p.device) for key in ("exp_avg", "exp_avg_sq")}
                self.optimizer.state[p] = {"step": state[f"step.{name}"].clone(), **moments}

    @torch.no_grad()
    def _channels(self, device: torch.device) -> int:
        """The number of channels of the features, from a call with one empty latent."""
        t = self.family.process.time_at(torch.full((1,), 0.5, device=device))
        x = torch.zeros(1, *self.family.latent_shape(*self.family.size), device=device)
        return self.features(x, t, self.family.null_condition(1)).shape[-1]
