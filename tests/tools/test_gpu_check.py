"""The rehearsal of the GPU check: its rows on tiny models, and the handling of rows that fail."""

import json
import math
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gpu_check
import pytest
import torch
from dmdr_train.planning.checkpointing import with_checkpointing
from dmdr_train.planning.model_configs import FOLDERS
from dmdr_train.recipe.load import load_recipe
from gpu import agreement, check, folders, measure, plan, rewards, table, training, weights, worker
from torch.autograd import DeviceType

CPU = torch.device("cpu")
FAKES = """
import os
from gpu.plan import Measured

def fine(bench):
    print("a library's own words")
    return Measured(1, 0.5, flops=1e12, numbers={"loss": 1.0}, notes=["well"])

def nan(bench):
    return Measured(1, 0.5, numbers={"loss/fake_score": float("nan")})

def raises(bench):
    raise ValueError("no such | thing")

def dies(bench):
    os._exit(9)
"""


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the tests independent of the machine."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


@pytest.fixture
def bench(tmp_path: Path) -> measure.Bench:
    return measure.Bench(CPU, True, tmp_path)


@pytest.fixture
def fakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[plan.Row]]:
    """Provide rows from a module that every process finds."""
    (tmp_path / "gpu_fakes.py").write_text(FAKES)
    monkeypatch.syspath_prepend(tmp_path)
    return lambda *names: [plan.Row(name, 1.0, f"gpu_fakes:{name}") for name in names]


