"""Rows that compare: the GPU with the CPU, a resumed run with an uninterrupted one, one network with two."""

import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from dmdr_train.checkpoint.load import load_checkpoint
from dmdr_train.checkpoint.save import Saving
from dmdr_train.distributed.averaged_weights import Average
from dmdr_train.distributed.deepspeed_engine import adamw, learning_rate
from dmdr_train.distributed.process_group import start_processes
from dmdr_train.recipe.load import load_recipe
from dmdr_train.recipe.schema import Optim, Optimizer, Recipe
from dmdr_train.run import build
from dmdr_train.training.trainer import Trainer
from torch import Tensor, nn

from gpu import training
from gpu.measure import Bench
from gpu.plan import Measured

Logs = dict[str, float]

DEMO_TOLERANCE = 0.01
"""Relative tolerance of the demo's losses.

By default a GPU convolves in TF32, whose numbers have ten bits. With such rounding, a CPU's losses of these four steps
differ by 2.3e-3 from its usual ones; another order of sums alone changes them by less than 1e-5.
"""
BF16_TOLERANCE = 2**-8
"""Tolerance of one backbone against two: a unit in the last place of bfloat16, if kernels add in another order."""


class DisagreementError(Exception):
    """Raised if two computations that should agree do not."""


def demo(bench: Bench) -> Measured:
    """Compare four steps of the built-in problem with the same steps on the CPU; the reward joins at the third.

    On the CPU torch's own optimizer takes the steps, since DeepSpeed supports only one device in a process.

    Raises:
        DisagreementError: a loss differs by more than `DEMO_TOLERANCE`.
    """
    shared = ["objectives.1.start=2", f"run.output={bench.work / 'run'}", "run.resume=never"]
    settings = load_recipe("demo", shared)
    start_processes(bench.device)
    here = steps(build.build(settings, bench.device), 4)
    with mock.patch.object(build, "make_engine", PlainEngine):
        there = steps(build.build(settings, torch.device("cpu")), 4)
    compare_losses(here, there, DEMO_TOLERANCE)
    lines = [f"step {i}: {pairs_of(a, b)}" for i, (a, b) in enumerate(zip(here, there, strict=True))]
    notes = [f"{bench.device.type} beside plain torch on the cpu, at most {worst(here, there):.1e} apart", lines[-1]]
    return Measured(settings.optim.batch_size, numbers=here[-1], notes=notes, more={"losses": lines})


class PlainEngine:
    """The part of a DeepSpeed engine that the trainer uses, with torch alone, in float32."""

    skipped_steps = 0

    def __init__(
        self, network: nn.Module, optim: Optim, settings: Optimizer, updates: int, device: Any, offload: bool = False
    ):
        self.module, self.clip = network, optim.clip
        self.trained = [p for p in network.parameters() if p.requires_grad]
        rates: dict[str, Any] = {"lr": settings.lr, "betas": settings.betas, "eps": settings.eps}
        self.optimizer = adamw(False)(self.trained, **rates, weight_decay=settings.weight_decay)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, learning_rate(settings, updates))

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        return self.module(*inputs, **named)

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self) -> None:
        nn.utils.clip_grad_norm_(self.trained, self.clip)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()


def resumed(bench: Bench) -> Measured:
    """Compare four steps of a tiny SD3 with two steps, a checkpoint, and two more steps in a new session, bit for bit.

    Torch's deterministic algorithms are switched on.

    Raises:
        DisagreementError: a weight or a loss differs.
    """
    settings = tiny_sd3(bench)
    folder = bench.work / "checkpoints"
    shutil.rmtree(folder, ignore_errors=True)
    with deterministic():
        with training.built(bench, settings, random=False) as whole:
            steps(whole, 2)
            middle = weights(whole)
            average = Average(whole.generator, settings.optim.ema)
            path = Saving(folder, settings, whole, average).finish()
            expected, end = steps(whole, 2), weights(whole)
        with training.built(bench, settings, random=False) as again:
            load_checkpoint(path, again, Average(again.generator, settings.optim.ema))
            found = steps(again, 2)
            compare_losses(found, expected, 0.0)
            compare_bits(weights(again), end)
    if not moved(end, middle):
        raise DisagreementError("no weight changed after the checkpoint, so equal weights prove nothing")
    notes = ["tiny SD3, bf16, ZeRO-2", "weights equal bit for bit", "deterministic algorithms"]
    return Measured(settings.optim.batch_size, numbers=found[-1], notes=notes)


def one_backbone(bench: Bench) -> Measured:
    """Compare the losses of three steps of a tiny SD3 in bf16, with two adapters on one network and on two.

    Raises:
        DisagreementError: a loss differs by more than `BF16_TOLERANCE`.
    """
    found = []
    for shared in (True, False):
        settings = tiny_sd3(bench, f"memory.shared_backbone={str(shared).lower()}")
        with training.built(bench, settings, random=False) as made:
            found.append(steps(made, 3))
    compare_losses(*found, BF16_TOLERANCE)
    notes = ["tiny SD3, bf16", f"at most {worst(*found):.1e} apart"]
    return Measured(settings.optim.batch_size, numbers=found[0][-1], notes=notes)


