"""The files of a checkpoint: one folder, which is complete or does not exist.

    checkpoints/step-00000150/
        generator/, guidance/     DeepSpeed's state of the two engines
        average-rank0.safetensors the averaged weights; if ZeRO-3 splits them, one file per process
        generator.safetensors     all trained weights of the generator
        student.safetensors       the same weights, averaged; export uses them
        fake_score.safetensors    the LoRA of the guidance network
        discriminator.safetensors the discriminator and its optimizer; only if the recipe has one
        objective-NAME.safetensors what an objective keeps; only if it keeps something
        recipe.yaml
        metrics.jsonl             rows that could not be written to the run's own file; only if there are such rows
        manifest.json             step, world size, the norms behind automatic weights, versions of packages,
                                  fingerprints of the inputs, size and sha256 of every file including the recipe, and
                                  the sha256 of all this; written last

A run has neither a random state nor a data position to save: its step is enough. See `dmdr_train.base.random_draws`
and `dmdr_train.data.prompt_order`.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from dmdr_rewards.base.safe_reading import from_json, inside

from dmdr_train.base.atomic_files import fingerprint
from dmdr_train.base.errors import UserError, naming

MANIFEST, RECIPE = "manifest.json", "recipe.yaml"
GENERATOR, STUDENT, FAKE_SCORE = "generator.safetensors", "student.safetensors", "fake_score.safetensors"
DISCRIMINATOR = "discriminator.safetensors"
OBJECTIVE = "objective-{}.safetensors"
ALWAYS = (RECIPE, GENERATOR, STUDENT, FAKE_SCORE)
"""Files that every checkpoint has, besides DeepSpeed's."""
ENGINES = ("generator", "guidance")
"""Folders with DeepSpeed's files; each has the name of its engine, an attribute of `Trainer`."""


def signed(manifest: dict[str, Any]) -> dict[str, Any]:
    """Return a manifest with the sha256 of its contents added."""
    said = {name: value for name, value in manifest.items() if name != "sha256"}
    return {**said, "sha256": hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()}


def read_manifest(key: str, path: Path) -> dict[str, Any]:
    """Return the contents of a checkpoint's manifest.json.

    Raises:
        UserError: it is not a manifest, or has changed since it was written.
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
    """Check that a checkpoint has all its files, with the sizes and sha256 sums of its manifest.

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
