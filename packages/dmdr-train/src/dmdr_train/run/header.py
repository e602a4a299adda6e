"""The first lines of a run: what is trained, on what, in which steps, where it goes, and what the plan says."""

from collections.abc import Iterable, Sequence
from typing import Any

from dmdr_models.base.picture_size import size_text
from torch import nn

from dmdr_train.base.versions import versions
from dmdr_train.distributed.deepspeed_internals import full_size
from dmdr_train.recipe.schema import Recipe
from dmdr_train.training.trainer import Trainer


def header(settings: Recipe, trainer: Trainer, plan: Sequence[str]) -> str:
    """The header of a run, one line per fact.

    Args:
        plan: the lines of the plan; empty where there is none.
    """
    step, run = trainer.step, settings.run
    lines = [("model", teacher(settings, trainer)), ("student", student(settings))]
    lines += [("", f"{role}: {size}") for role, size in roles(settings, trainer).items()]
    lines += [("batch", batch(settings, trainer)), *labelled("stages", stages(settings))]
    lines += [("output", f"{run.output}" + (f", resumed at step {step}" if step else "")), *labelled("plan", plan)]
    return "\n".join([f"dmdr-train {versions()['dmdr-train']}", *(f"  {name:<9}{text}" for name, text in lines)])


def labelled(name: str, lines: Iterable[str]) -> list[tuple[str, str]]:
    """The lines, the first of which has the name."""
    return [("" if i else name, line) for i, line in enumerate(lines)]


def teacher(settings: Recipe, trainer: Trainer) -> str:
    """The teacher and the sizes of its pictures."""
    sizes = [size.shape for size in settings.model.sizes] or [trainer.family.size]
    loras = len(settings.model.teacher_loras)
    more = f" with {loras} LoRA{'s' if loras > 1 else ''}" if loras else ""
    return f"{settings.model.family} in {settings.model.path}{more}, {', '.join(map(size_text, sizes))} pixels"


def student(settings: Recipe) -> str:
    """What the student is, and what it starts from."""
    steps, lora = settings.rollout.steps, settings.model.generator_lora
    kind = "all weights" if lora is None else f"LoRA of rank {lora.rank}"
    source = settings.run.init_from or settings.model.generator or (lora and lora.start) or "the teacher"
    optim = settings.optim
    how = f"{optim.precision}, ZeRO {optim.zero_stage}" + (", 8-bit AdamW" if optim.eight_bit else "")
    return f"{steps} step{'s' if steps > 1 else ''} ({settings.rollout.mode}), {kind}, from {source}; {how}"


def roles(settings: Recipe, trainer: Trainer) -> dict[str, str]:
    """The parameters of each network by its role, in words."""
    generator, fake_score = trainer.generator.module, trainer.guidance.module
    found = {"generator": sized(generator), "fake score": sized(fake_score)}
    if settings.shares_backbone:  # then these two are the LoRAs alone
        frozen = [p for p in generator.base.parameters() if not p.requires_grad]
        found = {"network under both LoRAs": sized(nn.ParameterList(frozen)), **found}
    decoder = getattr(trainer.family, "vae", None)
    if isinstance(decoder, nn.Module):
        found["decoder"] = sized(decoder)
    return found | {f"reward {reward.info.name}": size for reward in trainer.rewards if (size := reward_size(reward))}


def reward_size(reward: Any) -> str:
    """The parameters of a reward's networks in words; empty where it has none here, such as behind an endpoint."""
    parts = [getattr(part, "module", part) for part in vars(reward).values()]
    networks = nn.ModuleList(part for part in parts if isinstance(part, nn.Module))
    return sized(networks) if any(True for _ in networks.parameters()) else ""


def sized(network: Any) -> str:
    """The number of a network's parameters, and how many of them are trained."""
    every = sum(map(full_size, network.parameters()))
    trained = sum(full_size(parameter) for parameter in network.parameters() if parameter.requires_grad)
    return f"{short(every)} parameters, " + (f"{short(trained)} trained" if trained else "frozen")


def short(number: float) -> str:
    """A count with three digits: 532, 1.28 M, 8.06 B."""
    for size, unit in ((1e9, " B"), (1e6, " M"), (1e3, " k")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:g}"


def batch(settings: Recipe, trainer: Trainer) -> str:
    """How the global batch is divided."""
    optim, world = settings.optim, trainer.world
    each = optim.batch_size // world // optim.accumulation
    processes = f"{world} process{'es' if world > 1 else ''} on {trainer.device.type}"
    updates = settings.rollout.updates
    more = f", up to {updates} updates of the generator for each rollout" if updates > 1 else ""
    return f"{optim.batch_size} = {each} per process x {optim.accumulation} accumulated x {processes}{more}"


def stages(settings: Recipe) -> list[str]:
    """Each stage with its steps and the objectives that take part."""
    lines, start = [], 0
    for name, end in settings.stages.items():
        active = [
            described(each, objective)
            for each, objective in zip(settings.names, settings.objectives, strict=True)
            if max(start, objective.start) < min(end, objective.span(settings.run.steps).stop)
        ]
        lines.append(f"{name.replace('_', ' ')}, steps {start + 1} to {end}: {', '.join(active) or 'nothing'}")
        start = end
    return lines


def described(name: str, objective: Any) -> str:
    """An objective with its weight and its reward."""
    reward = getattr(objective, "reward", None)
    weight = "" if objective.weight == 1 else f"weight {objective.weight}"
    details = ", ".join(filter(None, [reward.name if reward is not None else "", weight]))
    return f"{name} ({details})" if details else name
