"""Online DPO: of a prompt's pictures, the best becomes more probable and the worst less, compared with the teacher."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from dmdr_train.objectives.group_rewards import GroupRewards, GroupRewardSection

if TYPE_CHECKING:
    from torch import Tensor

    from dmdr_train.training.guide import Guide
    from dmdr_train.training.sample import Sample


class DPOSection(GroupRewardSection):
    beta: Annotated[float, Field(gt=0)] = Field(
        default=10.0, description="how soon a pair that is already preferred to the reference's stops training"
    )


class DPO(GroupRewards):
    """−mean log sigmoid(β (d_best − d_worst)), with d = log p(x_s) − log p_ref(x_s) of one step of a rollout.

    Best and worst are of the final pictures in a group, by their rewards. A pair with equal rewards counts 0. p is the
    Gaussian density of the step that the sample is trained at, and p_ref the same with the teacher's x0 at the same
    state; both are of one dimension on average (`dmdr_core.gaussian_log_density`). d is 0 at the last step, which draws
    no noise, and past the first `steps`. As Diffusion-DPO draws one time, this draws one step for each of the two, or
    with `rollout.group_noise` for both: by Jensen's inequality the loss is an upper bound of that of whole rollouts,
    with β times their number of steps.

    The reference is the teacher: the generator as it began, without its LoRA. It needs neither a copy of the generator
    nor a state in the checkpoint. It only decides how much a pair counts, since its density has no gradient.

    Sources: DPO, arXiv 2305.18290; Diffusion-DPO, arXiv 2311.12908; for the steps of a rollout D3PO, arXiv 2311.13231.
    """

    Section = DPOSection
    needs = GroupRewards.needs | {"reference"}

    def __call__(self, sample: "Sample", guide: "Guide") -> "tuple[Tensor, Mapping[str, Tensor | float]]":
        import torch
        from dmdr_core import gaussian_log_density

        rewards, values = self.rewards(sample)
        poison = 1 + 0 * rewards.sum()
        trained = self.trained(sample)
        mean, std = sample.next_distribution(sample.x0)
        reference, _ = sample.next_distribution(guide.reference(sample))
        std = torch.where(trained.reshape(std.shape), std, 1.0)  # the last step has no density
        state = sample.next_state
        d = gaussian_log_density(state, mean, std) - gaussian_log_density(state, reference, std)
        by_group = (d * trained).reshape(rewards.shape)
        ranked = rewards.nan_to_num(0.0, 0.0, 0.0)
        best, worst = ranked.argmax(dim=1, keepdim=True), ranked.argmin(dim=1, keepdim=True)
        apart = (ranked.gather(1, best) > ranked.gather(1, worst)).flatten()
        margin = (by_group.gather(1, best) - by_group.gather(1, worst)).flatten()
        loss = -(torch.nn.functional.logsigmoid(self.settings.beta * margin) * apart).mean() * poison
        values[f"equal_pairs/{self.name}"] = 1 - apart.float().mean()
        values[f"preferred/{self.name}"] = (margin.detach() > 0).float().mean()
        return loss, values
