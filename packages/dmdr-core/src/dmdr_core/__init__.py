"""Building blocks for distilling diffusion models: tensors in, tensors out.

This package contains no networks, no file formats and no process groups. Samples are ``[B, ...]`` with any trailing
shape; a network is any callable ``predict(x_t, t) -> prediction``. The noise process defines what ``t`` and a
prediction mean (`dmdr_core.process`); randomness comes from the generators you pass (`dmdr_core.randomness`).

The method: "Distribution Matching Distillation Meets Reinforcement Learning" (DMDR), arXiv 2511.13649.
"""

from dmdr_core.annealing import cosine_anneal
from dmdr_core.grid import Grid, StepGrid, TimestepGrid
from dmdr_core.guidance import guided
from dmdr_core.losses import denoising_loss, dmd_gradient, dmd_loss
from dmdr_core.process import FlowMatching, Process, VariancePreserving
from dmdr_core.randomness import Generators, randn
from dmdr_core.renoise import BetaRenoise, UniformRenoise
from dmdr_core.rewards import group_advantage, hinge, relative_reward
from dmdr_core.rollouts import Predict, Rollout, rollout, visit
from dmdr_core.training_states import PredictRows, authors_states, visited_states

__version__ = "0.1.0"
__all__ = [
    "BetaRenoise",
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
    "authors_states",
    "cosine_anneal",
    "denoising_loss",
    "dmd_gradient",
    "dmd_loss",
    "group_advantage",
    "guided",
    "hinge",
    "randn",
    "relative_reward",
    "rollout",
    "visit",
    "visited_states",
]
