"""The fake score moves toward the generator: exactly where its rank allows, otherwise to the nearest of its rank."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from dmdr_models.networks.lora import LoRANetwork
from dmdr_train.distributed.deepspeed_internals import gathered
from dmdr_train.distributed.master_weights import masters
from dmdr_train.recipe.schema import Recipe
from dmdr_train.run.build import build
from dmdr_train.training.alignment import align, nearest_factors
from torch import Tensor, nn

CPU = torch.device("cpu")
LORA = {"rank": 2, "alpha": 2}


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def orthogonal(rank: int, width: int, length: float) -> Tensor:
    return length * torch.linalg.qr(random(width, rank, seed=9)).Q.T


# -- factors


@pytest.mark.parametrize("rank", [1, 3, 4])
def test_a_matrix_of_low_rank_is_met_exactly(rank: int) -> None:
    left, right, a = random(12, rank), random(rank, 10, seed=1), random(4, 10, seed=2)
    for product in ([left, right], [left @ right]):
        b, new = nearest_factors(product, a)
        torch.testing.assert_close(b @ new, left @ right, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(new.norm(), a.norm())
        torch.testing.assert_close(new @ new.T, a.norm() ** 2 / 4 * torch.eye(4), rtol=1e-4, atol=1e-4)


def test_repeated_steps_lead_to_the_largest_singular_values() -> None:
    """Of a matrix of full rank, a single step gives a good one of rank r, and steps lead to the best."""
    matrix, a = random(12, 10), random(3, 10, seed=2)
    u, s, v = torch.linalg.svd(matrix)
    best = u[:, :3] * s[:3] @ v[:3]
    distances = []
    for _ in range(60):
        b, a = nearest_factors([matrix], a)
        distances.append((b @ a - best).norm().item())
    assert distances[-1] < 1e-3 < distances[0] < best.norm()


def test_factors_that_fit_stay_as_they_are() -> None:
    """The optimizer's moments belong to these rows."""
    a, b = orthogonal(4, 10, 0.3), random(12, 4)
    new_b, new_a = nearest_factors([b, a], a)
    torch.testing.assert_close(new_a, a, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(new_b, b, rtol=1e-4, atol=1e-4)


def test_without_a_change_the_rows_stay() -> None:
    a = orthogonal(2, 6, 0.5)
    b, new = nearest_factors([torch.zeros(5, 2), a], a)
    assert torch.equal(b, torch.zeros(5, 2))
    torch.testing.assert_close(new, a)


# -- networks


class Small(nn.Module):
    """A linear layer, a convolution, and a layer that no LoRA of the fake score adapts."""

    config: Any = None

    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Linear(10, 12)
        self.conv = nn.Conv2d(3, 8, 2)
        self.other = nn.Linear(4, 4)


def made(rank: int = 4, targets: tuple[str, ...] = ("line", "conv"), name: str = "fake_score") -> LoRANetwork:
    torch.manual_seed(0)
    return LoRANetwork(Small(), rank, 2.0 * rank, targets, torch.Generator().manual_seed(rank), name)


def product(lora: LoRANetwork, layer: str, scale: float = 1.0) -> Tensor:
    """What the LoRA adds to the weights of a layer."""
    own = dict(lora.named_parameters())
    a, b = (own[name].detach().flatten(1) for name in lora.factors[layer])
    return scale * lora.alpha / lora.rank * b @ a


def set_b(lora: LoRANetwork, columns: int) -> None:
    """Start values of B of a rank below the LoRA's own."""
    with torch.no_grad():
        for seed, (layer, (_, b)) in enumerate(lora.factors.items()):
            value = dict(lora.named_parameters())[b]
            value[:, :columns] = random(len(value), columns, *value.shape[2:], seed=seed)
            assert layer in ("line", "conv", "other")


@pytest.mark.parametrize("columns", [0, 2])
def test_a_generator_with_a_lora_of_another_rank(columns: int) -> None:
    """The fake score's own change has rank 0 or 2, the generator's 2: their mean has rank 4, as the LoRA."""
    fake, generator = made(), made(2, ("line", "other"), "generator")
    set_b(fake, columns)
    set_b(generator, 2)
    before = {layer: product(fake, layer, 2.5) for layer in ("line", "conv")}
    align(fake, generator, 0.75, 2.5)
    expected = 0.75 * before["line"] + 0.25 * product(generator, "line")
    torch.testing.assert_close(product(fake, "line", 2.5), expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(product(fake, "conv", 2.5), 0.75 * before["conv"])


def test_a_generator_that_trains_all_weights() -> None:
    """The generator's change has three large singular values among many: the fake score comes to these."""
    fake, generator = made(3), Small()
    torch.manual_seed(0)
    start = Small()
    generator.load_state_dict(start.state_dict())
    with torch.no_grad():
        for seed, p in enumerate(generator.parameters()):
            p += 0.01 * random(*p.shape, seed=seed)
            if p.ndim > 1:
                p += 0.1 * (random(len(p), 3, seed=seed) @ random(3, p[0].numel(), seed=seed + 9)).view(p.shape)
    kept = {name: p.clone() for name, p in generator.named_parameters()}
    for _ in range(200):
        align(fake, generator, 0.9, 2.0)
    for layer in ("line", "conv"):
        change = (generator.get_submodule(layer).weight - start.get_submodule(layer).weight).detach().flatten(1)
        u, s, v = torch.linalg.svd(change, full_matrices=False)
        torch.testing.assert_close(product(fake, layer, 2.0), u[:, :3] * s[:3] @ v[:3], rtol=1e-2, atol=1e-3)
    assert all(torch.equal(p, kept[name]) for name, p in generator.named_parameters())


# -- engines


def exact(engine: Any) -> dict[str, Tensor]:
    return {name: share.whole().clone() for name, share in masters(engine).items()}


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize(("stage", "lora"), [(0, None), (2, LORA), (2, None), (3, None)])
def test_a_step_moves_the_master_weights(
    make_recipe: Callable[..., Recipe], model: Path, stage: int, lora: Any
) -> None:
    """A step with alignment is one without, and then the fake score moves, in the optimizer and in the network."""

    def stepped(alignment: Any) -> Any:
        optim = {"generator": {"lr": 1e-2}, "fake_score": {"lr": 1e-2}, "precision": "bf16", "zero_stage": stage}
        trainer = build(
            make_recipe(
                model__path=str(model), model__generator_lora=lora, model__fake_score_lora={"rank": 3, "alpha": 3},
                guidance={"ratio": 1, "alignment": alignment}, optim={"batch_size": 2, **optim},
            ),
            CPU,
        )  # fmt: skip
        trainer.train_step()
        return trainer

    without, aligned = stepped(None), stepped({"decay": 0.5})
    before = exact(without.guidance)
    align(without.guidance, without.generator, 0.5, 2.0)
    expected, found = exact(without.guidance), exact(aligned.guidance)
    assert any((found[name] - before[name]).norm() > 0.01 for name in found)
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-6)
    trained = {name: p for name, p in aligned.guidance.module.named_parameters() if p.requires_grad}
    with gathered(trained.values()):
        assert all(torch.equal(p.detach(), found[name].bfloat16()) for name, p in trained.items())


# -- recipes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"objectives": [{"kind": "regression"}], "data": {"pairs": "pairs"}},
            "guidance.alignment: has no effect without an objective that matches distributions; leave it out",
        ),
        (
            {"model__generator": "other", "model__generator_lora": LORA},
            "guidance.alignment: does not go with a model.generator_lora on a model.generator of its own.*; use null",
        ),
    ],
)
def test_what_cannot_be_aligned(make_recipe: Callable[..., Recipe], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_recipe(**changes, guidance={"alignment": {"decay": 0.9}})
