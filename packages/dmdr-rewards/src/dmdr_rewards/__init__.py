"""Differentiable rewards for pictures: pictures and prompts in, one number per picture out, higher is better.

    reward = dmdr_rewards.create("dinov2", checkpoint="backbone.pth", head="head.pth", device="cuda")
    scores = reward.score(images, labels)  # float32 Tensor[B]

`available()` lists the names. Conventions of pictures are at the top of `dmdr_rewards.images`.
"""

from dmdr_rewards.registry import available, create
from dmdr_rewards.reward import Reward, RewardInfo

__version__ = "0.1.0"
__all__ = ["Reward", "RewardInfo", "available", "create"]
