"""A run goes on with another number of processes: what ZeRO had cut for some is cut for others."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import forking
import pytest
import torch
from dmdr_train.checkpoint.load import load_checkpoint
from dmdr_train.checkpoint.save import Saving
from dmdr_train.distributed import deepspeed_engine
from dmdr_train.distributed.averaged_weights import Average
from dmdr_train.distributed.deepspeed_internals import saved_types
from dmdr_train.distributed.reshard_zero import Cuts, cut, reshard, window
from dmdr_train.recipe.schema import Recipe
from dmdr_train.run.build import build
from safetensors.torch import load_file

FILES = ("generator.safetensors", "student.safetensors", "fake_score.safetensors")
LAYOUTS = {
    "stage 3": Cuts([7, 1, 12, 5], [4], 1),
    "stage 3 in sub-groups": Cuts([7, 1, 12, 5], [3, 1], 1),
    "stages 1 and 2": Cuts([25], [1], 2),
    "stages 1 and 2 in groups": Cuts([7, 18], [1, 1], 2),
}


def laid_out(whole: torch.Tensor, cuts: Cuts, rank: int, world: int) -> list[torch.Tensor]:
    """What a process has of consecutive pieces: each is filled up with zeros to a multiple, and cut in equal parts."""
    parts = []
    for piece in whole.split(cuts.pieces):
        padded = torch.cat([piece, torch.zeros(-len(piece) % (world * cuts.align))])
        parts.append(padded.chunk(world)[rank] if len(padded) else padded)
    first, flats = 0, []
    for count in cuts.flats:
        flats.append(torch.cat(parts[first : first + count]))
        first += count
    return flats


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("old", "new"), [(1, 2), (2, 1), (2, 3), (3, 2), (4, 4), (5, 8)])
def test_every_process_gets_what_it_would_have_had(layout: str, old: int, new: int) -> None:
    cuts = LAYOUTS[layout]
    whole = torch.arange(1.0, 26.0)
    before = [laid_out(whole, cuts, rank, old) for rank in range(old)]
    for rank in range(new):
        expected = laid_out(whole, cuts, rank, new)
        found = cut(before, cuts, rank, new)
        assert [len(flat) for flat in found] == [len(flat) for flat in expected]
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("step", [3, torch.tensor(3.0)], ids=["DeepSpeed's AdamW", "torch's"])
def test_counters_are_copied(step: Any) -> None:
    def state(rank: int) -> dict[str, Any]:
        moments = {"step": step, "exp_avg": laid_out(torch.arange(25.0), LAYOUTS["stages 1 and 2"], rank, 2)[0]}
        return {"base_optimizer_state": {"state": {0: moments}, "param_groups": [{"params": [0]}]}}

    found = reshard([state(0), state(1)], LAYOUTS["stages 1 and 2"], 0, 1)["base_optimizer_state"]["state"][0]
    assert type(found["step"]) is type(step)
    assert found["step"] == 3
    assert found["exp_avg"].tolist() == [*range(25), 0]


def test_a_window_ends_in_zeros() -> None:
    rows = [torch.tensor([1.0, 2.0]), torch.tensor([]), torch.tensor([3.0, 4.0, 5.0])]
    assert window(rows, 1, 3).tolist() == [2, 3, 4]
    assert window(rows, 4, 3).tolist() == [5, 0, 0]
    assert window(rows, 9, 2).tolist() == [0, 0]


def test_counters_of_sub_groups_are_their_own() -> None:
    """AdamW counts in place: two flat tensors that shared a counter would count double."""
    moment = {"step": torch.tensor(4.0), "exp_avg": torch.arange(4.0)}
    state = {"optimizer_state_dict": {"state": {0: moment}, "param_groups": [{"lr": 0.1, "params": [0]}]}}
    found = reshard([state], Cuts([2, 2], [1, 1], 1), 0, 1)["optimizer_state_dict"]
    assert found["param_groups"] == [{"lr": 0.1, "params": [0, 1]}]
    assert [found["state"][i]["exp_avg"].tolist() for i in (0, 1)] == [[0, 1], [2, 3]]
    found["state"][0]["step"] += 1
    assert (found["state"][1]["step"], moment["step"]) == (4, 4)


def test_groups_of_parameters_stay_apart() -> None:
    """With ZeRO 1 and 2 every group of the optimizer has one flat tensor, and settings of its own."""
    cuts = Cuts([4, 2], [1, 1], 1)

    def state(rank: int) -> dict[str, Any]:
        flats = laid_out(torch.arange(6.0), cuts, rank, 2)
        moments = {i: {"step": 4, "exp_avg": flat} for i, flat in enumerate(flats)}
        return {"base_optimizer_state": {"state": moments, "param_groups": [{"lr": i, "params": [i]} for i in (0, 1)]}}

    found = reshard([state(0), state(1)], cuts, 0, 1)["base_optimizer_state"]
    assert found["param_groups"] == [{"lr": 0, "params": [0]}, {"lr": 1, "params": [1]}]
    assert [found["state"][i]["exp_avg"].tolist() for i in (0, 1)] == [[0, 1, 2, 3], [4, 5]]


# -- two processes, one, two again

WORKER = """
import json, os, torch
from pathlib import Path
from deepspeed import DeepSpeedEngine
from dmdr_train.checkpoint.load import load_checkpoint
from dmdr_train.checkpoint.save import Saving
from dmdr_train.distributed import deepspeed_engine
from dmdr_train.distributed.averaged_weights import Average
from dmdr_train.distributed.process_group import start_processes
from dmdr_train.recipe.schema import Recipe
from dmdr_train.run.build import build
start_processes(torch.device("cpu"))
DeepSpeedEngine.zero_max_reuse_distance = lambda engine: 0  # as `one_process` does
deepspeed_engine.LARGEST = 5000  # more than a LoRA, less than a network: groups of parameters
recipes = [Recipe.model_validate(recipe) for recipe in json.loads(Path("recipes.json").read_text())]
for first, last in ((0, 2), (3, 4)):
    for i, settings in enumerate(recipes):
        trainer = build(settings, torch.device("cpu"))
        if settings.optim.zero_stage == 2:
            assert len(trainer.generator.optimizer.param_groups) > 1
        average = Average(trainer.generator, settings.optim.ema)
        if first:
            load_checkpoint(Path(f"{i}/step-{first:08d}"), trainer, average)
        for _ in range(first, last):
            trainer.train_step()
            average.update(trainer.step)
        Saving(Path(str(i)), settings, trainer, average).finish()
    Path("saved-" + os.environ["RANK"]).touch()
    while not first and not Path("go-on").exists():
        __import__("time").sleep(0.05)
