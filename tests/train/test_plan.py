"""The plan of a recipe: what it counts without weights is what a real step of a tiny model costs."""

import itertools
import json
import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import dmdr_models
import pytest
import torch
from dmdr_models.networks.quantised import quantise
from dmdr_rewards.networks.frozen_network import FrozenNetwork
from dmdr_train import cli
from dmdr_train.distributed.deepspeed_engine import LARGEST
from dmdr_train.monitoring.step_costs import StepCosts
from dmdr_train.planning import counting
from dmdr_train.planning.at_start import plan_lines
from dmdr_train.planning.costs import Costs, costs_of, counted
from dmdr_train.planning.counting import Cost, Meter, flop_counter
from dmdr_train.planning.gpus import GPUS, find_gpu
from dmdr_train.planning.memory import memory, sent_bytes, update_bytes
from dmdr_train.planning.meta_models import models_of
from dmdr_train.planning.meta_rewards import RewardCost, reward_cost, weight_bytes
from dmdr_train.planning.plan import make_plan, step_flops
from dmdr_train.planning.schedule import calls, stages
from dmdr_train.planning.straggling import extra_predictions, slowest
from dmdr_train.recipe.load import load_recipe
from dmdr_train.recipe.schema import Recipe
from dmdr_train.run.build import build
from dmdr_train.training.rollouts import stratified_position
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

CPU = torch.device("cpu")
RecipeMaker = Callable[..., Recipe]


@pytest.fixture(scope="session")
def counts() -> Callable[[Recipe], Costs]:
    """`costs_of`, which counts a recipe once."""
    known: dict[str, Costs] = {}

    def counts(settings: Recipe) -> Costs:
        key = settings.model_dump_json(exclude={"run"})
        if key not in known:
            known[key] = costs_of(settings)
        return known[key]

    return counts


