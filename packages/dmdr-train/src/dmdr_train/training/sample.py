"""What the generator made, and how: all that an objective is given of it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from dmdr_models.families.protocols import Condition
    from torch import Tensor

    from dmdr_train.base.random_draws import Draws

T = TypeVar("T")


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
        again: an earlier update has trained at the same states; see `dmdr_train.training.rollouts.Rollouts`.
        kept: what `once` has made, the same for all updates of a rollout.
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
    again: bool = False
    kept: dict[str, Any] = field(default_factory=dict)

    def once(self, name: str, make: "Callable[[], T]") -> "T":
        """What `make` returns in the first update of a rollout; the same in all later updates.

        Args:
            name: of the value; an objective's own values have its name in it, as in `rewards/grpo`.
            make: returns tensors without graph.
        """
        if name not in self.kept:
            self.kept[name] = make()
        return self.kept[name]

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

        In a stochastic rollout their noise comes from the draws of the rollout, under the purpose "next_state". They
        were drawn from the x0 of the rollout's first update, and stay as they are in later ones.
        """
        return self.advance(self)

    def next_distribution(self, x0: "Tensor") -> "tuple[Tensor, Tensor]":
        """Mean `[B, C, H, W]` and standard deviation `[B, 1, 1, 1]` of the next states after a prediction x0 at `x_t`.

        `next_state` was drawn from the distribution of the x0 in the rollout's first update. Gradients flow through
        x0. Only for a rollout that draws noise; at the last step the standard deviation is that of the process's end,
        and may be 0.
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
        """The ends of the rollouts that go on from `next_state`, `[B, C, H, W]` without gradient; made once a rollout.

        An objective that uses them has the need `final_x0`, or `final_pictures` if it uses these.
        """
        finish = self.finish
        assert finish is not None
        return self.once("final_x0", lambda: finish(self))

    @cached_property
    def final_pictures(self) -> "Tensor":
        """The pictures of `final_x0`, without gradient; decoded as `pictures` are, once for all objectives."""
        import torch

        with torch.no_grad():
            return self.decode(replace(self, x0=self.final_x0))
