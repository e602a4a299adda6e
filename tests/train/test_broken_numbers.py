"""Losses and gradients that are not finite: their updates are skipped, and a run that only skips stops."""

from typing import Any

import pytest
import torch
from dmdr_train.base.errors import StoppedError
from dmdr_train.distributed.deepspeed_internals import gathered
from dmdr_train.run.runner import Run
from dmdr_train.tracking.metrics_file import read_metrics
from safetensors.torch import load_file

pytestmark = pytest.mark.usefixtures("one_process")


def broken_loss(run: Run, value: float, steps: tuple[int, ...]) -> list[Any]:
    """Add a value to the loss at these steps; returns the prompts of every sample, as a list that grows."""
    drawn: list[Any] = []
    objective: Any = run.trainer.objectives[0]
    compute = type(objective).__call__

    class Broken(type(objective)):  # type: ignore[misc]
        def __call__(self, sample: Any, guide: Any) -> Any:
            drawn.append(sample.prompts)
            loss, logs = compute(self, sample, guide)
            return (loss + value if sample.step in steps else loss), logs

    objective.__class__ = Broken
    return drawn


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_an_update_that_is_not_finite_is_skipped(make_run: Any, precision: str, stage: int, value: float) -> None:
    run = make_run(optim__zero_stage=stage, optim__precision=precision)
    drawn = broken_loss(run, value, (0,))
    parameters = dict(run.trainer.generator.module.named_parameters())
    with gathered(parameters.values()):
        before = [p.detach().clone() for p in parameters.values()]
    run.trainer.train_step()
    assert run.trainer.trouble == [("distribution_matching", drawn[-1])]
    assert (run.trainer.generator.skipped_steps, run.trainer.guidance.skipped_steps) == (1, 0)
    with gathered(parameters.values()):
        assert all(torch.equal(p, b) for p, b in zip(parameters.values(), before, strict=True))
    run.trainer.train_step()
    assert run.trainer.trouble == []
    assert run.trainer.generator.skipped_steps == 1
    with gathered(parameters.values()):
        after = list(parameters.values())
        assert all(p.isfinite().all() for p in after)
        assert any(not torch.equal(p, b) for p, b in zip(after, before, strict=True))


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("stage", [0, 2])
def test_an_update_of_the_fake_score_that_is_not_finite_is_skipped(make_run: Any, stage: int, value: float) -> None:
    """Also where its gradient would be."""
    run = make_run(optim__zero_stage=stage)
    compute = run.trainer.guide.loss
    run.trainer.guide.loss = lambda sample: compute(sample) + value
    run.trainer.train_step()
    assert (run.trainer.generator.skipped_steps, run.trainer.guidance.skipped_steps) == (0, 1)
    assert run.trainer.trouble == [("fake_score", run.trainer.trouble[0][1])]


def test_a_gradient_inside_the_network_counts(make_run: Any) -> None:
    run = make_run()
    parameter = next(p for p in run.trainer.guidance.module.parameters() if p.requires_grad)
    hook = parameter.register_hook(lambda gradient: gradient * float("nan"))
    run.trainer.train_step()
    assert (run.trainer.generator.skipped_steps, run.trainer.guidance.skipped_steps) == (0, 1)
    assert run.skipped == 1
    hook.remove()
    run.trainer.train_step()
    assert run.skipped == 1


def test_the_run_stops_when_it_does_not_end(make_run: Any) -> None:
    run = make_run(run__max_skipped=2, run__steps=9)
    drawn = broken_loss(run, float("nan"), (0, 2, 3))
    with pytest.raises(StoppedError) as caught:
        run.carry_out()
    assert caught.value.code == 65
    prompts = ", ".join(map(repr, drawn[-1]))
    assert str(caught.value) == (
        f"2 steps in a row were skipped, since a loss or gradient was not finite: distribution_matching for {prompts}; "
        f"saved in {run.folder}/checkpoints/step-00000004"
    )
    rows = read_metrics(run.folder)
    assert [row["skipped/generator"] for row in rows] == [1, 1, 2, 3]
    for tensor in load_file(run.folder / "checkpoints/step-00000004/generator.safetensors").values():
        assert tensor.isfinite().all()
