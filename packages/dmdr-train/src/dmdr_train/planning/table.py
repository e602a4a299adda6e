"""A plan as text and as JSON. Imports no torch."""

from typing import TYPE_CHECKING, Any

from dmdr_train.planning.gpus import UTILISATION

if TYPE_CHECKING:
    from dmdr_train.planning.plan import Plan

GIB = 2**30


def as_text(name: str, plan: "Plan") -> str:
    """The whole plan, for a terminal."""
    where = f"{plan.gpus} x {plan.gpu.name}" + (f" on each of {plan.nodes} machines" if plan.nodes > 1 else "")
    samples = "1 sample" if plan.micro_batch == 1 else f"{plan.micro_batch} samples"
    lines = [f"{name} on {where}; a GPU computes {samples} at once", ""]
    lines += [f"{'millions of parameters':<32}{'all':>10}{'trained':>10}"]
    lines += [
        f"{role:<32}{each.parameters / 1e6:>10.1f}{each.trained / 1e6:>10.1f}" for role, each in plan.roles.items()
    ]
    for stage in plan.stages:
        lines += ["", f"{f'TFLOP per step, {stage.name}':<42}{stage.total / 1e12:>10.4g}"]
        lines += [f"  {part:<40}{flops / 1e12:>10.4g}" for part, flops in stage.flops.items()]
    lines += ["", f"{'GiB on each GPU':<42}{plan.memory.total / GIB:>10.2f}"]
    lines += [f"  {part:<40}{size / GIB:>10.2f}" for part, size in plan.memory.parts.items() if size]
    lines += [f"  (activations: {plan.memory.moment})", "", *short_lines(plan)]
    return "\n".join(lines) + "\n"


def short_lines(plan: "Plan") -> list[str]:
    """The plan in a few lines: memory, communication, time and cost."""
    size, usable = plan.memory.total / GIB, plan.capacity / GIB
    fits = "it fits" if plan.fits else f"it does not fit; first set {plan.switch}"
    lines = [f"memory: {size:.1f} GiB of {usable:.1f} usable on each GPU: {fits}"]
    if plan.checkpointing is not None:
        lines.append(f"gradient checkpointing: auto is {', '.join(plan.checkpointing) or 'none'}")
    if plan.gpus * plan.nodes > 1:
        sent = ", ".join(f"{stage.sent / 1e9:.3g} GB" for stage in plan.stages)
        lines.append(f"communication: each GPU sends {sent} per step")
    seconds = ", ".join(f"{stage.seconds:.3g} s" for stage in plan.stages)
    steps = sum(stage.steps for stage in plan.stages)
    lines.append(
        f"time: {seconds} per step, {plan.hours:.3g} hours for {steps} steps, "
        f"if a GPU computes at {UTILISATION:.0%} of its peak rate"
    )
    lines += limited_by_launches(plan)
    if plan.cost is not None:
        lines.append(f"cost: {plan.cost:.2f} at {plan.price:g} per GPU and hour")
    if plan.unknown:
        lines.append(f"not counted, since their sizes are not known: {', '.join(plan.unknown)}")
    return lines


def limited_by_launches(plan: "Plan") -> list[str]:
    """A line for the first stage in which the GPU waits for the CPU, if there is one."""
    for stage in plan.stages:
        if stage.launching > stage.computing:
            where = f" in {stage.name}" if len(plan.stages) > 1 else ""
            return [
                f"the CPU limits this{where}: it launches {stage.kernels:,.0f} kernels per step in "
                f"{stage.launching:.3g} s, and the GPU executes them in {stage.computing:.3g} s; more samples at once "
                "(a smaller optim.accumulation, or a larger batch) need few more launches"
            ]
    return []


def as_json(name: str, plan: "Plan") -> dict[str, Any]:
    """The whole plan; bytes, operations and seconds without units."""
    return {
        "recipe": name,
        "gpu": plan.gpu.name,
        "gpus": plan.gpus,
        "nodes": plan.nodes,
        "micro_batch": plan.micro_batch,
        "parameters": {role: {"all": each.parameters, "trained": each.trained} for role, each in plan.roles.items()},
        "stages": [
            {
                "objectives": stage.name,
                "steps": stage.steps,
                "flops_per_step": {**stage.flops, "total": stage.total},
                "bytes_sent_per_step": stage.sent,
                "seconds_per_step": stage.seconds,
                "seconds_computing": stage.computing,
                "seconds_launching": stage.launching,
                "kernels_per_step": stage.kernels,
            }
            for stage in plan.stages
        ],
        "bytes_per_gpu": {**plan.memory.parts, "total": plan.memory.total},
        "activations_at": plan.memory.moment,
        "usable_bytes": plan.capacity,
        "fits": plan.fits,
        "first_switch": plan.switch or None,
        "checkpointing": plan.checkpointing,
        "utilisation": UTILISATION,
        "hours": plan.hours,
        "cost": plan.cost,
        "not_counted": plan.unknown,
    }