def test_rows_pass_on_an_emulated_gpu(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Run every reward in half precision, and fp16 with its loss scale; count the operations that make the CPU wait.

    The tests in tests/end_to_end train on this device.
    """
    rows = ("reward-", "fp16-overflow")
    code = gpu_check.main(["--emulated", "--budget", "3600", "-o", str(tmp_path), "--only", *rows])
    found = json.loads((tmp_path / "gpu-check.json").read_text())
    assert {row["name"]: row["reason"] for row in found["rows"] if row["state"] != "passed"} == {}, capfd.readouterr()
    assert code == 0
    assert "a loss scale of 2^60" in (tmp_path / "gpu-check.md").read_text()
    waits = {row["name"]: row["measured"]["waits"] for row in found["rows"] if row["measured"]["seconds"]}
    assert len(waits) == 8
    assert waits["reward-pickscore"] > 0


def test_all_rows_pass_with_tiny_models(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code = gpu_check.main(["--tiny", "--budget", "3600", "-o", str(tmp_path)])
    printed, said = capfd.readouterr()
    found = json.loads((tmp_path / "gpu-check.json").read_text())
    assert {row["name"]: row["reason"] for row in found["rows"] if row["state"] != "passed"} == {}, said[-4000:]
    assert code == 0
    assert [row["name"] for row in found["rows"]] == [row.name for row in plan.rows()]
    assert printed == (tmp_path / "gpu-check.md").read_text()
    lines = {line.split(" | ")[0].strip("| "): line for line in printed.splitlines() if line.startswith("| ")}
    for row in found["rows"]:
        measured = row["measured"]
        assert measured["numbers"]
        assert measured["peak"] is measured["waits"] is None
        assert lines[row["name"]].count("–") == 4 + (not measured["seconds"]) + (not measured["batch"])
    by_name = {row["name"]: row["measured"] for row in found["rows"]}
    assert by_name["sd35-large-srpo"]["flops"] > by_name["sd35-large-cold-start"]["flops"] > 0
    assert "loss/refl-2" in by_name["sdxl-1step-refl"]["numbers"]
    assert "; int8; " in lines["sd35-large-48gb"]
    assert "; not compiled; " in lines["sd35-large-cold-start-compiled"]
    assert any(name.startswith("demo-") for name in by_name["built-in-problems"]["numbers"])
    assert "weights equal bit for bit" in lines["resumed"]


def test_a_row_that_fails_fails_alone(
    fakes: Callable[..., list[plan.Row]], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    told: list[int] = []
    results = check.check(
        fakes("nan", "raises", "dies", "fine"),
        worker.Options(True, tmp_path),
        left=lambda: 100.0,
        tell=lambda results, environment: told.append(len(results)),
    )
    assert [(result.name, result.state, result.reason) for result in results] == [
        ("nan", "failed", "not finite: loss/fake_score"),
        ("raises", "failed", "ValueError: no such | thing"),
        ("dies", "failed", "its process ended with code 9"),
        ("fine", "passed", ""),
    ]
    assert told == [1, 2, 3, 4]
    assert [plan.exit_code([result]) for result in results] == [1, 1, 1, 0]
    assert plan.exit_code(results) == 1
    printed, said = capfd.readouterr()
    assert printed == ""
    assert "a library's own words" in said
    assert "in raises" in said, "the traceback is there to read"


def test_what_does_not_fit_into_the_budget_is_left_out(
    fakes: Callable[..., list[plan.Row]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        check,
        "Worker",
        lambda options: type(
            "Worker",
            (),
            {
                "environment": {"device": "none"},
                "measure": lambda self, row, limit: worker.Answer(plan.Result(row.name, "passed"), True),
                "end": lambda self: None,
            },
        )(),
    )
    long, short = plan.Row("long", 50, "gpu_fakes:fine"), plan.Row("short", 5, "gpu_fakes:fine")
    left = iter([60.0, 20.0, 20.0, 20.0])
    results = check.check([long, long, short], worker.Options(False, tmp_path), lambda: next(left), lambda *_: None)
    assert [result.state for result in results] == ["passed", "left out", "passed"]
    assert results[1].reason == "50 s expected, 20 s of the budget left"


def test_without_a_budget_nothing_is_measured_and_the_table_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert gpu_check.main(["--tiny", "--budget", "0", "--only", "demo", "reward-clip", "-o", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "- demo: 3 s expected, 0 s of the budget left" in printed
    assert "- reward-clip: 3 s expected" in printed
    assert "| demo" not in printed


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--only", "sd4"], "error: --only sd4: no row has this name or beginning; --list prints the names"),
        (["--budget", "soon"], "error: argument --budget: invalid seconds value: 'soon'; see --help"),
        (["--budget", "nan"], "error: argument --budget: must be a number of seconds, got nan; see --help"),
        (["--fast"], "error: unrecognized arguments: --fast; see --help"),
        (["-o", "{file}/folder"], "error: --output {file}/folder: Not a directory; give another folder"),
        (
            ["--only", "demo", "-o", "{folder}"],
            "error: no GPU here; --tiny rehearses on the CPU, with tiny models",
        ),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_mistake_is_one_line(
    arguments: list[str], line: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    places = {"file": tmp_path / "file", "folder": tmp_path / "folder"}
    assert gpu_check.main([text.format(**places) for text in arguments]) == 2
    printed, said = capfd.readouterr()
    assert (printed, said) == ("", line.format(**places) + "\n")


def test_rows_are_chosen_by_their_names_or_beginnings(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_check.main(["--list"]) == 0
    assert capsys.readouterr().out.split() == [row.name for row in plan.rows()]
    assert [row.name for row in plan.select(["sit", "demo"])] == ["demo", "sit-xl-2-cold-start"]


@pytest.mark.parametrize(
    ("name", "part", "millions"),
    [
        ("sd3-medium", "transformer", 2028),
        ("sd35-large", "transformer", 8057),
        ("sdxl-base", "unet", 2567),
        ("sit-xl-2", "transformer", 675),
        ("sd3-medium", "vae", 84),
        ("sdxl-base", "vae", 84),
        ("taesdxl", "", 2.445),
    ],
)
def test_the_models_are_of_the_published_size(name: str, part: str, millions: float, tmp_path: Path) -> None:
    import diffusers
    from dmdr_models.sit.transformer import SiTTransformer

    folders.write_full(tmp_path, name)
    kind = FOLDERS[name][part]["_class_name"]
    model: Any = SiTTransformer if kind == "SiTTransformer" else getattr(diffusers, kind)
    with torch.device("meta"):
        network = model.from_config(model.load_config(tmp_path, subfolder=part or None))
    assert sum(parameter.numel() for parameter in network.parameters()) / 1e6 == pytest.approx(millions, rel=0.01)


@pytest.mark.parametrize(
    ("name", "millions"),
    [("hpsv2.1", 986), ("pickscore", 986), ("clip", 428), ("imagereward", 446), ("dinov2", 309), ("class-label", 86.6)],
)
def test_rewards_are_of_the_published_size(
    name: str, millions: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compare shapes only, without writing files."""
    counted: list[int] = []

    def random_state(shapes: dict[str, tuple[int, ...]], device: torch.device) -> dict[str, torch.Tensor]:
        counted.append(sum(math.prod(shape) for shape in shapes.values()))
        return {}

    monkeypatch.setattr(rewards, "random_state", random_state)
    rewards.files(measure.Bench(CPU, False, tmp_path), name)
    assert sum(counted) / 1e6 == pytest.approx(millions, rel=0.01)


def test_random_weights_are_made_in_their_dtype_and_none_is_silent(bench: measure.Bench) -> None:
    import dmdr_models

    path = folders.model(bench, "sit-xl-2")
    with weights.random_weights(CPU):
        network = dmdr_models.load("sit", path, dtype=torch.bfloat16).load_network()
    matrices = [parameter for parameter in network.parameters() if parameter.ndim > 1]
    assert {parameter.dtype for parameter in network.parameters()} == {torch.bfloat16}
    assert all(parameter.float().std() > 0 for parameter in matrices)
    width = network.config.width
    assert network.blocks[0].attn.to_q.weight.float().std().item() == pytest.approx(0.5 / width**0.5, rel=0.1)
    stored = dmdr_models.load("sit", path).load_network()
    assert not torch.equal(stored.blocks[0].attn.to_q.weight, network.blocks[0].attn.to_q.weight.float())


def test_waits_are_counted_by_their_place_and_other_warnings_kept() -> None:
    with measure.observed(CPU) as (places, warned):
        for _ in range(3):
            warnings.warn("called a synchronizing CUDA operation (Triggered internally at …)", stacklevel=1)
        warnings.warn("Synchronization debug mode is a prototype feature", stacklevel=1)
        for _ in range(2):
            warnings.warn("barrier(): using the device under current context\nmore", stacklevel=1)
    assert list(places.values()) == [3]
    assert next(iter(places)).startswith("tools/test_gpu_check.py:")
    assert warned == ["barrier(): using the device under current context"]


def test_rates_are_those_of_the_counted_operations() -> None:
    environment = {"memory_gib": 79.6, "matmul": 800e12}
    found = plan.Measured(2, 2.0, peak=20.25, flops=800e12, waits=12.5, notes=["bf16"])
    line = table.line(plan.Result("row", "passed", measured=found), environment)
    assert line == "| row | 2 | 2 | 20.2 | 400 | 50% | 12.5 | passed; bf16 |"
    failed = table.line(plan.Result("row", "failed", "a | b"), environment)
    assert failed == "| row | – | – | – | – | – | – | **failed**: a / b |"


def test_a_table_names_card_and_processor() -> None:
    environment = {
        "device": "NVIDIA H200",
        "memory_gib": 139.8,
        "driver": "580",
        "cuda": "13.0",
        "matmul": 785e12,
        "processor": "AMD EPYC, 16 cores",
        "launch": 6.31e-6,
        "python": "3.12.3",
        "versions": {"torch": "2.11.0", "timm": None},
    }
    assert table.described(environment) == (
        "NVIDIA H200; 139.8 GiB, driver 580, CUDA 13.0; product of two 8192 x 8192 bf16 matrices 785 TFLOP/s; "
        "beside AMD EPYC, 16 cores, which launches a small kernel in 6.3 µs; python 3.12.3, torch 2.11.0."
    )


def test_launching_is_timed(bench: measure.Bench) -> None:
    assert 0 < bench.launch() < 1


def test_operations_are_counted_forward_and_backward(bench: measure.Bench) -> None:
    a = torch.ones(4, 8, requires_grad=True)
    b = torch.ones(8, 16, requires_grad=True)

    def step() -> dict[str, torch.Tensor]:
        loss = (a @ b).sum()
        loss.backward()
        return {"loss": loss.detach()}

    found = bench.measure(step, 4)
    assert found.flops == 3 * 2 * 4 * 8 * 16
    assert found.numbers == {"loss": 4 * 8 * 16}
    assert len(found.more["seconds"]) >= 2


def test_kernels_of_the_gpu_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two kernels of 0.6 and 0.3 seconds; neither the CPU's launches nor annotations count."""

    def event(where: DeviceType, nanoseconds: int, annotation: bool = False) -> Any:
        return SimpleNamespace(
            device_type=lambda: where, duration_ns=lambda: nanoseconds, is_user_annotation=lambda: annotation
        )

    events = [
        event(DeviceType.CUDA, 600_000_000),
        event(DeviceType.CPU, 70_000_000),
        event(DeviceType.CUDA, 300_000_000),
        event(DeviceType.CUDA, 900_000_000, annotation=True),
    ]
    kineto = SimpleNamespace(kineto_results=SimpleNamespace(events=lambda: events))
    done: list[Any] = []

    def profile(activities: list[Any]) -> Any:
        done.extend(activities)
        return nullcontext(SimpleNamespace(profiler=kineto))

    monkeypatch.setattr(torch.profiler, "profile", profile)
    monkeypatch.setattr(measure.Bench, "wait", lambda bench: done.append("waited"))
    gpu = measure.Bench(torch.device("cuda"), True, tmp_path)
    assert gpu.kernels(lambda: done.append("step")) == (2, pytest.approx(0.9))
    assert done == [torch.profiler.ProfilerActivity.CUDA, "step", "waited"]


def test_nothing_is_profiled_without_a_gpu(bench: measure.Bench) -> None:
    assert bench.kernels(lambda: pytest.fail("a step was taken")) is None


@pytest.mark.parametrize("there", [True, False])
def test_a_row_says_whether_its_network_is_quantised(
    bench: measure.Bench, monkeypatch: pytest.MonkeyPatch, there: bool
) -> None:
    monkeypatch.setattr(training, "bitsandbytes", lambda: there)
    shipped = load_recipe("sd35-large-24gb")
    settings = load_recipe("sd35-large-24gb", training.overrides(bench, shipped, 1, "sd35-large", None))
    settings = with_checkpointing(settings, [])
    assert training.memory_notes(settings, shipped) == ["checkpointed: nothing", "nf4" if there else "not in nf4"]


@pytest.mark.parametrize("name", ["seconds", "peak", "flops", "waits"])
def test_a_measured_number_that_is_not_finite_is_a_failure(name: str) -> None:
    assert plan.judged("row", plan.Measured(**{name: math.inf}), 1.0).state == "failed"


# -- the comparisons can fail


def test_a_bit_that_differs_is_seen() -> None:
    a = {"w": torch.ones(3), "v": torch.zeros(2)}
    agreement.compare_bits({name: value.clone() for name, value in a.items()}, a)
    b = {"w": torch.tensor([1.0, 1.0, torch.nextafter(torch.tensor(1.0), torch.tensor(2.0))]), "v": torch.zeros(2)}
    with pytest.raises(agreement.DisagreementError, match=r"1 of 2 weights differ: w by 1\.2e-07"):
        agreement.compare_bits(b, a)


def test_losses_apart_are_seen() -> None:
    rows = [{"loss/a": 1.0, "weight/a": 3.0}, {"loss/a": 2.0}]
    agreement.compare_losses([{"loss/a": 1.009}, {"loss/a": 2.0}], rows, 0.01)
    for wrong in (1.02, math.nan):
        with pytest.raises(agreement.DisagreementError, match="apart"):
            agreement.compare_losses([{"loss/a": wrong}, {"loss/a": 2.0}], rows, 0.01)
