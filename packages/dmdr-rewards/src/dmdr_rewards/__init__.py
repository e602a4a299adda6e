"""Differentiable rewards for pictures: pictures and prompts in, one number per picture out, higher is better.

    reward = dmdr_rewards.create("hpsv2.1", checkpoint="HPS_v2.1_compressed.pt", device="cuda")
    scores = reward.score(images, prompts)  # float32 Tensor[B]

`available()` lists the names, and `describe(name)` returns what is known about one. `WeightedSum`, `Hinge` and
`Relative` combine rewards. The module `dmdr_rewards.pictures.images` documents the accepted forms of pictures.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from dmdr_rewards.interface.info import RewardInfo
from dmdr_rewards.interface.registry import available, create, describe

if TYPE_CHECKING:
    from dmdr_rewards.compose import Hinge, Relative, Weighted, WeightedSum
    from dmdr_rewards.interface.reward import Reward, TowerReward
    from dmdr_rewards.pictures.preprocess import Preprocess

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
_NEEDS_TORCH = {
    "Hinge": "compose",
    "Preprocess": "pictures.preprocess",
    "Relative": "compose",
    "Reward": "interface.reward",
    "TowerReward": "interface.reward",
    "Weighted": "compose",
    "WeightedSum": "compose",
}
"""The public names whose module imports torch, and that module."""


def __getattr__(name: str) -> Any:
    # torch takes seconds to import, and the command line does without it until there is something to score.
    if name in _NEEDS_TORCH:
        return getattr(import_module(f"{__name__}.{_NEEDS_TORCH[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
