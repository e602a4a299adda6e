"""The plan of a recipe: what it counts without weights is what a real step of a tiny model costs."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from dmdr_train import cli
from dmdr_train.monitoring.step_costs import StepCosts
from dmdr_train.planning import counting
from dmdr_train.planning.at_start import plan_lines
from dmdr_train.planning.costs import Costs, Role, costs_of, counted
from dmdr_train.planning.counting import Cost, Meter, flop_counter
from dmdr_train.planning.gpus import GPUS, find_gpu
from dmdr_train.planning.memory import memory, sent_bytes
from dmdr_train.planning.meta_models import depth_of, models_of
from dmdr_train.planning.plan import USABLE, make_plan, step_flops
from dmdr_train.planning.schedule import calls, stages
from dmdr_train.recipe.load import BUILT_IN, load_recipe
from dmdr_train.recipe.schema import Recipe
from dmdr_train.run.build import build
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

CPU = torch.device("cpu")
RecipeMaker = Callable[..., Recipe]


def counted_step(settings: Recipe, monkeypatch: pytest.MonkeyPatch) -> int:
    """Operations of a real step on this CPU, with one sample at each position of the grid."""
    trainer = build(settings, CPU)
    even = torch.arange(settings.optim.batch_size) % settings.rollout.steps
    monkeypatch.setattr(trainer.rollouts, "choose_steps", lambda *_: even)
    if settings.model.family != "sit":
        trainer.family.null_condition(1)  # is kept from the first step on
    with flop_counter() as counter:
        trainer.train_step()
    return int(counter.get_total_flops())


def sd3_settings(make_recipe: RecipeMaker, sd3: Path, prompts: Path, **changes: Any) -> Recipe:
    model = {"family": "sd3", "path": str(sd3), "max_tokens": 8}
    loras = {"generator_lora": {"rank": 4, "alpha": 8}, "fake_score_lora": {"rank": 2, "alpha": 2}}
    basis: dict[str, Any] = {
        "model": {**model, **loras},
        "data__prompts": str(prompts),
        "rollout": {"steps": 4, "mode": "ode"},
        "guidance": {"ratio": 2, "cfg": 4.0},
    }
    return make_recipe(**{**basis, **changes})


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("family", ["sit", "sd3", "sdxl"])
def test_operations_are_those_of_a_real_step(
    family: str,
    make_recipe: RecipeMaker,
    model: Path,
    sd3: Path,
    sdxl: Path,
    prompts: Path,
    classifier: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    objectives: list[dict[str, Any]] = [{"kind": "distribution_matching"}]
    if family == "sit":
        objectives.append({"kind": "refl", "reward": {"name": "class-label", "checkpoint": str(classifier)}})
        settings = make_recipe(model__path=str(model), rollout={"steps": 2}, objectives=objectives)
    elif family == "sd3":
        memory = {"gradient_checkpointing": ["network"]}
        settings = sd3_settings(make_recipe, sd3, prompts, memory=memory)
    else:
        data = {"model__family": "sdxl", "model__path": str(sdxl), "data__prompts": str(prompts)}
        settings = make_recipe(**data, rollout={"steps": 2}, guidance={"ratio": 1, "cfg": 7.0}, optim__batch_size=2)
    planned = step_flops(settings, costs_of(settings), stages(settings)[-1])
    assert sum(planned.values()) == pytest.approx(counted_step(settings, monkeypatch), rel=0.01)


@pytest.mark.parametrize("checkpointing", [[], ["network"]])
def test_memory_on_the_meta_device_is_that_of_real_tensors(
    checkpointing: list[str], make_recipe: RecipeMaker, sd3: Path, prompts: Path
) -> None:
    """Compare the bytes that wait for the backward pass, and the peak, of a tiny SD3 here and without weights.

    Both write attention out, since a CPU's own kernel saves other copies than a GPU's.
    """
    from dmdr_train.training.networks import load_family, make_networks

    settings = sd3_settings(make_recipe, sd3, prompts, memory={"gradient_checkpointing": checkpointing})
    family = load_family(settings)
    network = make_networks(settings, family, CPU).generator
    x, t = torch.randn(1, *family.latent_shape(*family.size)), torch.rand(1)
    with pytest.MonkeyPatch.context() as patch, models_of(settings) as models, sdpa_kernel(SDPBackend.MATH):
        patch.setattr(counting, "fused_attention", torch.nn.functional.scaled_dot_product_attention)
        condition = {name: torch.randn(value.shape) for name, value in models.condition(1).items()}
        planned = models.networks.generator
        meta = counting.cost(lambda: models.predict(planned, 1), planned.parameters(), backward=True)
        real = counting.cost(lambda: family.predict(network, x, t, condition), network.parameters(), backward=True)
    assert meta.both == real.both
    assert meta.held == pytest.approx(real.held, rel=0.01)
    assert meta.peak == pytest.approx(real.peak, rel=0.05)


def test_the_meter_follows_what_is_made_and_freed() -> None:
    with Meter() as meter:
        a = torch.empty(100, device="meta")
        b = a.view(10, 10) @ torch.empty(10, 10, device="meta")
        a.add_(1)
        assert (meter.now, meter.peak, meter.flops) == (800, 1200, 2000)
        del a, b
        assert (meter.now, meter.peak) == (0, 1200)


def test_a_backward_pass_holds_what_autograd_saves() -> None:
    layers = nn.Sequential(nn.Linear(8, 8, device="meta"), nn.GELU(), nn.Linear(8, 8, device="meta"))
    x = torch.empty(4, 8, device="meta")
    found = counting.cost(lambda: layers(x), layers.parameters(), backward=True)
    assert found.held == 3 * 4 * 8 * 4  # both layers' outputs, and GELU's
    assert (found.forward, found.backward) == (2 * 2 * 4 * 8 * 8, 3 * 2 * 4 * 8 * 8)


def test_a_deep_network_is_counted_from_few_blocks(make_recipe: RecipeMaker, tmp_path: Path) -> None:
    from dmdr_models import tiny

    settings = make_recipe(model__path=str(tiny.sit(tmp_path / "deep", depth=7)))
    with models_of(settings) as models:
        whole = counted(settings, models, {}, [])
    assert costs_of(settings) == whole


MATCHING = {"kind": "distribution_matching"}
COSTS = Costs(
    generator=Cost(10, 20), fake_score=Cost(10, 20, peak=5), teacher=Cost(10), decoder=Cost(0),
    rewards={}, texts=0, roles={"generator": Role(1000, 1000, 0), "fake_score": Role(1100, 100, 2000)},
)  # fmt: skip


@pytest.mark.parametrize(
    ("rollout", "rollouts"),
    [
        ({"steps": 1}, 0 + 2 * 1),
        ({"steps": 4}, 1.5 + 2 * 2.5),
        ({"steps": 4, "states": "authors"}, 2.5 + 2 * 3.5),
        ({"steps": 4, "states": "authors", "mode": "ode"}, 4 + 2 * 4),
    ],
)
def test_calls_follow_the_rollout(rollout: dict[str, Any], rollouts: float, make_recipe: RecipeMaker) -> None:
    settings = make_recipe(rollout=rollout, guidance={"ratio": 2, "cfg": 4.0})
    made = calls(settings, stages(settings)[0])
    assert (made.rollout, made.fake_updates, made.teacher, made.decodings) == (rollouts, 2, 2, 0)


@pytest.mark.parametrize(("reuse", "rollouts", "encodings"), [("none", 6.5, 3), ("sample", 1.5, 1), ("states", 4, 1)])
def test_a_shared_rollout_is_made_once(
    reuse: str, rollouts: float, encodings: int, make_recipe: RecipeMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dmdr_train.planning.schedule.reuse", lambda _: reuse)
    settings = make_recipe(rollout={"steps": 4}, guidance={"ratio": 2})
    made = calls(settings, stages(settings)[0])
    assert (made.rollout, made.encodings) == (rollouts, encodings)


def test_stages_begin_and_end_with_their_objectives(make_recipe: RecipeMaker) -> None:
    refl = {"kind": "refl", "start": 4, "stop": 7, "reward": {"name": "clip", "checkpoint": "x"}}
    settings = make_recipe(objectives=[MATCHING, refl])
    assert [(stage.name, stage.steps) for stage in stages(settings)] == [
        ("distribution_matching", 4), ("distribution_matching + refl", 3), ("distribution_matching", 3),
    ]  # fmt: skip
    assert [calls(settings, stage).decodings for stage in stages(settings)] == [0, 1, 0]


@pytest.mark.parametrize(
    ("zero", "eight_bit", "state", "gradients"), [(0, False, 8800, 4400), (2, False, 3300, 1100), (2, True, 1650, 1100)]
)
def test_zero_shares_the_state(
    zero: int, eight_bit: bool, state: int, gradients: int, make_recipe: RecipeMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dmdr_train.planning.memory.BUCKET", 0)
    settings = make_recipe(optim__zero_stage=zero, optim__eight_bit=eight_bit)
    parts = memory(settings, COSTS, world=4).parts
    assert (parts["master weights and optimizer"], parts["gradients"]) == (state, gradients)


def test_processes_send_gradients_and_weights(make_recipe: RecipeMaker) -> None:
    settings = make_recipe(optim__zero_stage=1)
    made = calls(settings, stages(settings)[0])
    assert sent_bytes(settings, COSTS, made, 1) == 0
    assert sent_bytes(settings, COSTS, made, 4) == (1000 + 2 * 100) * 4 * 2 * 3 // 4


def test_a_gpu_is_found_by_its_name() -> None:
    assert find_gpu("rtx-4090") is find_gpu("RTX 4090") is GPUS["rtx 4090"]


def test_the_first_switch_makes_it_fit(make_recipe: RecipeMaker, model: Path) -> None:
    settings = make_recipe(model__path=str(model), optim__batch_size=64)
    whole = make_plan(settings, find_gpu("h100"))
    assert whole.fits
    assert whole.switch == ""
    small = make_plan(settings, find_gpu("h100"), gpu_memory=whole.memory.total * 0.75 / 1e9)
    assert not small.fits
    key, value = small.switch.split("=")
    assert key == "optim.accumulation"
    mended = make_recipe(model__path=str(model), optim__batch_size=64, optim__accumulation=int(value))
    assert make_plan(mended, find_gpu("h100"), gpu_memory=whole.memory.total * 0.75 / 1e9).fits


def test_the_command_prints_text_and_json(capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["plan", "demo", "--gpu", "rtx 4090", "--price", "2"])
    text = capsys.readouterr().out
    assert re.search(r"^memory: .* GiB of 21.2 usable on each GPU: it fits$", text, re.MULTILINE)
    cli.main(["plan", "demo", "--gpus", "2", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["gpus"] == 2
    assert found["parameters"]["generator"]["all"] == 1275408
    assert [stage["steps"] for stage in found["stages"]] == [400, 380]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["demo", "--gpu", "h20"], "error: --gpu: no GPU 'h20' in the table; did you mean H200?"),
        (["demo", "--gpus", "3"], "error: --gpus: optim.batch_size 32 does not divide into 3 GPUs"),
        (["demo", "model.path=no/such"], "error: model.path: no folder 'no/such' here, and its sizes are not known"),
        (["demo", "--price", "0"], "error: dmdr-train plan: argument --price: must be above 0"),
    ],
)
def test_a_mistake_is_one_line(arguments: list[str], line: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["plan", *arguments])
    assert ended.value.code == 2
    printed = capsys.readouterr().err
    assert printed.startswith(line)
    assert printed.count("\n") == 1


def test_a_run_on_a_gpu_begins_with_its_plan(
    make_recipe: RecipeMaker, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=150e9))
    lines = plan_lines(make_recipe(model__path=str(model)), torch.device("cuda"), 1)
    assert [line.split(":")[:2] for line in lines] == [["plan", " memory"], ["plan", " time"]]
    assert "of 132.7 usable on each GPU: it fits" in lines[0]
    assert plan_lines(make_recipe(model__path="no/such"), torch.device("cuda"), 1)[0].startswith("plan: none (UserErr")
    assert plan_lines(make_recipe(model__path="no/such"), CPU, 1) == []


def test_steady_seconds_leave_out_the_first_steps() -> None:
    costs = StepCosts(CPU)
    for seconds in (9.0, 9.0, 9.0):
        costs.add(seconds)
    assert costs.values() == {}
    costs.add(1.0)
    costs.add(2.0)
    assert costs.values() == {"steady_seconds_per_step": 1.5}
    assert costs.line() == ""


def test_sd35_large_needs_what_its_recipe_and_an_h200_say() -> None:
    """The recipe's line `Needs:` is true, and the peak that docs/benchmarks.md has for batch 1 is met within 10 %."""
    name = "sd35-large-cold-start"
    settings = load_recipe(name)
    costs = costs_of(settings)
    header = re.search(r"Needs: +eight GPUs of (\d+) GB", (BUILT_IN / f"{name}.yaml").read_text(encoding="utf-8"))
    assert header
    assert memory(settings, costs, world=8).total <= int(header[1]) * 1e9 * USABLE
    alone = load_recipe(name, ["optim.batch_size=1", "optim.accumulation=1", "optim.eight_bit=false"])
    found = memory(alone, costs, world=1)
    assert (found.total - found.parts["text encoders"]) / 2**30 == pytest.approx(20.2, rel=0.1)
    assert costs.roles["teacher"].parameters / 1e6 == pytest.approx(8057, rel=0.001)
    assert depth_of(settings) == 38  # counting with fewer blocks leaves the table as it is


def test_sit_xl_needs_what_an_h200_says() -> None:
    settings = load_recipe("sit-xl-2-cold-start", ["optim.batch_size=64"])
    assert memory(settings, costs_of(settings), world=1).total / 2**30 == pytest.approx(31.5, rel=0.1)
