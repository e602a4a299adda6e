"""What each part of a recipe's step costs for one sample, counted once on the meta device."""

from collections.abc import Callable
from dataclasses import astuple, dataclass, field, replace
from typing import Any

import torch
from dmdr_models.folder.quantisation import BYTES_PER_WEIGHT, Quantisation
from torch import nn

from dmdr_train.planning.counting import Cost, bytes_of, cost, count_of, failing_as, mean_cost
from dmdr_train.planning.meta_models import Models, depth_of, empty, models_of
from dmdr_train.planning.meta_rewards import RewardCost, lpips_cost, reward_cost
from dmdr_train.planning.schedule import decodes, is_lpips
from dmdr_train.recipe.objective_kinds import needs
from dmdr_train.recipe.picture_sizes import PictureSize, Size
from dmdr_train.recipe.schema import Recipe

FEW = 4
"""Blocks that are counted at least."""
NETWORKS = ("generator", "fake_score", "teacher")


@dataclass(frozen=True)
class Role:
    """The size of a part: parameters, those that are trained and in how many tensors, and bytes of all frozen ones."""

    parameters: int
    trained: int = 0
    frozen: int = 0
    trained_tensors: int = 0


@dataclass(frozen=True)
class Costs:
    """The costs of one sample, and sizes.

    Attributes:
        generator: forward and backward passes of the generator.
        fake_score: forward and backward passes of the fake score.
        teacher: forward pass of the teacher.
        decoder: forward and backward passes of the decoder.
        rewards: of each reward by its place in the recipe; LPIPS among them.
        texts: operations of the text encoders for one text.
        roles: sizes by role.
        unknown: rewards that could not be counted.
    """

    generator: Cost
    fake_score: Cost
    teacher: Cost
    decoder: Cost
    rewards: dict[int, RewardCost]
    texts: int
    roles: dict[str, Role]
    unknown: list[str] = field(default_factory=list)


def costs_of(settings: Recipe) -> Costs:
    """Count the parts of a recipe; with pictures of several sizes, the mean operations and the largest activations.

    Raises:
        UserError: the sizes of a model are not known, or the recipe does not go with it.
    """
    sizes = settings.model.sizes
    with failing_as("model.family", f"the family {settings.model.family}"):
        if len(sizes) < 2:
            return costs_at_size(settings)
        found = [(size.share, costs_at_size(with_size(settings, size))) for size in sizes]

    def mixed(part: Callable[[Costs], Cost]) -> Cost:
        return mean_cost([(share, part(costs)) for share, costs in found])

    first = found[0][1]
    return replace(
        first,
        generator=mixed(lambda costs: costs.generator),
        fake_score=mixed(lambda costs: costs.fake_score),
        teacher=mixed(lambda costs: costs.teacher),
        decoder=mixed(lambda costs: costs.decoder),
        rewards={
            i: replace(reward, image=mixed(lambda costs, i=i: costs.rewards[i].image))  # type: ignore[misc]
            for i, reward in first.rewards.items()
        },
    )


def with_size(settings: Recipe, size: Size) -> Recipe:
    """The recipe with pictures of one size alone."""
    only = PictureSize(height=size.height, width=size.width)
    return settings.model_copy(update={"model": settings.model.model_copy(update={"resolution": only})})


