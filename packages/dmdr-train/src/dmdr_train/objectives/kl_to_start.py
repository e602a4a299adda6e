"""The KL divergence to the generator as it was when the objective began, which keeps a student near its start."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from dmdr_train.recipe.sections import ObjectiveSection
from dmdr_train.training.objective import Objective

if TYPE_CHECKING:
    from torch import Tensor

    from dmdr_train.training.guide import Guide
    from dmdr_train.training.sample import Sample


class KLToStartSection(ObjectiveSection):
    weight: Annotated[float, Field(gt=0)] = 1.0

    def check(self, recipe: Any, key: str) -> None:
        """Alone it trains nothing, and its copy of the weights must be whole on every process."""
        if all(o.kind == self.kind for o in recipe.objectives):
            raise ValueError(
                f"{key}.kind: {self.kind} alone leaves the student as it is; add an objective, such as refl"
            )
        if recipe.optim.zero_stage == 3:
            raise ValueError(
                f"optim.zero_stage: 3 splits the weights that {self.kind} keeps a copy of; use 2, or leave it out"
            )


class KLToStart(Objective):
    """The KL divergence of a step's next state from that of the reference, per dimension.

    The reference is the generator at the objective's `start`. Both predict at the sample's own x_t. A step that draws
    noise is a Gaussian of the same standard deviation for both, so KL = mean (μ − μ_ref)² / (2 std²); with
    `rollout.mode: sde` this is a² · mean (x0 − x0_ref)² / (2 σ²), for the signal a and the noise σ at the next time. A
    step that draws none, such as the last, has no density: there it is ½ mean (x0 − x0_ref)². No gradient flows
    through the reference.

    Source: the KL penalty of policy-gradient trainers, DPOK, arXiv 2305.16381; Flow-GRPO, arXiv 2505.05470.
    """

    Section = KLToStartSection
    needs = frozenset({"frozen_copy"})

    def __init__(self, settings: KLToStartSection, name: str, reward: Any = None):
        super().__init__(settings, name, reward)
        self.weights: dict[str, Tensor] = {}

    def begin(self, generator: Any) -> None:
        from dmdr_train.distributed.frozen_weights import copy_weights

        self.weights = copy_weights(generator)

    def state_dict(self) -> "dict[str, Tensor]":
        return self.weights

    def load_state_dict(self, state: "Mapping[str, Tensor]") -> None:
        self.weights = dict(state)

    def __call__(self, sample: "Sample", guide: "Guide") -> "tuple[Tensor, Mapping[str, Tensor | float]]":
        import torch
        from dmdr_core import gaussian_kl
        from dmdr_core.base.devices import on_device

        mean, other = sample.x0, sample.x0_with(self.weights)
        std = torch.ones_like(mean[:, :1, :1, :1])
        if sample.spread is not None:
            noisy = torch.tensor([position < sample.num_steps - 1 for position in sample.positions])
            noisy = on_device(noisy, mean.device).reshape(-1, 1, 1, 1)
            (moved, spread), (others, _) = sample.next_distribution(mean), sample.next_distribution(other)
            mean, other = torch.where(noisy, moved, mean), torch.where(noisy, others, other)
            std = torch.where(noisy, spread, std)
        return gaussian_kl(mean, other, std).mean(), {}