@pytest.fixture(autouse=True)
def counted_once(monkeypatch: pytest.MonkeyPatch, counts: Callable[[Recipe], Costs]) -> None:
    monkeypatch.setattr("dmdr_train.planning.plan.costs_of", counts)


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
@pytest.mark.parametrize("family", ["sit", "sd3"])
def test_operations_are_those_of_a_real_step(
    family: str,
    make_recipe: RecipeMaker,
    model: Path,
    sd3: Path,
    prompts: Path,
    classifier: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    objectives: list[dict[str, Any]] = [{"kind": "distribution_matching"}]
    if family == "sit":
        reward = {"name": "class-label", "checkpoint": str(classifier)}
        objectives += [{"kind": "refl", "reward": reward}, {"kind": "grpo", "reward": reward}]
        rollout = {"steps": 2, "group_size": 2, "updates": 2}
        half = {"gradient_checkpointing": ["network/2"]}
        settings = make_recipe(model__path=str(model), rollout=rollout, objectives=objectives, memory=half)
    else:
        memory = {"gradient_checkpointing": ["network"]}
        settings = sd3_settings(make_recipe, sd3, prompts, memory=memory)
    planned = step_flops(settings, costs_of(settings), stages(settings)[-1])
    assert sum(planned.values()) == pytest.approx(counted_step(settings, monkeypatch), rel=0.01)


def test_a_prediction_of_sdxl_is_counted_as_it_is(make_recipe: RecipeMaker, sdxl: Path, prompts: Path) -> None:
    settings = make_recipe(model__family="sdxl", model__path=str(sdxl), data__prompts=str(prompts))
    family = dmdr_models.load("sdxl", str(sdxl), dtype=torch.float32)
    x, condition = torch.randn(1, *family.latent_shape(*family.size)), family.condition(["a cat"])
    with models_of(settings) as models:
        planned = counting.cost(lambda: models.predict(models.networks.generator, 1))
    network = family.load_network()
    with torch.no_grad(), flop_counter() as counter:
        family.predict(network, x, torch.tensor([500]), condition)
    assert planned.forward == counter.get_total_flops()
    with torch.no_grad(), Meter() as meter:
        family.predict(network, x, torch.tensor([500]), condition)
    assert planned.kernels == pytest.approx(meter.kernels, rel=0.02)


@pytest.mark.parametrize("checkpointing", [[], ["network/2"], ["network"]])
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
    assert meta.both_kernels == real.both_kernels
    assert min(meta.kernels, meta.backward_kernels) > 100
    assert meta.held == pytest.approx(real.held, rel=0.01)
    assert meta.peak == pytest.approx(real.peak, rel=0.05)


def test_the_meter_follows_what_is_made_and_freed() -> None:
    with Meter() as meter:
        a = torch.empty(100, device="meta")
        b = a.view(10, 10) @ torch.empty(10, 10, device="meta")
        a.add_(1)
        assert (meter.now, meter.peak, meter.flops, meter.kernels) == (800, 1200, 2000, 2)
        del a, b
        assert (meter.now, meter.peak) == (0, 1200)


def test_a_backward_pass_holds_what_autograd_saves() -> None:
    layers = nn.Sequential(nn.Linear(8, 8, device="meta"), nn.GELU(), nn.Linear(8, 8, device="meta"))
    x = torch.empty(4, 8, device="meta")
    found = counting.cost(lambda: layers(x), layers.parameters(), backward=True)
    assert found.held == 3 * 4 * 8 * 4  # both layers' outputs, and GELU's
    assert (found.forward, found.backward) == (2 * 2 * 4 * 8 * 8, 3 * 2 * 4 * 8 * 8)


@pytest.mark.parametrize(("depth", "checkpointing"), [(6, []), (7, ["network"]), (9, ["network/2"])])
def test_a_deep_network_is_counted_from_few_blocks(
    depth: int, checkpointing: list[str], make_recipe: RecipeMaker, tmp_path: Path
) -> None:
    from dmdr_models import tiny

    memory = {"gradient_checkpointing": checkpointing}
    settings = make_recipe(model__path=str(tiny.sit(tmp_path / "deep", depth=depth)), memory=memory)
    with models_of(settings) as models:
        whole = counted(settings, models, {}, [])
    assert costs_of(settings) == whole


MATCHING = {"kind": "distribution_matching"}


def test_stages_begin_and_end_with_their_objectives(make_recipe: RecipeMaker) -> None:
    refl = {"kind": "refl", "start": 4, "stop": 7, "reward": {"name": "clip", "checkpoint": "x"}}
    settings = make_recipe(objectives=[MATCHING, refl])
    assert [(stage.name, stage.steps) for stage in stages(settings)] == [
        ("distribution_matching", 4), ("distribution_matching + refl", 3), ("distribution_matching", 3),
    ]  # fmt: skip
    assert [calls(settings, stage).decodings for stage in stages(settings)] == [0, 1, 0]


def test_a_stage_without_matching_trains_no_fake_score(make_recipe: RecipeMaker) -> None:
    settings = make_recipe(objectives=[{**MATCHING, "stop": 5}, {"kind": "refl", "reward": {"name": "aesthetic"}}])
    both, reward = (calls(settings, stage) for stage in stages(settings))
    ratio = settings.guidance.ratio
    assert (both.predictions["fake_score trained"], both.encodings) == (ratio, 1 + ratio)
    assert (reward.predictions["fake_score trained"], reward.predictions["teacher"], reward.encodings) == (0, 0, 1)
    assert reward.predictions["generator"] == (settings.rollout.steps - 1) / 2


@pytest.mark.parametrize("positions", ["independent", "stratified"])
def test_the_slowest_process_by_its_positions(positions: str) -> None:
    """Enumerate all draws of 2 processes with 2 samples each, on a grid of 3 steps."""
    draws = (
        itertools.product(range(3), repeat=4)
        if positions == "independent"
        else [[stratified_position(first, index, 3) for index in range(4)] for first in range(3)]
    )
    slow = [max(a + b, c + d) for a, b, c, d in draws]
    assert slowest(positions, 3, 2, 2) == pytest.approx(sum(slow) / len(slow))


def test_a_plan_waits_for_the_slowest_process(make_recipe: RecipeMaker) -> None:
    rollout = {"steps": 4, "reuse": "sample", "positions": "independent"}
    waits = extra_predictions(make_recipe(rollout=rollout, optim__batch_size=2), 2)
    assert waits == pytest.approx(2.125 - 1.5)  # E max of two uniform on 0..3, less the mean
    pairs = make_recipe(rollout={**rollout, "positions": "stratified"}, optim__batch_size=4)
    assert extra_predictions(pairs, 2) == 0


def test_pictures_of_several_sizes(make_recipe: RecipeMaker, monkeypatch: pytest.MonkeyPatch, toy_costs: Costs) -> None:
    """Operations are the mean by shares, and activations those of the largest size."""

    def counted_at(settings: Recipe) -> Costs:
        (size,) = settings.model.sizes
        area = size.height * size.width
        return replace(toy_costs, generator=Cost(area, 2 * area, peak=area), rewards={1: RewardCost(image=Cost(area))})

    monkeypatch.setattr("dmdr_train.planning.costs.costs_at_size", counted_at)
    sizes = [{"height": 32, "width": 64, "share": 3}, {"height": 64, "width": 64, "share": 1}]
    both = costs_of(make_recipe(model__resolution=sizes))
    assert both.generator == Cost(2560, 5120, peak=4096)
    assert both.rewards[1].image.forward == 2560
    assert both.roles == toy_costs.roles


def test_a_quantised_backbone_takes_fewer_bytes(make_recipe: RecipeMaker, sd3: Path, prompts: Path) -> None:
    """Those of the linear layers, as torchao counts them, and one layer that is dequantised."""
    plain, small = (
        costs_of(sd3_settings(make_recipe, sd3, prompts, memory=memory)).roles["teacher"].frozen
        for memory in ({}, {"quantize": "int8"})
    )
    network: Any = dmdr_models.load("sd3", str(sd3), dtype=torch.float32).load_network()
    before = counting.bytes_of(network)
    largest = max(layer.weight.nbytes for layer in network.modules() if isinstance(layer, nn.Linear))
    quantise(network, "int8")
    weights = [layer.weight for layer in network.modules() if isinstance(layer, nn.Linear)]
    after = before - sum(w.numel() * 4 - w.qdata.nbytes for w in weights)
    assert plain - small == before - after - largest


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_weights_of_a_reward_are_kept_as_rewards_keep_them(dtype: torch.dtype) -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 2), nn.GroupNorm(2, 4), nn.Linear(4, 5))
    planned = weight_bytes(module, dtype)
    assert planned == counting.bytes_of(FrozenNetwork(module, "cpu", dtype).module)


