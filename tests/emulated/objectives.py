"""Each objective, and each choice of guidance, rollout and memory, takes its steps on the device.

No backward pass may run in this process itself; it forks a process for every case.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import dmdr_models
import dmdr_train
import pytest
import torch
from dmdr_train.data.real_pictures import made_with, pictures_folder
from dmdr_train.recipe.schema import Model
from mix_ups import attempt, folder, of_labels, of_noise_levels, of_texts

__all__ = ["folder"]

SCENES = Path(dmdr_train.__file__).parent / "problems/scenes/reward"
CLIP = {
    "name": "clip",
    "checkpoint": str(SCENES / "open_clip_model.safetensors"),
    "options": {"model": str(SCENES / "open_clip_config.json")},
}
MATCHING = {"kind": "distribution_matching"}
GROUPS = {"steps": 2, "mode": "cps", "group_size": 2, "group_noise": "all"}


def of_rewards(kind: str, *others: dict[str, Any], **rollout: Any) -> Callable[[Path], dict[str, Any]]:
    """A recipe for a SiT with an objective of a reward that begins at the second step."""

    def recipe(folder: Path) -> dict[str, Any]:
        reward = {"kind": kind, "start": 1, "reward": {"name": "class-label", "checkpoint": str(folder / "classifier")}}
        return {**of_labels(folder), "objectives": [MATCHING, reward, *others], "rollout": rollout}

    return recipe


def with_guidance(*objectives: dict[str, Any], **guidance: Any) -> Callable[[Path], dict[str, Any]]:
    """A recipe for a SiT without a reward."""

    def recipe(folder: Path) -> dict[str, Any]:
        found = of_labels(folder)
        found |= {"objectives": list(objectives or [MATCHING]), "guidance": {**found["guidance"], **guidance}}
        return found | {"rollout": {"steps": 2, "mode": "ode"}}

    return recipe


def with_steps(folder: Path) -> dict[str, Any]:
    """A recipe for an SD3 with a LoRA for each step, and gradients through both."""
    found = of_texts(folder)
    found["model"] = {**found["model"], "generator_lora": {"rank": 2, "alpha": 2, "per_step": True}}
    return found | {"rollout": {"steps": 2, "mode": "ode", "through": True}}


def with_final_pictures(folder: Path) -> dict[str, Any]:
    """A recipe for an SD3 with a reward of texts at the ends of rollouts."""
    aligned = {"kind": "direct_align", "start": 1, "weight": 1.0, "reward": CLIP}
    return {**of_texts(folder), "objectives": [MATCHING, aligned]}


def with_adversarial_groups(folder: Path) -> dict[str, Any]:
    """A recipe for a SiT whose policy gradient has a discriminator as its reward."""
    found = with_guidance(MATCHING, {"kind": "adversarial_grpo"}, discriminator={"teacher_steps": 2})(folder)
    return found | {"rollout": GROUPS}


def with_real_pictures(folder: Path) -> dict[str, Any]:
    """A recipe for a SiT with an adversarial term on stored pictures."""
    found = with_guidance(MATCHING, {"kind": "adversarial"}, discriminator={"teacher_steps": None})(folder)
    model, shards = Model(**found["model"]), pictures_folder("data.pictures", folder / "pictures")
    rows = torch.zeros(2, *dmdr_models.load("sit", model.path).latent_shape(32, 32))
    shards.prepare(made_with(model))
    shards.write(shards.plan(2, 2), lambda numbers, done: ({"x0": rows}, {"prompts": "[0, 1]"}), lambda: 0)
    return found | {"data": {"pictures": str(shards.path)}}


def with_memory(recipe: Callable[[Path], dict[str, Any]], **memory: Any) -> Callable[[Path], dict[str, Any]]:
    """A recipe with other means of saving memory."""
    return lambda folder: {**recipe(folder), "memory": memory}


RECIPES: dict[str, Callable[[Path], dict[str, Any]]] = {
    "decoupled": with_guidance({"kind": "decoupled_matching"}),
    "advantage": of_rewards("advantage_matching", steps=2, group_size=2),
    "sub-interval": with_guidance(renoise_from="next_state"),
    "alignment": with_guidance(alignment={}),
    "adversarial": with_guidance(MATCHING, {"kind": "adversarial"}, discriminator={"teacher_steps": 2}),
    "adversarial grpo": with_adversarial_groups,
    "real pictures": with_real_pictures,
    "divergence": with_guidance({**MATCHING, "divergence": "jeffreys"}, discriminator={"teacher_steps": 2}),
    "grpo": of_rewards("grpo", **GROUPS),
    "dpo": of_rewards("dpo", **GROUPS),
    "final refl": of_rewards("final_refl", steps=2, mode="ode"),
    "kl": of_rewards("refl", {"kind": "kl_to_start", "start": 1}, steps=2, mode="sde"),
    "direct align": with_final_pictures,
    "two steps": with_steps,
    "every second block": with_memory(of_texts, gradient_checkpointing=["network/2"]),
    "int8": with_memory(of_texts, quantize="int8"),
    "fp8": with_memory(of_texts, quantize="fp8"),
    "channels last": with_memory(of_noise_levels, channels_last=True),
}


@pytest.mark.parametrize("name", RECIPES)
def test_the_steps_are_taken(folder: Path, name: str) -> None:
    assert attempt(RECIPES[name](folder), None) == ""
