"""Which checkpoint a run goes on from: whole, undamaged, and of a recipe that it may go on with."""

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dmdr_rewards.untrusted import from_json, inside

from dmdr_train.base.atomic_files import fingerprint
from dmdr_train.base.errors import UserError, naming
from dmdr_train.base.versions import versions
from dmdr_train.checkpoint.input_fingerprints import fingerprints
from dmdr_train.recipe.load import flat, from_yaml, is_number
from dmdr_train.recipe.schema import Recipe

MANIFEST, RECIPE = "manifest.json", "recipe.yaml"
GENERATOR, STUDENT, FAKE_SCORE = "generator.safetensors", "student.safetensors", "fake_score.safetensors"
ALWAYS = (RECIPE, GENERATOR, STUDENT, FAKE_SCORE)
"""Files that every checkpoint has, beside DeepSpeed's."""
# What a resumed run may change: these keys, and everything below them.
FREE_KEYS = (
    "run", "tracking", "watch", "memory", "optim.generator.lr", "optim.fake_score.lr", "optim.accumulation",
)  # fmt: skip
FIXED_KEYS = (
    "run.seed", "memory.reward_crop", "memory.reward_scale", "memory.vae_tiling", "memory.shared_backbone",
    "memory.offload_optimizer",
    *(f"tracking.evaluation.{name}" for name in ("classifier", "reference", "pictures", "rewards", "seed")),
)  # fmt: skip
SILENT_KEYS = ("run.resume", "run.output")


def find_checkpoint(settings: Recipe, say: Callable[[str], None] = print) -> Path | None:
    """The checkpoint that `run.resume` asks for; None to start afresh.

    `auto` takes the newest that is undamaged. What differs from its recipe is said, a line for each key; then its path.

    Raises:
        UserError: a given path holds no checkpoint, a damaged one, or one of a run that this recipe cannot go on with;
            or `auto` finds damaged ones alone.
    """
    choice = settings.run.resume
    if choice == "never":
        return None
    if choice == "auto":
        path = newest_whole(checkpoints_in(Path(settings.run.output) / "checkpoints"), say)
    else:
        path = newest_verified("run.resume", choice)
    if path is not None:
        compare(settings, path, say)
        say(f"going on from {path}")
    elif (Path(settings.run.output) / RECIPE).exists():
        say(f"warning: {settings.run.output} has no checkpoint; the run begins again, at step 0")
    return path


def checkpoints_in(folder: Path) -> list[Path]:
    """The checkpoints in a folder, oldest first; they were whole when they got their names."""
    return sorted(path for path in folder.glob("step-*") if is_number(path.name.removeprefix("step-")))


def step_of(checkpoint: Path) -> int:
    """The step at which a checkpoint was written, by its name."""
    return int(checkpoint.name.removeprefix("step-"))


def run_of(checkpoint: Path) -> Path | None:
    """The folder of the run that a checkpoint stands in; None for one that was put elsewhere."""
    folder = checkpoint.absolute().parent
    return folder.parent if folder.name == "checkpoints" else None


def newest(key: str, text: str) -> Path:
    """The checkpoint at a path: itself, or the newest in a folder of checkpoints or in a run's folder."""
    folder = Path(text)
    for candidate in (folder, *reversed(checkpoints_in(folder)), *reversed(checkpoints_in(folder / "checkpoints"))):
        if (candidate / MANIFEST).is_file():
            return candidate
    raise UserError(key, f"{text} holds no checkpoint; give one of step-*, or start without it")


def newest_verified(key: str, text: str) -> Path:
    """The same, and undamaged."""
    path = newest(key, text)
    verify(key, path)
    return path


def newest_whole(found: list[Path], say: Callable[[str], None]) -> Path | None:
    """The last of these that is undamaged; every damaged one is said.

    Raises:
        UserError: all are damaged, and a start at step 0 would not be what was meant.
    """
    for path in reversed(found):
        try:
            verify("run.resume", path)
        except UserError as error:
            say(f"warning: {str(error).partition(';')[0]}; falling back to the checkpoint before")
        else:
            return path
    if found:
        raise UserError("run.resume", f"every checkpoint in {found[0].parent} is damaged; give another run.output")
    return None