"""
BF16: dict[str, Any] = {"optim__zero_stage": 2, "optim__precision": "bf16"}
CASES: list[dict[str, Any]] = [
    {"optim__zero_stage": 0},
    {"optim__zero_stage": 1, "model__generator_lora": {"rank": 3, "alpha": 3}},
    BF16,
    {"optim__zero_stage": 3, "optim__precision": "bf16", "model__generator_lora": {"rank": 3, "alpha": 3}},
]


def steps(settings: Recipe, first: int, last: int, folder: Path) -> Path:
    """From the checkpoint at one step to that at another, on this process."""
    trainer = build(settings, torch.device("cpu"))
    average = Average(trainer.generator, settings.optim.ema)
    if first:
        load_checkpoint(folder / f"step-{first:08d}", trainer, average)
    for _ in range(first, last):
        trainer.train_step()
        average.update(trainer.step)
    return Saving(folder, settings, trainer, average).finish()


@pytest.mark.usefixtures("one_process", "python")
def test_two_processes_and_one_and_two_are_one(
    make_recipe: Callable[..., Any],
    model: Path,
    plain_environment: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Weights, averages and moments go through; batch and numbers are the same, and so is what comes out."""
    monkeypatch.setattr(deepspeed_engine, "LARGEST", 5000)
    basis = {
        "model__path": str(model),
        "optim__ema": 0.5,
        "optim__generator": {"lr": 1e-2, "eps": 1e-3},
        "optim__fake_score": {"lr": 1e-2, "eps": 1e-3},
    }
    recipes = [make_recipe(**basis, **case) for case in CASES]
    (tmp_path / "recipes.json").write_text(json.dumps([recipe.model_dump(mode="json") for recipe in recipes]))
    (tmp_path / "worker.py").write_text(WORKER)
    log = tmp_path / "log"
    ranks = forking.group(processes=2)
    two = [forking.start(["worker.py"], tmp_path, plain_environment | rank, log, log) for rank in ranks]
    whole = [steps(settings, 0, 4, tmp_path / "whole" / str(i)) for i, settings in enumerate(recipes)]
    try:
        while not all((tmp_path / f"saved-{rank}").exists() for rank in (0, 1)):
            assert all(process.is_alive() for process in two), log.read_text()
            time.sleep(0.05)
        for i, settings in enumerate(recipes):
            steps(settings, 2, 3, tmp_path / str(i))
        (tmp_path / "go-on").touch()
        assert forking.wait(two, timeout=120) == [0, 0], log.read_text()
    finally:
        for process in two:
            process.kill()
    for i, (expected, case) in enumerate(zip(whole, CASES, strict=True)):
        near = 2e-3 if "optim__precision" in case else 2e-6  # of learning rates of 1e-2; bf16 rounds the gradients
        assert json.loads((tmp_path / f"{i}/step-00000004/manifest.json").read_text())["world_size"] == 2
        for name in FILES:
            saved, ours = load_file(expected / name), load_file(tmp_path / f"{i}/step-00000004" / name)
            for key, value in saved.items():
                assert torch.allclose(ours[key], value, rtol=0, atol=near), (case, name, key)
    two_wrote = tmp_path / f"{CASES.index(BF16)}/step-00000004"
    with torch.serialization.safe_globals(saved_types()):
        computed = torch.load(two_wrote / "generator/mp_rank_00_model_states.pt", weights_only=True)["module"]
    for key, value in load_file(two_wrote / "generator.safetensors").items():
        assert torch.equal(value.bfloat16(), computed[key]), "not the master weights of both processes"
        assert not torch.equal(value, computed[key].float()), "no more exact than what the network computes with"
