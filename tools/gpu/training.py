"""Rows that take training steps of the shipped recipes, by the code that a run takes them with."""

import importlib.util
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from dmdr_train.distributed.process_group import start_processes
from dmdr_train.recipe.load import load_recipe
from dmdr_train.recipe.schema import Recipe, RewardObjective
from dmdr_train.run.build import Session, build

from gpu import folders, rewards
from gpu.measure import Bench
from gpu.plan import Measured
from gpu.weights import random_weights


def recipe(bench: Bench, name: str, batch: int, model: str, vae: str | None) -> Measured:
    """Build the recipe's session as a run does and take its steps; only paths and batch are overridden.

    Where there is no bitsandbytes the optimizer is torch's own AdamW, and on a CPU fp16 is fp32.
    """
    batch = min(batch, 2) if bench.tiny else batch
    settings = load_recipe(name, overrides(bench, load_recipe(name), batch, model, vae))
    start = time.perf_counter()
    with built(bench, settings) as session:
        seconds = time.perf_counter() - start
        found = bench.measure(session.trainer.train_step, batch)
        found.notes += notes(settings, load_recipe(name), session)
    found.more["build_seconds"] = seconds
    return found


@contextmanager
def built(bench: Bench, settings: Recipe, random: bool = True) -> Iterator[Session]:
    """The session of a recipe, with random weights on the device in the place of files.

    Its engines are destroyed when this ends: DeepSpeed's hooks would keep them in memory.
    """
    start_processes(bench.device)
    torch.manual_seed(0)
    with random_weights(bench.device) if random else nullcontext():
        made = build(settings, bench.device)
    try:
        yield made
    finally:
        for engine in (made.trainer.generator, made.trainer.guidance):
            engine.destroy()


def overrides(bench: Bench, shipped: Recipe, batch: int, model: str, vae: str | None) -> list[str]:
    """What of a shipped recipe is changed, as the command line would."""
    values: dict[str, Any] = {
        "model.path": str(folders.model(bench, model)),
        "optim.batch_size": batch,
        "optim.eight_bit": shipped.optim.eight_bit and eight_bit(bench),
        "run.output": str(bench.work / "run"),
        "run.init_from": None,
        "run.resume": "never",
    }
    if vae is not None:
        values["model.vae"] = str(folders.model(bench, vae))
    if shipped.data.prompts is not None:
        values["data.prompts"] = str(folders.prompts(bench))
        values["data.embeddings"] = str(folders.embeddings(bench, model))
    if shipped.data.pairs is not None:
        values["data.pairs"] = str(folders.pairs(bench, model))
    if bench.tiny:
        values["guidance.ratio"] = 1
    if bench.tiny and shipped.model.resolution is not None:
        values["model.resolution"] = 32
    if shipped.optim.precision == "fp16" and bench.cpu:
        values["optim.precision"] = "fp32"
    for i, objective in enumerate(shipped.objectives):
        if isinstance(objective, RewardObjective):
            checkpoint, options = rewards.files(bench, objective.reward.name)
            values[f"objectives.{i}.reward.checkpoint"] = str(checkpoint)
            values[f"objectives.{i}.reward.options"] = options
    return [f"{key}={json.dumps(value)}" for key, value in values.items()]


def eight_bit(bench: Bench) -> bool:
    """Whether there is an 8-bit optimizer."""
    return bench.cuda and importlib.util.find_spec("bitsandbytes") is not None


def notes(settings: Recipe, shipped: Recipe, session: Session) -> list[str]:
    """What the table must say of a row: how it differs from the recipe, and which updates were skipped."""
    found = [settings.optim.precision, f"{session.family.size[0]}²"]
    if shipped.optim.precision != settings.optim.precision:
        found[0] += f" for {shipped.optim.precision}"
    if shipped.optim.eight_bit != settings.optim.eight_bit:
        found.append("AdamW in 32 bits")
    if shipped.data.prompts is not None:
        found.append("no text encoders")
    skipped = session.trainer.generator.skipped_steps + session.trainer.guidance.skipped_steps
    if skipped:
        found.append(f"{skipped} updates skipped by the loss scale")
    return found