@pytest.mark.parametrize(
    ("zero", "eight_bit", "state", "gradients"), [(0, False, 8800, 4400), (2, False, 3300, 1100), (2, True, 1650, 1100)]
)
def test_zero_shares_the_state(
    zero: int,
    eight_bit: bool,
    state: int,
    gradients: int,
    make_recipe: RecipeMaker,
    monkeypatch: pytest.MonkeyPatch,
    toy_costs: Costs,
) -> None:
    monkeypatch.setattr("dmdr_train.planning.memory.BUCKET", 0)
    settings = make_recipe(optim__zero_stage=zero, optim__eight_bit=eight_bit)
    parts = memory(settings, toy_costs, world=4).parts
    assert (parts["master weights and optimizer"], parts["gradients"]) == (state, gradients)


def test_processes_send_gradients_and_weights(make_recipe: RecipeMaker, toy_costs: Costs) -> None:
    settings = make_recipe(optim__zero_stage=1)
    made = calls(settings, stages(settings)[0])
    assert sent_bytes(settings, toy_costs, made, 1) == 0
    assert sent_bytes(settings, toy_costs, made, 4) == (1000 + 2 * 100) * 4 * 2 * 3 // 4


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
    cli.main(["plan", "demo", "optim.batch_size=8", "--gpus", "2", "optim.batch_size=16", "--json", "run.steps=500"])
    found = json.loads(capsys.readouterr().out)
    assert (found["gpus"], found["micro_batch"]) == (2, 8)
    kernels = {stage["kernels_per_step"] for stage in found["stages"]}
    assert min(kernels) > 1000
    assert len(kernels) == 2
    assert found["parameters"]["generator"]["all"] == 1275408
    assert [stage["steps"] for stage in found["stages"]] == [400, 100]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["demo", "--gpu", "h20"], "error: --gpu: no GPU 'h20' in the table; did you mean H200?"),
        (["demo", "--gpus", "3"], "error: --gpus: optim.batch_size 32 does not divide into 3 GPUs"),
        (["demo", "model.path=no/such"], "error: model.path: no folder 'no/such' here, and its sizes are not known"),
        (["demo", "--price", "0"], "error: dmdr-train plan: argument --price: must be above 0"),
        (["demo", "--gpus", "2", "run.steps"], "error: dmdr-train: unrecognized arguments: run.steps; see --help"),
        (["demo", "--price", "2", "--gpu_s=2"], "error: dmdr-train: unrecognized arguments: --gpu_s=2; see --help"),
    ],
)
def test_a_mistake_is_one_line(arguments: list[str], line: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["plan", *arguments])
    assert ended.value.code == 2
    printed = capsys.readouterr().err
    assert printed.startswith(line)
    assert printed.count("\n") == 1


