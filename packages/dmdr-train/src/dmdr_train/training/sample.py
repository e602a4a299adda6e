"""What the generator made, and how: all that an objective is given of it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dmdr_models.families.protocols import Condition
    from torch import Tensor

    from dmdr_train.base.random_draws import Draws


@dataclass(frozen=True)
class Sample:
    """A micro-batch of the generator's predictions.

    Attributes:
        x0: `[B, C, H, W]`, the predictions, with gradient.
        prompts: B class labels or texts.
        condition: of the prompts, for networks of the family.
        draws: the random numbers of this micro-batch; a purpose gives each sample a generator of its own.
        step: the training step.
        x_t: `[B, C, H, W]`, the states that the predictions were made at, without gradient.
        t: `[B]`, the times of these states.
        t_next: `[B]`, the times that the rollout goes to next; the grid's end at the last step.
        group: the number of each sample's group in the global batch; samples of a group have the same prompt.
        target: `[B, C, H, W]`, the teacher's x0 of the same noise, where the sample started from a pair.
        decode: makes the pictures of a sample.
        advance: makes the next states of a sample.
        positions: the step of the rollout that each sample is trained at, from 0.
        num_steps: of the rollout.
        spread: makes the distributions of the next states around an x0 of a sample; None if the rollout draws no noise.
        finish: takes the next states of a sample to the ends of their rollouts.
        predict: predicts a sample's x0 with other weights of the generator.
    """

    x0: "Tensor"
    prompts: list[Any]
    condition: "Condition"
    draws: "Draws"
    step: int
    x_t: "Tensor"
    t: "Tensor"
    t_next: "Tensor"
    group: list[int]
    decode: "Callable[[Sample], Tensor]"
    advance: "Callable[[Sample], Tensor]"
    target: "Tensor | None" = None
    positions: "Sequence[int]" = ()
    num_steps: int = 1
    spread: "Callable[[Sample, Tensor], tuple[Tensor, Tensor]] | None" = None
    finish: "Callable[[Sample], Tensor] | None" = None
    predict: "Callable[[Sample, Mapping[str, Tensor]], Tensor] | None" = None

    @cached_property
    def pictures(self) -> "Tensor":
        """What rewards see, `[B, 3, H', W']` in [0, 1] with gradient; decoded once for all objectives.

        For objectives, the pictures begin a graph of their own; see `dmdr_train.training.picture_gradients`.
        """
        return self.decode(self)

    @cached_property
    def target_pictures(self) -> "Tensor":
        """The pictures of the target, with the crop and the resolution of `pictures`, without gradient."""
        import torch

        assert self.target is not None
        with torch.no_grad():
            return self.decode(replace(self, x0=self.target))

    @cached_property
    def next_state(self) -> "Tensor":
        """The states at `t_next`, `[B, C, H, W]` without gradient; x0 itself at the last step.

        In a stochastic rollout their noise comes from the sample's own draws, under the purpose "next_state".
        """
        return self.advance(self)

    def next_distribution(self, x0: "Tensor") -> "tuple[Tensor, Tensor]":
        """Mean `[B, C, H, W]` and standard deviation `[B, 1, 1, 1]` of the next states after a prediction x0 at `x_t`.

        `next_state` was drawn from the distribution of the sample's own x0. Gradients flow through x0. Only for a
        rollout that draws noise; at the last step the standard deviation is that of the process's end, and may be 0.
        """
        assert self.spread is not None
        return self.spread(self, x0)

    def x0_with(self, weights: "Mapping[str, Tensor]") -> "Tensor":
        """The x0 `[B, C, H, W]` that the generator predicts at `x_t` with other trained weights, without gradient.

        Args:
            weights: as `dmdr_train.distributed.frozen_weights.copy_weights` returns them.
        """
        assert self.predict is not None
        return self.predict(self, weights)

    @cached_property
    def final_x0(self) -> "Tensor":
        """The ends of the rollouts that go on from `next_state`, `[B, C, H, W]` without gradient.

        An objective that uses them has the need `final_x0`, or `final_pictures` if it uses these.
        """
        assert self.finish is not None
        return self.finish(self)

    @cached_property
    def final_pictures(self) -> "Tensor":
        """The pictures of `final_x0`, without gradient; decoded as `pictures` are, once for all objectives."""
        import torch

        with torch.no_grad():
            return self.decode(replace(self, x0=self.final_x0))
