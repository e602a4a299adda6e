"""The bytes that a recipe needs on each GPU, and what its processes send each other."""

from dataclasses import dataclass

from dmdr_train.distributed.deepspeed_engine import LARGEST
from dmdr_train.planning.costs import Costs
from dmdr_train.planning.schedule import Calls
from dmdr_train.recipe.schema import Recipe

BUCKET = 500_000_000
"""Elements of the buffer in which DeepSpeed's ZeRO 1 and 2 collect gradients, its `reduce_bucket_size`."""
LIVE = 1_000_000_000
"""Elements that ZeRO 3 keeps gathered at most, its `stage3_max_live_parameters`."""
ITEM = {"fp32": 4, "bf16": 2, "fp16": 2}


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU by part; `activations` are those of the most expensive moment, which `moment` names."""

    parts: dict[str, int]
    moment: str

    @property
    def total(self) -> int:
        return sum(self.parts.values())


def memory(settings: Recipe, costs: Costs, world: int) -> Memory:
    """The bytes on one of `world` GPUs at the most expensive moment of a step."""
    batch = settings.optim.batch_size // (world * settings.optim.accumulation)
    engines = [costs.roles[name].trained for name in ("generator", "fake_score")]
    by_moment = moments(settings, costs, batch)
    by_moment["update"] = max(update_bytes(settings, trained, world) for trained in engines)
    moment = max(by_moment, key=lambda name: by_moment[name])
    item, roles = ITEM[settings.optim.precision], costs.roles
    split = world if settings.optim.zero_stage == 3 else 1
    networks = [roles[name] for name in ("generator", "fake_score", "teacher") if name in roles]
    parts = {
        "frozen weights": sum(role.frozen for role in networks) // split,
        "trained weights": sum(engines) * item // split,
        "frozen copies": len(settings.needing("frozen_copy")) * roles["generator"].trained * item,
        "gradients": sum(gradient_bytes(settings, trained, world) for trained in engines) + bucket(settings),
        "master weights and optimizer": sum(optimizer_bytes(settings, trained, world) for trained in engines),
        "decoder": roles["decoder"].frozen if "decoder" in roles else 0,
        "rewards": roles["rewards"].frozen if "rewards" in roles else 0,
        "text encoders": 0 if settings.memory.offload_text_encoders else encoder_bytes(costs),
        "activations": by_moment[moment],
    }
    if split > 1:
        parts["gathered weights"] = min(max(role.parameters for role in networks), LIVE) * item
    return Memory(parts, moment)


def moments(settings: Recipe, costs: Costs, batch: int) -> dict[str, int]:
    """The bytes of activations at each moment of a step, by its name; for a micro-batch of `batch` samples."""
    before = settings.rollout.steps - 1 if settings.rollout.through else 0  # steps that gradients flow through
    found = {"backward pass of the generator": costs.generator.peak + before * costs.generator.held}
    held = costs.generator.held * (1 + before)
    matching = bool(settings.matching)
    if matching:
        found["backward pass of the fake score"] = costs.fake_score.peak
        if settings.guidance.self_consistency:
            found["self-consistency of the fake score"] = costs.fake_score.held + costs.teacher.peak_forward
        guided = settings.guidance.cfg != 1.0 or settings.guidance.cfg_jitter > 0
        asked = [section.teacher_predictions(guided) for section in settings.needing("fake_score").values()]
        found["guidance of the teacher"] = held + min(max(asked), 2) * costs.teacher.peak_forward  # in one call
    images = [reward.image for reward in costs.rewards.values()]
    if images or costs.decoder.forward:
        kept = max((image.held for image in images), default=0)
        found["decoding"] = held + costs.decoder.peak + kept
        found["scoring"] = held + costs.decoder.held + max((image.peak for image in images), default=0) + kept
    return {name: size * batch for name, size in found.items()}


def shards(settings: Recipe, world: int) -> int:
    """The number of processes that share an optimizer's state."""
    return world if settings.optim.zero_stage else 1


def optimizer_bytes(settings: Recipe, trained: int, world: int) -> int:
    """Master weights in float32, and AdamW's two moments in 32 or in 8 bits."""
    if settings.memory.offload_optimizer:
        return 0
    plain = settings.optim.precision == "fp32" and settings.optim.zero_stage == 0
    master = 0 if plain else 4
    return trained * (master + (2 if settings.optim.eight_bit else 8)) // shards(settings, world)


def gradient_bytes(settings: Recipe, trained: int, world: int) -> int:
    """Gradients between the backward pass and the update."""
    stage, item = settings.optim.zero_stage, ITEM[settings.optim.precision]
    if stage >= 2:
        return trained * item // world
    sums = 4 if stage == 0 and settings.optim.precision == "bf16" else 0  # summed in float32
    return trained * (item + sums)


def bucket(settings: Recipe) -> int:
    return BUCKET * ITEM[settings.optim.precision] if settings.optim.zero_stage in (1, 2) else 0


def update_bytes(settings: Recipe, trained: int, world: int) -> int:
    """What an update needs beside the state: gradients in float32, and the roots of the second moments."""
    if settings.memory.offload_optimizer:
        return 0
    casts = 4 if settings.optim.precision != "fp32" else 0
    roots = 0 if settings.optim.eight_bit else 4
    if settings.optim.zero_stage in (1, 2):
        trained = min(trained, LARGEST)  # one group of parameters after the other
    return trained * (casts + roots) // shards(settings, world)


def encoder_bytes(costs: Costs) -> int:
    return costs.roles["text encoders"].frozen if "text encoders" in costs.roles else 0


def sent_bytes(settings: Recipe, costs: Costs, calls: Calls, world: int) -> int:
    """The bytes that each process sends in a step, with rings: gradients out and, with ZeRO, weights back.

    A ring's all-reduce sends 2 (n - 1) / n of the data, a reduce-scatter or an all-gather (n - 1) / n. ZeRO 2 and 3
    reduce after every micro-batch. ZeRO 3 also gathers all weights for every forward and every backward pass.
    """
    if world == 1:
        return 0
    zero, item, parts = settings.optim.zero_stage, ITEM[settings.optim.precision], settings.optim.accumulation
    reduced = parts if zero >= 2 else 1
    generator, fake_score = costs.roles["generator"], costs.roles["fake_score"]
    asked = {role: round(count) for role, count in calls.predictions.items()}
    updates = [(generator.trained, calls.updates), (fake_score.trained, asked["fake_score trained"])]
    sent = sum(count * times * item * (reduced + 1) for count, times in updates)
    if zero == 3:
        sent = sum(count * times * item * reduced for count, times in updates)
        sent += generator.parameters * item * parts * (asked["generator"] + 2 * asked["generator trained"])
        guidance = bool(asked["teacher"]) + asked["fake_score"] + 2 * asked["fake_score trained"]
        sent += fake_score.parameters * item * parts * guidance
    return sent * (world - 1) // world