def costs_at_size(settings: Recipe) -> Costs:
    """Count the parts of a recipe with pictures of one size.

    A deep network of equal blocks is counted with `FEW` of them and with one more, since every cost is linear in their
    number once the first and the last are left out. If every n-th block is checkpointed, it is linear in steps of n.
    """
    depth, step = depth_of(settings), settings.memory.checkpointed_blocks or 1
    few = FEW if depth is None else FEW + (depth - FEW) % step
    if depth is None or depth <= few + step:
        with models_of(settings) as models:
            return counted(settings, models, *reward_costs(settings, models))
    with models_of(settings, few) as models:
        less = counted(settings, models, *reward_costs(settings, models))
    with models_of(settings, few + step, network_alone=True) as models:
        more = counted(settings, models, {}, [])
    return extended(less, more, (depth - few) // step)


def counted(settings: Recipe, models: Models, rewards: dict[int, RewardCost], unknown: list[str]) -> Costs:
    """Count the parts of a recipe with these models."""
    generator, fake_score = models.networks
    trained = cost(lambda: models.predict(generator, 1), generator.parameters(), backward=True)
    learned = cost(
        lambda: models.predict(fake_score, 1, lora_scale=settings.guidance.fake_scale),
        fake_score.parameters(),
        backward=True,
    )
    return Costs(
        generator=trained,
        fake_score=learned,
        teacher=cost(lambda: models.predict(fake_score, 1, lora_scale=0.0)),
        decoder=decoder_cost(settings, models),
        rewards=rewards,
        texts=sum(encoder_flops(encoder, length) for encoder, length in models.encoders),
        roles=roles(settings, models, rewards),
        unknown=unknown,
    )


def extended(less: Costs, more: Costs, times: int) -> Costs:
    """The costs less + times · (more − less)."""

    def grown(a: Any, b: Any) -> Any:
        return type(a)(*(x + times * (y - x) for x, y in zip(astuple(a), astuple(b), strict=True)))

    changed = {name: grown(getattr(less, name), getattr(more, name)) for name in NETWORKS}
    roles = less.roles | {name: grown(less.roles[name], more.roles[name]) for name in less.roles if name in NETWORKS}
    return replace(less, roles=roles, **changed)


def decoder_cost(settings: Recipe, models: Models) -> Cost:
    """The cost of decoding the part of a latent that rewards see."""
    if models.vae is None or not any(map(decodes, settings.objectives)):
        return Cost(0)
    channels, height, width = view(settings, models)
    latent = empty(1, channels, height, width).requires_grad_(True)
    return cost(lambda: models.family.decode(latent), backward=True)


def view(settings: Recipe, models: Models) -> tuple[int, int, int]:
    """The shape of the latent that rewards see; see `dmdr_train.training.reward_view`."""
    channels, height, width = models.latent
    memory = settings.memory
    if memory.reward_crop is not None:
        height = width = memory.reward_crop // models.pixels
    return channels, int(height * memory.reward_scale), int(width * memory.reward_scale)


def reward_costs(settings: Recipe, models: Models) -> tuple[dict[int, RewardCost], list[str]]:
    """The rewards of the objectives by their place, and the names of rewards whose sizes are not known."""
    found: dict[int, RewardCost] = {}
    unknown = []
    checkpointing = "rewards" in settings.memory.gradient_checkpointing
    for i, section in enumerate(settings.objectives):
        reward: Any = getattr(section, "reward", None)
        if reward is not None and "reward" in needs(section):
            key = f"objectives.{i}.reward"
            with failing_as(key, f"the reward {reward.name}"):
                made = reward_cost(key, reward, checkpointing)
            if made is None:
                unknown.append(reward.name)
            found[i] = made or RewardCost()
        elif is_lpips(section):
            _, height, width = view(settings, models)
            found[i] = lpips_cost(height * models.pixels, width * models.pixels)
    return found, unknown


def encoder_flops(encoder: Any, length: int) -> int:
    tokens = torch.empty(1, length, dtype=torch.long, device="meta")
    return cost(lambda: encoder(input_ids=tokens)[0]).forward


def roles(settings: Recipe, models: Models, rewards: dict[int, RewardCost]) -> dict[str, Role]:
    """The sizes of generator, teacher and fake score, decoder, rewards and text encoders.

    On a shared backbone the weights belong to the teacher, and the generator has its adapter alone.
    """
    found = {name: role(network) for name, network in models.networks._asdict().items()}
    if settings.shares_backbone:
        base: Any = models.networks.fake_score
        adapters = found["generator"].trained + found["fake_score"].trained
        frozen = bytes_of(base.base) - sum(bytes_trained(network) for network in models.networks)
        frozen -= saved_bytes(base.base, settings.memory.quantize)
        found["teacher"] = Role(count_of(base.base) - adapters, 0, frozen)
    if models.vae is not None:
        found["decoder"] = role(models.vae)
    if rewards:
        sizes = shared_once(settings, rewards)
        found["rewards"] = Role(sum(r.parameters for r in sizes), 0, sum(r.weights for r in sizes))
    if models.encoders:
        encoders = [encoder for encoder, _ in models.encoders]
        found["text encoders"] = Role(count_of(*encoders), 0, bytes_of(*encoders))
    return found


def saved_bytes(network: nn.Module, kind: Quantisation | None) -> int:
    """The bytes that quantising the linear layers of a frozen network saves; one layer is dequantised at a time."""
    if kind is None:
        return 0
    layers = [
        layer.weight for layer in network.modules() if type(layer) is nn.Linear and not layer.weight.requires_grad
    ]
    saved = sum(weight.numel() * (weight.element_size() - BYTES_PER_WEIGHT[kind]) for weight in layers)
    return round(saved) - max(weight.nbytes for weight in layers)


def shared_once(settings: Recipe, rewards: dict[int, RewardCost]) -> list[RewardCost]:
    """The rewards, each file once: objectives on the same weights share them."""
    by_file = {}
    for i, found in rewards.items():
        reward: Any = getattr(settings.objectives[i], "reward", None)
        by_file[getattr(reward, "checkpoint", None) or i] = found
    return list(by_file.values())


def role(network: nn.Module) -> Role:
    trained = [p.numel() for p in network.parameters() if p.requires_grad]
    return Role(count_of(network), sum(trained), bytes_of(network) - bytes_trained(network), len(trained))


def bytes_trained(network: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in network.parameters() if p.requires_grad)
