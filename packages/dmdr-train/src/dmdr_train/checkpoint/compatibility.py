"""Compare a recipe with a checkpoint's recipe, and decide whether the run may resume."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dmdr_train.base.errors import UserError
from dmdr_train.base.versions import versions
from dmdr_train.checkpoint.input_fingerprints import fingerprints
from dmdr_train.checkpoint.manifest import RECIPE, read_manifest
from dmdr_train.recipe.load import flat, from_yaml, parse_recipe
from dmdr_train.recipe.schema import Recipe

# A resumed run may change these keys and everything below them, except FIXED_KEYS.
FREE_KEYS = (
    "run", "tracking", "watch", "memory", "optim.generator.lr", "optim.fake_score.lr", "optim.accumulation",
    "model.generator_lora.start",
)  # fmt: skip
FIXED_KEYS = (
    "run.seed", "memory.reward_crop", "memory.reward_scale", "memory.vae_tiling", "memory.shared_backbone",
    "memory.offload_optimizer", "memory.offloaded_adam", "memory.quantize",
    *(
        f"tracking.evaluation.{name}"
        for name in (
            "classifier", "reference", "features", "prompt_files", "per_prompt", "pictures", "labels",
            "rewards", "seed",
        )
    ),
)  # fmt: skip
OPTIMIZER_KEYS = ("optim.precision", "optim.zero_stage", "optim.eight_bit", "memory.offloaded_adam")
"""What the form of an optimizer's saved state depends on, besides the shapes of the weights."""
SILENT_KEYS = ("run.resume", "run.output")


@dataclass(frozen=True)
class Change:
    """The difference between a recipe and a checkpoint's recipe at one key."""

    key: str
    kind: Literal["changed", "moved", "must not change"]
    difference: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.key} {self.difference}"


def check_moments(settings: Recipe, path: Path) -> None:
    """Check that the optimizers of a recipe can take the moments of a checkpoint's.

    Raises:
        UserError: they are of another form, or the checkpoint's recipe cannot be read.
    """
    saved, asked = saved_recipe("run.init_from", path), flat(settings.model_dump(mode="json"))
    for key in OPTIMIZER_KEYS:
        if saved.get(key) != asked[key]:
            raise UserError(
                "run.init_moments",
                f"{path} has {key} {saved.get(key)} and this run {asked[key]}; use the same, or init_moments: false",
            )


def saved_recipe(key: str, path: Path) -> dict[str, Any]:
    """Return the values of a checkpoint's recipe by their dotted keys.

    Raises:
        UserError: it cannot be read.
    """
    try:
        return flat(completed(from_yaml((path / RECIPE).read_text(encoding="utf-8"))))
    except (ValueError, OSError) as error:
        raise UserError(key, f"{path / RECIPE} is damaged ({error}); give another checkpoint") from None


def changes(settings: Recipe, path: Path) -> list[Change]:
    """Return the differences between a recipe and a checkpoint's recipe, sorted by key.

    Inputs (`dmdr_train.checkpoint.input_fingerprints`) are compared by their contents: an input may move, but it must
    not change.

    Raises:
        UserError: the checkpoint's recipe or an input cannot be read.
    """
    saved = saved_recipe("run.resume", path)
    asked = flat(settings.model_dump(mode="json"))
    before, now = read_manifest("run.resume", path).get("inputs", {}), fingerprints(settings)
    replaced = {key for key in before.keys() & now.keys() if before[key] != now[key]}
    same = before.keys() & now.keys() - replaced
    found = []
    for key in sorted(saved.keys() | asked.keys() | replaced):
        if key in SILENT_KEYS or (saved.get(key) == asked.get(key) and key not in replaced):
            continue
        difference = f"is {asked.get(key)} here and {saved.get(key)} in {path}"
        if key in replaced:
            found.append(Change(key, "must not change", f"{difference}, with other contents"))
        elif key in same:
            found.append(Change(key, "moved", difference))
        else:
            switched = key.startswith("tracking.evaluation") and not (key in saved and key in asked)
            found.append(Change(key, "changed" if switched or _free(key) else "must not change", difference))
    return found


def check_same_base(settings: Recipe, source: Path) -> None:
    """Check that the LoRAs of `run.init_from` go onto the weights that they were trained on. Imports no torch.

    The fake score is always a LoRA, on the teacher; the generator is one if the recipe has `model.generator_lora`.
    Weights are compared by their contents, so that they may have moved.

    Raises:
        UserError: `model.path`, a LoRA of the teacher, its strength, or `model.generator` is not that of the other run.
    """
    before, model = read_manifest("run.init_from", source).get("inputs", {}), settings.model
    if not before:
        return
    now, saved, asked = fingerprints(settings), saved_recipe("run.init_from", source), flat(settings.model_dump())
    for key in sorted(before.keys() | now.keys()):
        base = key == "model.path" or key.startswith("model.teacher_loras.")
        base |= key == "model.generator" and model.generator_lora is not None
        if base and before.get(key) != now.get(key):
            fix = f"give that run's, {saved[key]}" if saved.get(key) else "leave it out"
            raise UserError(key, f"is {asked.get(key)}, and run.init_from {source} was trained on other weights; {fix}")
    for i, lora in enumerate(model.teacher_loras):
        key = f"model.teacher_loras.{i}.strength"
        if saved.get(key) != lora.strength:
            raise UserError(key, f"is {lora.strength}, and {saved.get(key)} in run.init_from {source}; set it to that")


def completed(saved: Any) -> Any:
    """A saved recipe with the defaults of the keys that it lacks, since an earlier version did not know them.

    A recipe that this version cannot read as a whole stays as it is.
    """
    try:
        return parse_recipe(saved).model_dump(mode="json")
    except UserError:
        return saved


def compare(settings: Recipe, path: Path, say: Callable[[str], None]) -> None:
    """Print how a recipe differs from a checkpoint's, and refuse to resume if that would change the results.

    Raises:
        UserError: for the first key that must not differ; all differences are printed before.
    """
    found, manifest = changes(settings, path), read_manifest("run.resume", path)
    for change in found:
        say(str(change))
    if settings.run.steps < manifest["step"]:
        fix = "give at least that, or an earlier one as run.resume"
        raise UserError("run.steps", f"{settings.run.steps} is below the step of {path}; {fix}")
    for package, version in manifest.get("versions", {}).items():
        if versions().get(package) != version:
            say(f"changed: {package} is {versions().get(package)} here and {version} in {path}")
    world, wrote = int(os.environ.get("WORLD_SIZE", "1")), manifest["world_size"]
    if world != wrote:
        say(f"changed: the number of processes is {world} here and {wrote} in {path}")
        if settings.optim.eight_bit:  # its blocks of numbers span the borders of the processes' shares
            raise UserError("optim.eight_bit", f"true needs the {wrote} processes of {path}; start {wrote}")
    for change in found:
        if change.kind == "must not change":
            fix = "set it back, or start a new run with another run.output"
            raise UserError(change.key, f"{change.difference}; {fix}")


def _free(key: str) -> bool:
    fixed, free = (any(key == k or key.startswith(f"{k}.") for k in keys) for keys in (FIXED_KEYS, FREE_KEYS))
    return free and not fixed
