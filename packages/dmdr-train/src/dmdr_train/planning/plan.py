"""The plan of a recipe: parameters, operations, memory, communication, time and cost, before anything is paid for."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from dmdr_train.base.errors import UserError
from dmdr_train.planning.checkpointing import fitted
from dmdr_train.planning.costs import Costs, Role, costs_of
from dmdr_train.planning.gpus import GPU, KERNELS_PER_TENSOR, LAUNCH
from dmdr_train.planning.memory import Memory, memory, sent_bytes
from dmdr_train.planning.schedule import Calls, Stage, calls, in_stage, stages, takes_gradient
from dmdr_train.planning.straggling import extra_predictions, longest
from dmdr_train.recipe.objective_kinds import needs
from dmdr_train.recipe.schema import Recipe
from dmdr_train.recipe.step_work import passes

USABLE = 0.95
"""The share of a GPU's memory that a plan may fill; the CUDA context and fragments take the rest."""


@dataclass(frozen=True)
class StagePlan:
    """A stage of training.

    Attributes:
        flops: the operations of one step by part, over the whole batch.
        sent: the bytes that a GPU sends in a step.
        computing: seconds of a step in which a GPU executes kernels.
        kernels: the kernels that the CPU launches on one GPU in a step.
    """

    name: str
    steps: int
    flops: dict[str, float]
    sent: int
    computing: float
    kernels: float

    @property
    def total(self) -> float:
        return sum(self.flops.values())

    @property
    def launching(self) -> float:
        """Seconds that the CPU takes to launch the kernels of a step, while the GPU executes earlier ones."""
        return self.kernels * LAUNCH

    @property
    def seconds(self) -> float:
        """Seconds of a step: the slower of the two, computing and launching."""
        return max(self.computing, self.launching)


@dataclass(frozen=True)
class Plan:
    """The plan of a recipe on `gpus` GPUs of each of `nodes` machines.

    Attributes:
        micro_batch: samples that a GPU computes at once.
        memory: the bytes on one GPU.
        capacity: the bytes that one GPU offers.
        switch: the override that helps most where memory does not suffice; empty if it does.
        price: of a GPU for an hour, or None.
        unknown: rewards of plug-ins that are not counted.
        checkpointing: what `memory.gradient_checkpointing: auto` becomes; None where the recipe names the parts.
    """

    gpu: GPU
    gpus: int
    nodes: int
    micro_batch: int
    roles: dict[str, Role]
    stages: list[StagePlan]
    memory: Memory
    capacity: int
    switch: str
    price: float | None
    unknown: list[str]
    checkpointing: list[str] | None = None

    @property
    def fits(self) -> bool:
        return self.memory.total <= self.capacity

    @property
    def hours(self) -> float:
        """Hours of training, without samples, evaluation and checkpoints."""
        return sum(stage.steps * stage.seconds for stage in self.stages) / 3600

    @property
    def cost(self) -> float | None:
        return None if self.price is None else self.hours * self.gpus * self.nodes * self.price


def make_plan(
    settings: Recipe,
    gpu: GPU,
    gpus: int = 1,
    nodes: int = 1,
    gpu_memory: float | None = None,
    price: float | None = None,
) -> Plan:
    """Plan a recipe.

    Args:
        gpu_memory: of one GPU, in GB; None takes what the GPU has.

    Raises:
        UserError: the batch cannot be divided, or a model's sizes are not known.
    """
    world, optim = gpus * nodes, settings.optim
    if optim.batch_size % (world * optim.accumulation):
        raise UserError(
            "--gpus",
            f"optim.batch_size {optim.batch_size} does not divide into {world} GPUs x optim.accumulation "
            f"{optim.accumulation}; give another number of GPUs, or set optim.accumulation",
        )
    capacity = int((gpu_memory if gpu_memory is not None else gpu.memory) * 1e9 * USABLE)
    automatic = settings.memory.gradient_checkpointing == "auto"
    settings, costs = fitted(settings, world, capacity)
    found = memory(settings, costs, world)
    return Plan(
        gpu,
        gpus,
        nodes,
        optim.batch_size // (world * optim.accumulation),
        costs.roles,
        [stage_plan(settings, costs, stage, gpu, world) for stage in stages(settings)],
        found,
        capacity,
        "" if found.total <= capacity else first_switch(settings, costs, world, capacity),
        price,
        costs.unknown,
        list(settings.memory.gradient_checkpointing) if automatic else None,
    )


def stage_plan(settings: Recipe, costs: Costs, stage: Stage, gpu: GPU, world: int) -> StagePlan:
    """The plan of one stage."""
    flops = step_flops(settings, costs, stage)
    waited = extra_predictions(in_stage(settings, stage), world) * costs.generator.forward
    seconds = (sum(flops.values()) / world + waited) / gpu.rate(settings.optim.precision)
    sent = sent_bytes(settings, costs, calls(settings, stage), world)
    return StagePlan(stage.name, stage.steps, flops, sent, seconds, step_kernels(settings, costs, stage, world))