def signed(manifest: dict[str, Any]) -> dict[str, Any]:
    """A manifest with the sha256 of all that it says."""
    said = {name: value for name, value in manifest.items() if name != "sha256"}
    return {**said, "sha256": hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()}


def read_manifest(key: str, path: Path) -> dict[str, Any]:
    """manifest.json of a checkpoint.

    Raises:
        UserError: it is no such thing, or has changed since it was written.
    """
    try:
        manifest = from_json((path / MANIFEST).read_bytes())
        if _is_manifest(manifest) and manifest == signed(manifest):
            return manifest
    except (ValueError, OSError):
        pass
    raise UserError(key, f"{path / MANIFEST} is damaged; give another checkpoint")


def _is_manifest(found: Any) -> bool:
    kinds = {"step": int, "world_size": int, "weights": dict, "files": dict}
    if not isinstance(found, dict) or not all(isinstance(found.get(name), kind) for name, kind in kinds.items()):
        return False
    pairs = [pair if isinstance(pair, list) else [] for pair in found["weights"].values()]
    numbers = all(len(pair) == 2 and all(isinstance(each, float | int) for each in pair) for pair in pairs)
    others = all(isinstance(found.get(name, {}), dict) for name in ("versions", "inputs"))
    return numbers and others and found["step"] >= 0 and found["world_size"] > 0


def verify(key: str, path: Path) -> None:
    """Check that a checkpoint has all its files, and that each is as its manifest says.

    Raises:
        UserError: names the first file that is missing or differs.
    """
    files = read_manifest(key, path)["files"]
    with naming(key):
        named = {name: inside(path, name) for name in sorted({*files, *ALWAYS})}
    for name, file in named.items():
        if name not in files or not os.path.isfile(file):
            raise UserError(key, f"{file} is missing; give another checkpoint")
        try:
            found = fingerprint(file)
        except OSError as error:
            raise UserError(key, f"{file} cannot be read ({error.strerror}); give another checkpoint") from None
        if found != files[name]:
            raise UserError(key, f"{file} is damaged; give another checkpoint")


@dataclass(frozen=True)
class Change:
    """What differs between a recipe and that of a checkpoint, at one key."""

    key: str
    kind: Literal["changed", "moved", "must not change"]
    difference: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.key} {self.difference}"


def changes(settings: Recipe, path: Path) -> list[Change]:
    """What differs between a recipe and that of a checkpoint, by key.

    An input (`dmdr_train.checkpoint.input_fingerprints`) is judged by what it holds: it may move, and must not change.

    Raises:
        UserError: the checkpoint's recipe cannot be read, or an input.
    """
    try:
        saved = flat(from_yaml((path / RECIPE).read_text(encoding="utf-8")))
    except (ValueError, OSError) as error:
        raise UserError("run.resume", f"{path / RECIPE} is damaged ({error}); give another checkpoint") from None
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


def compare(settings: Recipe, path: Path, say: Callable[[str], None]) -> None:
    """Say how a recipe differs from a checkpoint's, and refuse to go on where that is not harmless.

    Raises:
        UserError: for the first key that must not differ; all are said before.
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
        if settings.optim.eight_bit:  # its blocks of numbers do not end where the shares of processes do
            raise UserError("optim.eight_bit", f"true keeps the number of processes, {wrote} in {path}; start {wrote}")
    for change in found:
        if change.kind == "must not change":
            fix = "set it back, or start a new run with another run.output"
            raise UserError(change.key, f"{change.difference}; {fix}")


def _free(key: str) -> bool:
    return key not in FIXED_KEYS and any(key == k or key.startswith(f"{k}.") for k in FREE_KEYS)