def overflow(bench: Bench) -> Measured:
    """Check that both engines skip an update with a loss scale that is too large for fp16, and then train on.

    A CPU does not train in fp16. There the check uses a weight whose square is too large for fp32.

    Raises:
        DisagreementError: an update was made, or none is made afterwards.
    """
    shipped = load_recipe("sdxl-1step-cold-start")
    changes = ["guidance.ratio=1", "optim.generator.lr=1e-3", "optim.fake_score.lr=1e-3"]
    values = training.overrides(tiny(bench), shipped, 2, "sdxl-base", "taesdxl")
    settings = load_recipe("sdxl-1step-cold-start", [*values, *changes])
    with training.built(bench, settings, random=False) as made:
        logs = settled(made)
        with too_large(bench, engines(made)):
            before, skipped = weights(made), skips(made)
            made.train_step()
            compare_bits(weights(made), before)
        if idle := [name for name, count in skips(made).items() if count == skipped[name]]:
            raise DisagreementError(f"{' and '.join(idle)} did not skip the update that overflowed")
        before = weights(made)
        if not any(made.train_step() and moved(weights(made), before) for _ in range(5)):
            raise DisagreementError("no weight moves in five steps after the overflow")
    kind = "fp32 for fp16, a weight of 1e30" if bench.cpu else "a loss scale of 2^60"
    return Measured(2, numbers=logs, notes=["tiny SDXL", kind, "both updates skipped, weights unchanged"])


def settled(made: Trainer) -> Logs:
    """Train until a step is not skipped, that is, until the loss scale is low enough for these weights."""
    for _ in range(20):
        skipped = skips(made)
        logs = made.train_step()
        if skips(made) == skipped:
            return logs
    raise DisagreementError("twenty steps in a row were skipped before the planned overflow")


def engines(made: Trainer) -> dict[str, Any]:
    return {"generator": made.generator, "fake_score": made.guidance}


def skips(made: Trainer) -> dict[str, int]:
    """Return the number of updates that each engine has skipped so far."""
    return {name: engine.skipped_steps for name, engine in engines(made).items()}


@contextmanager
def too_large(bench: Bench, asked: Mapping[str, Any]) -> Iterator[None]:
    """Make every engine's next update overflow inside the context; restore everything afterwards."""
    if not bench.cpu:
        scales = {name: engine.optimizer.loss_scale for name, engine in asked.items()}
        for engine in asked.values():
            engine.optimizer.loss_scale = 2.0**60
        yield
        for name, engine in asked.items():
            engine.optimizer.loss_scale = scales[name]
        return
    trained = [next(p for p in engine.module.parameters() if p.requires_grad) for engine in asked.values()]
    kept = [parameter.detach().clone() for parameter in trained]
    with torch.no_grad():
        for parameter in trained:
            parameter.fill_(1e30)
    yield
    with torch.no_grad():
        for parameter, old in zip(trained, kept, strict=True):
            parameter.copy_(old)


def tiny_sd3(bench: Bench, *changes: str) -> Recipe:
    """Return SD3-Medium's cold start recipe for a tiny SD3 from files, with learning rates that show in two steps."""
    name = "sd3-medium-cold-start"
    values = training.overrides(tiny(bench), load_recipe(name), 2, "sd3-medium", None)
    rates = ["guidance.ratio=2", "optim.generator.lr=1e-3", "optim.fake_score.lr=1e-3", "optim.eight_bit=false"]
    return load_recipe(name, [*values, *rates, *changes])


def tiny(bench: Bench) -> Bench:
    """Return a bench for the same device with tiny models, whose weights are read from files."""
    work = bench.work / "tiny"
    work.mkdir(exist_ok=True)
    return Bench(bench.device, True, work)


@contextmanager
def deterministic() -> Iterator[None]:
    """Use torch's deterministic algorithms inside the context; torch warns if an operation has none."""
    fills = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = False  # DeepSpeed allocates a new gigabyte for every update
    torch.set_deterministic_debug_mode("warn")  # use_deterministic_algorithms would import a compiler
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode("default")
        torch.utils.deterministic.fill_uninitialized_memory = fills


# -- comparisons


def steps(made: Trainer, count: int) -> list[Logs]:
    return [made.train_step() for _ in range(count)]


def weights(made: Trainer) -> dict[str, Tensor]:
    """Return copies of all weights that both engines train."""
    return {
        f"{role}.{name}": parameter.detach().clone()
        for role, engine in engines(made).items()
        for name, parameter in engine.module.named_parameters()
        if parameter.requires_grad
    }


def moved(found: Mapping[str, Tensor], before: Mapping[str, Tensor]) -> list[str]:
    """Return the names of the tensors that are not equal bit for bit."""
    return [name for name in before if not torch.equal(found[name], before[name])]


def compare_bits(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    if different := moved(found, expected):
        name = different[0]
        apart = (found[name].float() - expected[name].float()).abs().max().item()
        raise DisagreementError(f"{len(different)} of {len(expected)} weights differ: {name} by {apart:.2g}")


def losses(logs: Mapping[str, float]) -> Logs:
    return {name: value for name, value in logs.items() if name.startswith("loss/")}


def compare_losses(found: Sequence[Logs], expected: Sequence[Logs], tolerance: float) -> None:
    apart = worst(found, expected)
    if not apart <= tolerance:
        rows = [pairs_of(a, b) for a, b in zip(found, expected, strict=True)]
        raise DisagreementError(f"losses are {apart:.1e} apart, more than {tolerance:.1e}: {'; '.join(rows)}")


def worst(found: Sequence[Logs], expected: Sequence[Logs]) -> float:
    """Return the largest relative difference between two losses."""
    rows = [(losses(a), losses(b)) for a, b in zip(found, expected, strict=True)]
    apart = [abs(a[name] - b[name]) / max(abs(b[name]), 1e-12) for a, b in rows for name in b]
    return math.nan if any(map(math.isnan, apart)) else max(apart)


def pairs_of(found: Logs, expected: Logs) -> str:
    there = losses(expected)
    return ", ".join(f"{name} {value:.6g} / {there[name]:.6g}" for name, value in losses(found).items())