def step_flops(settings: Recipe, costs: Costs, stage: Stage) -> dict[str, float]:
    """Operations of one step by part, over the whole batch: the mean over the random lengths of rollouts."""
    made, batch = calls(settings, stage), settings.optim.batch_size
    asked, decoder, fake_score = made.predictions, costs.decoder, costs.fake_score
    per_sample = {
        "rollouts": asked["generator"] * costs.generator.forward,
        "generator": asked["generator trained"] * costs.generator.both,
        "fake score": asked["fake_score trained"] * fake_score.both + asked["fake_score"] * fake_score.forward,
        "teacher": asked["teacher"] * costs.teacher.forward,
        "decoder": (made.decodings + made.other_decodings) * decoder.forward
        + made.decoding_backwards * decoder.backward,
        "rewards": sum(reward_flops(settings, costs, i) * times_scored(section, made)
                       for i, section in enumerate(settings.objectives) if section in stage.objectives),
        "text encoders": made.encodings * costs.texts,
    }  # fmt: skip
    return {name: float(batch * flops) for name, flops in per_sample.items() if flops}


def step_kernels(settings: Recipe, costs: Costs, stage: Stage, world: int) -> float:
    """Kernels that the CPU launches on each of `world` GPUs in a step, the mean over the random lengths of rollouts.

    Samples that are computed at once share them. The texts of rewards and of the model are left out, and so are losses.
    """
    made, decoder, optim = calls(settings, stage), costs.decoder, settings.optim
    at_once = optim.batch_size // (world * optim.accumulation)
    rollout = settings.rollout
    made_in = passes(in_stage(settings, stage), longest(rollout.positions, rollout.steps, at_once))
    networks = (
        made_in["generator"] * costs.generator.kernels
        + made_in["generator trained"] * costs.generator.both_kernels
        + made_in["fake_score trained"] * costs.fake_score.both_kernels
        + made_in["fake_score"] * costs.fake_score.kernels
        + made_in["teacher"] * costs.teacher.kernels
    )
    pictures = (made.decodings + made.other_decodings) * decoder.kernels
    pictures += made.decoding_backwards * decoder.backward_kernels
    for i, section in enumerate(settings.objectives):
        if section in stage.objectives and i in costs.rewards:
            image = costs.rewards[i].image
            pictures += times_scored(section, made) * (image.both_kernels if takes_gradient(section) else image.kernels)
    tensors: float = made.updates * costs.roles["generator"].trained_tensors
    tensors += made_in["fake_score trained"] * costs.roles["fake_score"].trained_tensors
    return optim.accumulation * (networks + pictures + KERNELS_PER_TENSOR * tensors)


def times_scored(section: Any, made: Calls) -> int:
    """How often a step asks an objective's reward; all updates share the final pictures."""
    return 1 if "final_pictures" in needs(section) else made.updates


def reward_flops(settings: Recipe, costs: Costs, place: int) -> int:
    """Operations of the reward of an objective for one sample, with the gradient at the picture if it is taken."""
    if place not in costs.rewards:
        return 0
    found, section = costs.rewards[place], settings.objectives[place]
    texts = 2 if "reward_of_texts" in needs(section) else 1  # SRPO compares two
    image = found.image.both if takes_gradient(section) else found.image.forward
    return image + texts * found.text


def first_switch(settings: Recipe, costs: Costs, world: int, capacity: int) -> str:
    """The first switch that alone makes the recipe fit; otherwise the one that saves most."""
    best, least = "", memory(settings, costs, world).total
    for override, changed, recount in switches(settings, costs, world):
        total = memory(changed, costs_of(changed) if recount else costs, world).total
        if total <= capacity:
            return override
        if total < least:
            best, least = override, total
    return f"{best}, which alone is not enough" if best else "nothing: more or larger GPUs are needed"


def switches(settings: Recipe, costs: Costs, world: int) -> Iterator[tuple[str, Recipe, bool]]:
    """What saves memory, the cheapest in time first: override, changed recipe, and whether it changes costs."""
    optim, kept = settings.optim, settings.memory
    if "text encoders" in costs.roles and not kept.offload_text_encoders:
        yield "memory.offload_text_encoders=true", with_memory(settings, offload_text_encoders=True), False
    if world > 1 and optim.zero_stage < 2:
        yield "optim.zero_stage=2", with_optim(settings, zero_stage=2), False
    if not optim.eight_bit:
        yield "optim.eight_bit=true", with_optim(settings, eight_bit=True), False
    for parts in range(optim.accumulation + 1, optim.batch_size // world + 1):
        if optim.batch_size % (world * parts) == 0:
            yield f"optim.accumulation={parts}", with_optim(settings, accumulation=parts), False
    if optim.zero_stage and not kept.offload_optimizer:
        yield "memory.offload_optimizer=true", with_memory(settings, offload_optimizer=True), False
    for parts_now in more_checkpointing(kept.gradient_checkpointing, kept.checkpointed_blocks):
        name = f"memory.gradient_checkpointing=[{','.join(parts_now)}]"
        yield name, with_memory(settings, gradient_checkpointing=parts_now), True


def more_checkpointing(parts: Sequence[str], every: int) -> Iterator[list[str]]:
    """`memory.gradient_checkpointing` with one part more, or with more of the network's blocks than each `every`-th."""
    others = [part for part in parts if not part.startswith("network")]
    for blocks, part in ((4, "network/4"), (2, "network/2"), (1, "network")):
        if every == 0 or blocks < every:
            yield [*others, part]
    for part in ("vae", "rewards"):
        if part not in parts:
            yield [*parts, part]


def with_memory(settings: Recipe, **changes: Any) -> Recipe:
    return settings.model_copy(update={"memory": settings.memory.model_copy(update=changes)})


def with_optim(settings: Recipe, **changes: Any) -> Recipe:
    return settings.model_copy(update={"optim": settings.optim.model_copy(update=changes)})
