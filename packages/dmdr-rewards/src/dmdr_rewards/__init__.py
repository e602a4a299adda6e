"""Differentiable rewards for pictures: pictures and prompts in, one number per picture out, higher is better.

    reward = dmdr_rewards.create("hpsv2.1", checkpoint="HPS_v2.1_compressed.pt", device="cuda")
    scores = reward.score(images, prompts)  # float32 Tensor[B]

`available()` lists the names, `describe(name)` says what is behind one. `WeightedSum`, `Hinge` and `Relative` make
rewards of rewards. Conventions of pictures are at the top of `dmdr_rewards.images`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from dmdr_rewards.info import RewardInfo
from dmdr_rewards.registry import available, create, describe

if TYPE_CHECKING:
    from dmdr_rewards.compose import Hinge, Relative, Weighted, WeightedSum
    from dmdr_rewards.preprocess import Preprocess
    from dmdr_rewards.reward import Reward, TowerReward

__version__ = "0.1.0"
__all__ = [
    "Hinge",
    "Preprocess",
    "Relative",
    "Reward",
    "RewardInfo",
    "TowerReward",
    "Weighted",
    "WeightedSum",
    "available",
    "create",
    "describe",
]


def __getattr__(name: str) -> Any:
    # torch takes seconds to import, and the command line does without it until it has something to score.
    for module in ("compose", "preprocess", "reward") if name in __all__ else ():
        if hasattr(found := import_module(f"{__name__}.{module}"), name):
            return getattr(found, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
