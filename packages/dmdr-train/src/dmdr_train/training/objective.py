"""What an objective is: a term of the generator's loss, in a file with its recipe section.

    class Section(ObjectiveSection):
        strength: float = 1.0

    class Brightness(Objective):
        Section = Section

        def __call__(self, sample, guide):
            return self.settings.strength * sample.pictures.mean(), {}

An objective is registered as an entry point of the group `dmdr_objectives`; the entry point's name is the `kind` in
recipes. docs/extending.md has a whole example.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from dmdr_train.recipe.sections import ObjectiveSection
from dmdr_train.training.loss_weight import Weight

if TYPE_CHECKING:
    from torch import Tensor

    from dmdr_train.base.random_draws import Draws
    from dmdr_train.training.guide import Guide
    from dmdr_train.training.sample import Sample

NEEDS = {
    "fake_score": "the fake score is trained while the objective takes part; automatic weights can follow it",
    "reward": "the section has a `reward`, and the objective is given that reward",
    "reward_gradient": "the reward must have a gradient",
    "reward_of_texts": "the reward must read texts",
    "pairs": "samples start from `data.pairs`, and have a target",
    "discriminator": "the recipe has a `guidance.discriminator`, which is trained while the objective takes part",
    "groups": "samples come in groups of `rollout.group_size` with the same prompt",
    "group_positions": "the samples of a group are trained at the same step of their rollouts",
    "final_x0": "every rollout goes on to its end, for `sample.final_x0`",
    "final_pictures": "the same, for `sample.final_pictures`; `rollout.updates` may be more than 1",
    "reference": "the teacher predicts at the samples' own states, by `guide.reference`",
    "frozen_copy": "the generator predicts again at the samples' own states, with the weights that it began with",
    "final_sample": "samples are trained at the last step of the rollout, so that x0 is the final sample",
}
"""What an objective can need, and what the trainer and the checks do for it."""


class Objective(ABC):
    """A term of the generator's loss.

    Args:
        settings: the objective's section in the recipe.
        name: what logs call the objective: its kind, with a number where a recipe has several of the kind.
        reward: the reward of the section, for an objective that needs one.

    Attributes:
        Section: the class of the objective's recipe section.
        needs: what the objective needs, some of `NEEDS`; its section may add to them.
        weight: what the loss is multiplied by, at every step.
        failure: why the reward could not score the last sample; empty if it could.

    Raises:
        UserError: a file of the section cannot be used; names its key in the section.
    """

    Section: ClassVar[type[ObjectiveSection]] = ObjectiveSection
    needs: frozenset[str] | set[str] = frozenset()
    failure = ""

    def __init__(self, settings: Any, name: str, reward: Any = None):
        self.settings = settings
        self.name = name
        self.reward = reward
        self.weight = Weight(settings)
        self.needs = self.needs | getattr(settings, "also_needs", frozenset())

    @abstractmethod
    def __call__(self, sample: "Sample", guide: "Guide") -> "tuple[Tensor, Mapping[str, Tensor | float]]":
        """The unweighted loss, a scalar, and values to log by their names: scalar tensors, without graph, or numbers.

        An objective should not read a tensor, for example by `item()`: the CPU would wait for the device.

        The trainer takes the loss's gradients at `sample.x0` and at `sample.pictures`, which begin a graph of their
        own. It takes those at the pictures through the decoder, and sends the weighted sum of all objectives' gradients
        into the generator.
        """

    def begin(self, generator: Any) -> None:  # noqa: B027
        """Take what the objective keeps of the generator as it is before the step `settings.start`.

        The trainer calls this once in a run, on every process. A run that resumes later has `load_state_dict` instead.

        Args:
            generator: engine (or module) of the generator.
        """

    def state_dict(self) -> "dict[str, Tensor]":
        """What a checkpoint keeps of the objective besides its weight, the same on every process; here nothing."""
        return {}

    def load_state_dict(self, state: "Mapping[str, Tensor]") -> None:  # noqa: B027
        """Restore what `state_dict` returned, from tensors on the device of the training."""

    def score(self, pictures: "Tensor", prompts: "Sequence[Any]", draws: "Draws") -> "Tensor":
        """The scores `[B]` of pictures `[B, 3, H, W]` in [0, 1], which early warning follows: here the reward's own."""
        return self.reward.score(pictures, prompts)
