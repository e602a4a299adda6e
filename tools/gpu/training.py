"""Rows that take training steps of the shipped recipes, with the same code as a run."""

import importlib.util
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from dmdr_train.distributed.process_group import start_processes
from dmdr_train.planning.at_start import plan_lines
from dmdr_train.recipe.load import BUILT_IN, load_recipe
from dmdr_train.recipe.schema import Recipe
from dmdr_train.run.build import build
from dmdr_train.run.runner import dry_run, with_automatic
from dmdr_train.training.make_pairs import make_pairs
from dmdr_train.training.trainer import Trainer

from gpu import folders, rewards
from gpu.measure import Bench
from gpu.plan import Measured
from gpu.weights import random_weights


def recipe(bench: Bench, name: str, batch: int, model: str, vae: str | None, changes: Sequence[str] = ()) -> Measured:
    """Build the trainer of a recipe as a run does, and take steps; only paths and batch are overridden.

    Without bitsandbytes the optimizer is torch's own AdamW, and nothing is quantised in 4 bits; on a CPU, fp32 replaces
    fp16, and nothing is compiled.

    Args:
        changes: further overrides of the recipe.
    """
    batch = min(batch, 2) if bench.tiny else batch
    settings = load_recipe(name, [*changes, *overrides(bench, load_recipe(name, changes), batch, model, vae)])
    start_processes(bench.device)
    settings = with_automatic(settings, bench.device)
    start = time.perf_counter()
    with built(bench, settings) as trainer:
        seconds = time.perf_counter() - start
        found = bench.measure(trainer.train_step, batch)
        if (executed := bench.kernels(trainer.train_step)) is not None:
            count, spent = executed
            found.notes += [f"{count} kernels", f"GPU busy {spent / found.seconds:.0%}"]
        if settings.memory.quantize == "nf4":
            found.flops = None  # torch does not count the operations of bitsandbytes
        found.notes += notes(settings, load_recipe(name, changes), trainer)
    found.more["build_seconds"] = seconds
    if bench.cuda:
        found.more["plan"] = plan_lines(settings, bench.device, 1)
    return found


def built_in_problems(bench: Bench) -> Measured:
    """Take the first step of every stage of each recipe of a built-in problem, as `run.py --dry-run` does.

    Pairs, where a recipe needs them, are drawn first. The rehearsal takes the recipe with pairs only.
    """
    start_processes(bench.device)
    recipes = {path.stem: load_recipe(path.stem) for path in sorted(BUILT_IN.glob("demo*.yaml"))}
    if bench.tiny:
        recipes = {name: settings for name, settings in recipes.items() if settings.data.pairs is not None}
    found = Measured(notes=[", ".join(recipes)])
    for name, settings in recipes.items():
        changes = [f"run.output={bench.work / 'run'}"]
        if settings.data.pairs is not None:
            pairs = bench.work / f"{name}-pairs"
            make_pairs(settings, pairs, count=settings.optim.batch_size, steps=2)
            changes.append(f"data.pairs={pairs}")
        logs = dry_run(load_recipe(name, changes))
        found.numbers |= {f"{name}: {key}": value for key, value in logs.items()}
    return found


@contextmanager
def built(bench: Bench, settings: Recipe, random: bool = True) -> Iterator[Trainer]:
    """Build the trainer of a recipe with random weights on the device instead of weights from files.

    The engines are destroyed at the end, since DeepSpeed's hooks would keep them in memory.
    """
    start_processes(bench.device)
    torch.manual_seed(0)
    with random_weights(bench.device) if random else nullcontext():
        made = build(settings, bench.device)
    try:
        yield made
    finally:
        for engine in (made.generator, made.guidance):
            engine.destroy()


def overrides(bench: Bench, shipped: Recipe, batch: int, model: str, vae: str | None) -> list[str]:
    """Return the changes to a shipped recipe, as on the command line."""
    values: dict[str, Any] = {
        "model.path": str(folders.model(bench, model)),
        "optim.batch_size": batch,
        "optim.accumulation": 1,
        "optim.eight_bit": shipped.optim.eight_bit and bench.cuda and bitsandbytes(),
        "run.output": str(bench.work / "run"),
        "run.init_from": None,
        "run.resume": "never",
    }
    if vae is not None:
        values["model.vae"] = str(folders.model(bench, vae))
    if shipped.data.prompts is not None:
        values["data.prompts"] = str(folders.prompts(bench))
        values["data.embeddings"] = str(folders.embeddings(bench, model))
        values["memory.offload_text_encoders"] = False
    if shipped.data.pairs is not None:
        values["data.pairs"] = str(folders.pairs(bench, model))
    if shipped.rollout.group_size > 1:
        values["rollout.group_size"] = batch
    if bench.tiny:
        values["guidance.ratio"] = 1
    if bench.tiny and shipped.model.resolution is not None:
        values["model.resolution"] = 32
    if shipped.optim.precision == "fp16" and bench.cpu:
        values["optim.precision"] = "fp32"
    if shipped.memory.quantize == "nf4" and not bitsandbytes():
        values["memory.quantize"] = None
    if bench.cpu:
        values["memory.compile"] = False
    for i, objective in enumerate(shipped.objectives):
        values |= {f"objectives.{i}.{key}": str(folders.vgg16(bench)) for key in objective.files}
    trained = shipped.needing("reward")
    for i, name in enumerate(shipped.names):
        if name in trained:
            checkpoint, options = rewards.files(bench, trained[name].reward.name)
            values[f"objectives.{i}.reward.checkpoint"] = str(checkpoint)
            values[f"objectives.{i}.reward.options"] = options
    return [f"{key}={json.dumps(value)}" for key, value in values.items()]


def bitsandbytes() -> bool:
    return importlib.util.find_spec("bitsandbytes") is not None


def notes(settings: Recipe, shipped: Recipe, trainer: Trainer) -> list[str]:
    """Return the notes for the table: differences from the recipe, and skipped updates."""
    found = [settings.optim.precision, f"{trainer.family.size[0]}²"]
    if shipped.optim.precision != settings.optim.precision:
        found[0] += f" for {shipped.optim.precision}"
    if shipped.optim.eight_bit != settings.optim.eight_bit:
        found.append("AdamW in 32 bits")
    found += memory_notes(settings, shipped)
    if shipped.data.prompts is not None:
        found.append("no text encoders")
    skipped = trainer.generator.skipped_steps + trainer.guidance.skipped_steps
    if skipped:
        found.append(f"{skipped} updates skipped by the loss scale")
    return found


def memory_notes(settings: Recipe, shipped: Recipe) -> list[str]:
    """Return the notes about `memory`: what was chosen, and what could not be done here."""
    asked, used = shipped.memory, settings.memory
    found = [f"checkpointed: {', '.join(used.gradient_checkpointing) or 'nothing'}"]
    if used.quantize is not None:
        found.append(used.quantize)
    elif asked.quantize is not None:
        found.append(f"not in {asked.quantize}")
    if asked.compile:
        found.append("compiled" if used.compile else "not compiled")
    return found
