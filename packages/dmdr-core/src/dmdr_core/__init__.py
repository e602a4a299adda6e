"""Building blocks for distilling diffusion models: tensors in, tensors out.

This package contains no networks, no file formats and no process groups. Samples are ``[B, ...]`` with any trailing
shape; a network is any callable ``predict(x_t, t) -> prediction``. The noise process defines what ``t`` and a
prediction mean (`dmdr_core.process`); randomness comes from the generators you pass (`dmdr_core.randomness`).

The method: "Distribution Matching Distillation Meets Reinforcement Learning" (DMDR), arXiv 2511.13649.
"""

from dmdr_core.adversarial import discriminator_loss, generator_loss, gradient_penalty
from dmdr_core.annealing import cosine_anneal
from dmdr_core.divergences import divergence_weight
from dmdr_core.grid import Grid, StepGrid, TimestepGrid
from dmdr_core.guidance import guided
from dmdr_core.losses import (
    decoupled_gradient,
    denoising_loss,
    dmd_gradient,
    dmd_loss,
    mean_distance,
    surrogate_loss,
)
from dmdr_core.policy import gaussian_kl, gaussian_log_density, gaussian_step, policy_loss
from dmdr_core.process import FlowMatching, Process, VariancePreserving
from dmdr_core.randomness import Generators, randn
from dmdr_core.renoise import BetaRenoise, UniformRenoise
from dmdr_core.rewards import group_advantage, hinge, relative_reward
from dmdr_core.rollouts import CoefficientsPreserving, Predict, Rollout, rollout, visit
from dmdr_core.sub_interval import ancestral_step, renoise_state, sub_interval_loss, sub_interval_target
from dmdr_core.training_states import PredictRows, authors_states, final_samples, visited_states

__version__ = "0.1.0"
__all__ = [
    "BetaRenoise",
    "CoefficientsPreserving",
    "FlowMatching",
    "Generators",
    "Grid",
    "Predict",
    "PredictRows",
    "Process",
    "Rollout",
    "StepGrid",
    "TimestepGrid",
    "UniformRenoise",
    "VariancePreserving",
    "ancestral_step",
    "authors_states",
    "cosine_anneal",
    "decoupled_gradient",
    "denoising_loss",
    "discriminator_loss",
    "divergence_weight",
    "dmd_gradient",
    "dmd_loss",
    "final_samples",
    "gaussian_kl",
    "gaussian_log_density",
    "gaussian_step",
    "generator_loss",
    "gradient_penalty",
    "group_advantage",
    "guided",
    "hinge",
    "mean_distance",
    "policy_loss",
    "randn",
    "relative_reward",
    "renoise_state",
    "rollout",
    "sub_interval_loss",
    "sub_interval_target",
    "surrogate_loss",
    "visit",
    "visited_states",
]
