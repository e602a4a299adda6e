"""DeepSpeed against plain PyTorch: the same AdamW, clipping, schedule and accumulation, at every ZeRO stage."""

import math
from typing import Any

import pytest
import torch
from dmdr_train.base.errors import UserError
from dmdr_train.distributed import deepspeed_engine
from dmdr_train.distributed.deepspeed_engine import LARGEST, learning_rate, make_engine, parameter_groups
from dmdr_train.distributed.deepspeed_internals import gathered
from dmdr_train.distributed.device import allow_tf32, choose_device
from dmdr_train.recipe.schema import Optim, Optimizer, Run
from torch import Tensor, nn

UPDATES = 5
SETTINGS = Optimizer(lr=0.02, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1, schedule="cosine", warmup=2)


def network() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2))
    made[2].requires_grad_(False)
    return made


def batch(update: int, part: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 * update + part)
    return torch.randn(2, 3, generator=generator), 20 * torch.randn(2, 2, generator=generator)


def by_hand(clip: float) -> dict[str, Tensor]:
    """AdamW from its paper (arXiv 1711.05101), in float64; two halves of a batch at every update."""
    made = network().double()
    trained = {name: p for name, p in made.named_parameters() if p.requires_grad}
    m = {name: torch.zeros_like(p) for name, p in trained.items()}
    s = {name: torch.zeros_like(p) for name, p in trained.items()}
    (b1, b2), eps = SETTINGS.betas, SETTINGS.eps
    for update in range(3):
        made.zero_grad()
        for part in range(2):
            x, y = batch(update, part)
            ((made(x.double()) - y.double()).square().mean() / 2).backward()
        norm = math.sqrt(sum(p.grad.square().sum().item() for p in trained.values() if p.grad is not None))
        assert norm > 1.5 * clip, "clipping must have something to do"
        lr = SETTINGS.lr * min(1, (update + 1) / 3) * 0.5 * (1 + math.cos(math.pi * update / UPDATES))
        with torch.no_grad():
            for name, p in trained.items():
                assert p.grad is not None
                g = p.grad * min(1.0, clip / norm)
                p *= 1 - lr * SETTINGS.weight_decay
                m[name] = b1 * m[name] + (1 - b1) * g
                s[name] = b2 * s[name] + (1 - b2) * g**2
                mean, square = m[name] / (1 - b1 ** (update + 1)), s[name] / (1 - b2 ** (update + 1))
                p -= lr * mean / (square.sqrt() + eps)
    return {name: p.detach() for name, p in made.named_parameters()}


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("largest", [24, LARGEST], ids=["three groups of parameters", "one group"])
def test_every_zero_stage_is_plain_adamw(
    one_process: None, monkeypatch: pytest.MonkeyPatch, stage: int, largest: int
) -> None:
    monkeypatch.setattr(deepspeed_engine, "LARGEST", largest)
    optim = Optim(batch_size=4, accumulation=2, generator=SETTINGS, fake_score=SETTINGS, clip=0.5, zero_stage=stage)
    engine = make_engine(network(), optim, SETTINGS, UPDATES, torch.device("cpu"))
    for update in range(3):
        for part in range(2):
            x, y = batch(update, part)
            engine.backward((engine(x) - y).square().mean())
            engine.step()
    expected = by_hand(0.5)
    for name, parameter in engine.module.named_parameters():
        with gathered([parameter]):
            found = parameter.detach().double().clone()
        torch.testing.assert_close(found, expected[name], rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
    assert engine.get_lr()[0] == pytest.approx(SETTINGS.lr * 0.5 * (1 + math.cos(math.pi * 3 / UPDATES)))


def test_no_flat_tensor_is_larger_than_bitsandbytes_can_count() -> None:
    """Its kernels take the number of elements as an int32. With ZeRO 1 and 2 a group becomes one tensor."""
    sizes = [3, 4, 2, 9, 1, 8, 8]
    parameters = [nn.Parameter(torch.empty(size, device="meta")) for size in sizes]
    groups = [[p.numel() for p in group["params"]] for group in parameter_groups(parameters, 8)]
    assert groups == [[3, 4], [2], [9], [1], [8], [8]]
    assert LARGEST < 2**31
    whole = [nn.Parameter(torch.empty(2**28, 10, device="meta"))]
    assert parameter_groups(whole, LARGEST) == [{"params": whole}]


@pytest.mark.parametrize(("stage", "groups"), [(0, 1), (1, 3), (2, 3), (3, 1)])
def test_parameters_are_in_groups_where_zero_makes_them_flat(
    one_process: None, monkeypatch: pytest.MonkeyPatch, stage: int, groups: int
) -> None:
    monkeypatch.setattr(deepspeed_engine, "LARGEST", 24)
    optim = Optim(batch_size=4, generator=SETTINGS, fake_score=SETTINGS, zero_stage=stage)
    engine = make_engine(network(), optim, SETTINGS, UPDATES, torch.device("cpu"))
    assert len(engine.optimizer.param_groups) == groups


def test_learning_rates() -> None:
    def factors(count: int, **settings: Any) -> list[float]:
        return [learning_rate(Optimizer(lr=1.0, **settings), 4)(update) for update in range(count)]

    assert factors(3) == [1, 1, 1]
    assert factors(5, warmup=3) == pytest.approx([0.25, 0.5, 0.75, 1, 1])
    assert factors(6, schedule="cosine") == pytest.approx([1, 0.8535534, 0.5, 0.1464466, 0, 0], abs=1e-6)


def test_devices() -> None:
    def device(name: str, precision: str = "fp32", eight_bit: bool = False) -> torch.device:
        run = Run.model_validate({"output": "out", "steps": 1, "device": name})
        return choose_device(run, precision, eight_bit)

    assert device("auto") == device("cpu") == device("auto", "bf16") == torch.device("cpu")
    for name in ("auto", "cpu"):
        with pytest.raises(UserError, match=r"optim.precision: fp16 does not train on a CPU; use fp32 or bf16"):
            device(name, "fp16")
        with pytest.raises(UserError, match=r"optim.eight_bit: true needs a GPU and there is none here; set it to"):
            device(name, eight_bit=True)
    with pytest.raises(UserError, match=r"run.device: cuda is not available here; use cpu or auto"):
        device("cuda")


def test_tf32_is_for_a_gpu_and_for_a_recipe_that_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(torch, "set_float32_matmul_precision", said.append)
    for kind, tf32 in (("cpu", True), ("cuda", True), ("cuda", False)):
        optim = Optim(batch_size=1, generator=SETTINGS, fake_score=SETTINGS, tf32=tf32)
        allow_tf32(optim, torch.device(kind))
    assert said == ["high", "highest"]


def test_the_device_is_the_one_that_deepspeed_found(monkeypatch: pytest.MonkeyPatch) -> None:
    class Found:
        def device_name(self) -> str:
            return "cuda"

    monkeypatch.setattr("dmdr_train.distributed.device.get_accelerator", Found)
    monkeypatch.setenv("LOCAL_RANK", "3")
    for name in ("auto", "cuda"):
        run = Run.model_validate({"output": "out", "steps": 1, "device": name})
        assert choose_device(run, "fp16", eight_bit=True) == torch.device("cuda", 3)
    run = Run.model_validate({"output": "out", "steps": 1, "device": "cpu"})
    assert choose_device(run, "fp32") == torch.device("cpu")


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_fp16_skips_what_overflows(one_process: None, monkeypatch: pytest.MonkeyPatch, stage: int) -> None:
    """DeepSpeed's loss scaling, which it would refuse on a CPU: an overflow is counted, and changes no weight."""
    from deepspeed.accelerator import get_accelerator

    monkeypatch.setattr(type(get_accelerator()), "is_fp16_supported", lambda self: True)
    optim = Optim(batch_size=2, generator=SETTINGS, fake_score=SETTINGS, precision="fp16", zero_stage=stage)
    engine = make_engine(nn.Linear(3, 2), optim, SETTINGS, UPDATES, torch.device("cpu"))
    assert engine.optimizer.loss_scale == 2**16
    moved = []
    for size in (1e4, 1e4, 1.0):
        with gathered(engine.module.parameters()):
            before = engine.module.weight.detach().clone()
        engine.backward(engine(size * torch.ones(2, 3, dtype=torch.float16)).float().square().mean())
        engine.step()
        with gathered(engine.module.parameters()):
            moved.append(not torch.equal(engine.module.weight, before))
    assert moved == [False, False, True]
    assert engine.skipped_steps == 2
    assert engine.optimizer.loss_scale in (2**15, 2**14)  # one of the optimizers forgives the first


@pytest.mark.parametrize(("kind", "pinned"), [("cpu", False), ("cuda", True)])
def test_offloaded_state_is_pinned_where_it_is_copied_to_a_gpu(
    one_process: None, monkeypatch: pytest.MonkeyPatch, kind: str, pinned: bool
) -> None:
    def initialize(**given: Any) -> None:
        raise InterruptedError(given["config"]["zero_optimization"]["offload_optimizer"])

    monkeypatch.setattr("deepspeed.initialize", initialize)
    optim = Optim(batch_size=4, generator=SETTINGS, fake_score=SETTINGS, zero_stage=2)
    with pytest.raises(InterruptedError) as asked:
        make_engine(network(), optim, SETTINGS, UPDATES, torch.device(kind), offload="torch")
    assert asked.value.args[0] == {"device": "cpu", "pin_memory": pinned}


def test_the_offloaded_adamw_is_the_recipes_choice(one_process: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed's needs a compiler, so a stand-in takes its place here."""
    made: list[dict[str, Any]] = []

    class Compiled(torch.optim.AdamW):
        def __init__(self, parameters: Any, **options: Any):
            made.append(options)
            super().__init__(parameters, **options)

    class Uncompiled:
        def __init__(self, *_: Any, **__: Any):
            raise RuntimeError("failed to build") from OSError("no compiler\nhere")

    optim = Optim(batch_size=4, generator=SETTINGS, fake_score=SETTINGS, zero_stage=2)

    def engine(offload: Any) -> Any:
        return make_engine(network(), optim, SETTINGS, UPDATES, torch.device("cpu"), offload)

    monkeypatch.setattr("deepspeed.ops.adam.DeepSpeedCPUAdam", Compiled)
    assert type(engine("torch").optimizer.optimizer) is torch.optim.AdamW
    assert type(engine("deepspeed").optimizer.optimizer) is Compiled
    assert made == [{"lr": 0.02, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}]
    monkeypatch.setattr("deepspeed.ops.adam.DeepSpeedCPUAdam", Uncompiled)
    with pytest.raises(UserError, match=r"^memory.offloaded_adam: .* here \(no compiler here\); use torch$"):
        engine("deepspeed")
