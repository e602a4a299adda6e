"""A training step against its bare network calls: the same calls of the same networks with the same inputs.

    python tools/bench step                          # a medium SD3 and a medium SiT, on the CPU
    python tools/bench step --family sit --profile   # also where the time goes besides

The bare calls run forward, and backward where the step trains. A step does more: it makes noise and states, encodes
texts, forms the losses, clips gradients and takes AdamW's update. Seconds are of the CPU, summed over all threads, so
that another program beside it disturbs less; OMP_NUM_THREADS=1 disturbs least.
"""

import cProfile
import pstats
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from dmdr_train.distributed.process_group import start_processes
from dmdr_train.planning.counting import flop_counter
from dmdr_train.run.build import build
from dmdr_train.training.trainer import Trainer

from bench.common import SIZES, fastest, options_of, print_table, recipe

CPU = torch.device("cpu")


class Call(NamedTuple):
    network: torch.nn.Module
    inputs: tuple[Any, ...]
    named: dict[str, Any]
    trains: bool


def calls_of(trainer: Trainer) -> list[Call]:
    """The calls of both networks in one step."""
    found: list[Call] = []

    def note(network: torch.nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        found.append(Call(network, inputs, named, torch.is_grad_enabled()))

    networks = [trainer.generator.module, trainer.guidance.module]
    hooks = [network.register_forward_pre_hook(note, with_kwargs=True) for network in networks]
    trainer.train_step()
    for hook in hooks:
        hook.remove()
    return found


def bare(calls: list[Call]) -> None:
    """Make the calls again, and nothing besides."""
    for call in calls:
        with torch.set_grad_enabled(call.trains):
            found = call.network(*call.inputs, **call.named)
            output = found[0] if isinstance(found, tuple) else getattr(found, "sample", found)
            if call.trains:
                output.backward(torch.ones_like(output))
                call.network.zero_grad(set_to_none=True)


def count(trainer: Trainer) -> tuple[list[Call], int, int]:
    """The calls of a step; and the operations of the step and of its bare calls."""
    with flop_counter() as counter:
        calls = calls_of(trainer)
    step = counter.get_total_flops()
    with flop_counter() as counter:
        bare(calls)
    return calls, step, counter.get_total_flops()


def main() -> None:
    parser = options_of(__doc__)
    parser.add_argument("--family", choices=("sd3", "sit"), nargs="+", default=["sd3", "sit"])
    parser.add_argument("--size", choices=tuple(SIZES), default="medium")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--profile", action="store_true", help="print the functions that take the most time themselves")
    options = parser.parse_args()
    start_processes(CPU)
    rows = []
    for family in options.family:
        with tempfile.TemporaryDirectory() as folder:
            # the same positions in every step, so that all steps make the same calls
            rollout = {"steps": 2, "positions": "stratified"}
            trainer = build(recipe(family, options.size, Path(folder), rollout=rollout), CPU)
            calls, whole, alone = count(trainer)
            works = {"step": trainer.train_step, "bare": lambda calls=calls: bare(calls)}
            seconds = fastest(works, options.repeats, time.process_time)
            rows.append([family, seconds["step"], seconds["bare"], seconds["step"] / seconds["bare"], whole / alone])
            if options.profile:
                profile = cProfile.Profile()
                profile.runcall(trainer.train_step)
                pstats.Stats(profile).sort_stats("tottime").print_stats(25)
    print(f"{options.size}, torch {torch.__version__}, {torch.get_num_threads()} threads\n")
    print_table(["family", "s per step", "s, bare calls", "ratio of seconds", "ratio of operations"], rows)


if __name__ == "__main__":
    main()