@pytest.mark.parametrize("command", [["plan", "demo", "--gpu", "h20"], ["init", "--gpu", "h20"]], ids=lambda c: c[0])
def test_deepspeed_does_not_look_for_a_gpu_and_print_that_there_is_none(
    command: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    with pytest.raises(SystemExit):
        cli.main(command)
    assert os.environ["DS_ACCELERATOR"] == "cpu"


def failing(*_: Any, **__: Any) -> Any:
    raise RuntimeError("no values\nhere")


@pytest.mark.parametrize(
    ("place", "line"),
    [
        ("depth_of", "error: model.family: the family sit cannot be counted"),
        ("reward_cost", "error: objectives.1.reward: the reward class-label cannot be counted"),
    ],
)
def test_what_fails_while_it_is_counted_is_one_line(
    place: str, line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(f"dmdr_train.planning.costs.{place}", failing)
    monkeypatch.setattr("dmdr_train.planning.plan.costs_of", costs_of)
    with pytest.raises(SystemExit) as ended:
        cli.main(["plan", "demo"])
    assert ended.value.code == 2
    printed = capsys.readouterr().err
    assert printed == f"{line} without weights (RuntimeError: no values here); a run needs no plan\n"


def test_a_run_on_a_gpu_begins_with_its_plan(
    make_recipe: RecipeMaker, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=150e9))
    lines = plan_lines(make_recipe(model__path=str(model)), torch.device("cuda"), 1)
    assert [line.split(":")[0] for line in lines] == ["memory", "time", "the CPU limits this"]
    assert "of 132.7 usable on each GPU: it fits" in lines[0]
    assert plan_lines(make_recipe(model__path="no/such"), torch.device("cuda"), 1)[0].startswith("none (UserErr")
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


def test_an_update_casts_one_group_of_gradients_after_the_other() -> None:
    """ZeRO 1 and 2 make float32 gradients of a group of parameters, and free them before the next group."""
    trained = 3 * LARGEST
    for stage, casted in ((0, trained), (1, LARGEST), (2, LARGEST), (3, trained)):
        overrides = [f"optim.zero_stage={stage}", "optim.precision=bf16", "optim.eight_bit=true"]
        settings = load_recipe("sdxl-1step-80gb", overrides)
        assert update_bytes(settings, trained, world=1) == 4 * casted
        assert update_bytes(settings, 1000, world=1) == 4000


def test_short_texts_of_the_built_in_problem() -> None:
    """Its encoders read 12 tokens of a text, and its reward 16, where the published models read 77."""
    settings = load_recipe("demo-t2i")
    with models_of(settings) as models:
        texts = models.condition(3)["encoder_hidden_states"]
    assert texts.shape[:2] == (3, 12 + 12)
    refl = settings.objectives[1]
    found = reward_cost("objectives.1.reward", refl.reward, False)
    assert found is not None
    assert found.text > 0
