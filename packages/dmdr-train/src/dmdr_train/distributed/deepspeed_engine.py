"""Make a DeepSpeed engine with AdamW, a learning rate schedule, and a check for gradients that are not finite."""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor, nn

from dmdr_train.base.errors import UserError
from dmdr_train.distributed.deepspeed_internals import check_by_norm
from dmdr_train.distributed.master_weights import start_masters
from dmdr_train.recipe.schema import Optim, Optimizer

LARGEST = 2**30
"""Elements of the largest group of parameters.

ZeRO 1 and 2 make one flat tensor of a group, and bitsandbytes takes the number of a tensor's elements as an int32, at
most 2^31 - 1; SDXL's UNet has 2.6 billion weights. Half of that also halves what an update needs. Another value makes
the checkpoints of larger networks unreadable.
"""


def make_engine(
    network: nn.Module,
    optim: Optim,
    settings: Optimizer,
    updates: int,
    device: torch.device,
    offload: Literal["torch", "deepspeed"] | None = None,
) -> Any:
    """Return a DeepSpeed engine for the trainable parameters of `network`, with AdamW and its schedule.

    Trainable parameters in float32 become the master weights without rounding, whatever the precision of the training.

    Args:
        updates: number of optimizer updates in the run; the schedule spans them.
        offload: keep the optimizer's state on the CPU, where this library's AdamW updates it.

    Raises:
        UserError: DeepSpeed's AdamW for the CPU cannot be compiled.
    """
    plain = optim.zero_stage == 0 and optim.precision == "fp32"  # DeepSpeed then does not wrap the optimizer
    fused = {} if optim.eight_bit or offload or device.type == "cpu" else {"fused": True}
    kind = offloaded_adamw if offload == "deepspeed" else adamw(optim.eight_bit, optim.clip if plain else None)
    trained = [p for p in network.parameters() if p.requires_grad]
    optimizer = kind(
        parameter_groups(trained, LARGEST) if optim.zero_stage in (1, 2) else trained,
        lr=settings.lr,
        betas=settings.betas,
        eps=settings.eps,
        weight_decay=settings.weight_decay,
        **fused,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, learning_rate(settings, updates))
    config: dict[str, Any] = {
        "train_batch_size": optim.batch_size,
        "train_micro_batch_size_per_gpu": optim.batch_size // dist.get_world_size() // optim.accumulation,
        "gradient_accumulation_steps": optim.accumulation,
        "gradient_clipping": 0.0 if plain else optim.clip,
        "zero_optimization": {"stage": optim.zero_stage, "reduce_scatter": device.type != "cpu"},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
        "timers": {"throughput": {"enabled": False}},  # would wait for the device around every call
    }
    if offload:
        config["zero_optimization"]["offload_optimizer"] = {
            "device": "cpu",
            "pin_memory": device.type == "cuda",  # copies then run beside the computation
        }
        config["zero_force_ds_cpu_optimizer"] = False
    if optim.precision != "fp32":
        config[optim.precision] = {"enabled": True}
    exact = exact_weights(network) if optim.precision != "fp32" else {}
    engine, *_ = deepspeed.initialize(
        model=network, optimizer=optimizer, lr_scheduler=schedule, config=config, dist_init_required=False
    )
    start_masters(engine, exact)
    check_by_norm(engine)
    return engine


def parameter_groups(parameters: Sequence[nn.Parameter], largest: int) -> list[dict[str, list[nn.Parameter]]]:
    """Return groups of parameters in their order, each with at most `largest` elements, or with a single parameter."""
    groups: list[list[nn.Parameter]] = []
    size = 0
    for parameter in parameters:
        size += parameter.numel()
        if not groups or size > largest:
            groups.append([])
            size = parameter.numel()
        groups[-1].append(parameter)
    return [{"params": group} for group in groups]


def exact_weights(network: nn.Module) -> dict[str, Tensor]:
    """Return a copy, in the CPU's memory, of the trainable parameters that are in float32.

    DeepSpeed casts the network to the precision of the training, and copies the master weights from what is left.
    """
    trained = {name: p.detach() for name, p in network.named_parameters() if p.requires_grad}
    return {name: p.to("cpu", copy=True) for name, p in trained.items() if p.dtype == torch.float32}


def adamw(eight_bit: bool, clip: float | None = None) -> Any:
    """Return the class of the optimizer.

    Args:
        clip: return a subclass that itself clips gradients to this norm, and skips steps in which it is not finite.
    """
    if eight_bit:
        import bitsandbytes

        kind = bitsandbytes.optim.AdamW8bit
    else:
        kind = torch.optim.AdamW
    return kind if clip is None else type("Clipped" + kind.__name__, (Clips, kind), {"clip": clip})


def offloaded_adamw(parameters: Any, **options: Any) -> torch.optim.Optimizer:
    """Make DeepSpeed's AdamW for weights in the CPU's memory; the first use on a machine compiles it.

    Raises:
        UserError: it cannot be compiled.
    """
    try:
        return deepspeed.ops.adam.DeepSpeedCPUAdam(parameters, **options)
    except RuntimeError as error:
        why = " ".join(str(error.__cause__ or error).split())[:200]
        raise UserError("memory.offloaded_adam", f"deepspeed's cannot be compiled here ({why}); use torch") from error


class Clips:
    """Clips gradients by their norm, and skips a step in which it is not finite, as DeepSpeed's own optimizers do.

    DeepSpeed reads `overflow`, which says whether the last step was skipped.
    """

    clip: float
    overflow = False

    def step(self, closure: Any = None) -> Any:
        trained = [p for group in self.param_groups for p in group["params"]]  # type: ignore[attr-defined]
        self.overflow = not math.isfinite(nn.utils.clip_grad_norm_(trained, self.clip).item())
        return None if self.overflow else super().step(closure)  # type: ignore[misc]


def learning_rate(settings: Optimizer, updates: int) -> Callable[[int], float]:
    """Return the learning rate's factor by update: linear warm-up, then constant or cosine to 0 at `updates`."""

    def factor(update: int) -> float:
        warm = min(1.0, (update + 1) / (settings.warmup + 1))
        if settings.schedule == "constant":
            return warm
        return warm * 0.5 * (1 + torch.cos(torch.tensor(torch.pi * min(1.0, update / max(1, updates)))).item())

    return factor
