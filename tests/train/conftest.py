"""A toy problem whose numbers can be written out by hand, tiny real models, and DeepSpeed on this one process."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import pytest
import torch
from dmdr_core import FlowMatching, StepGrid
from dmdr_train.recipe.schema import Recipe
from torch import Tensor, nn

RecipeMaker = Callable[..., Recipe]


def recipe_dict(**overrides: Any) -> dict[str, Any]:
    """The smallest recipe; overrides are written with two underscores for a dot: optim__batch_size=8."""
    data: dict[str, Any] = {
        "model": {"family": "sit", "path": "teacher", "fake_score_lora": {"rank": 4, "alpha": 4}},
        "objectives": [{"kind": "distribution_matching"}],
        "guidance": {"ratio": 2},
        "optim": {"batch_size": 4, "generator": {"lr": 1e-3}, "fake_score": {"lr": 1e-3}},
        "run": {"output": "out", "steps": 10, "seed": 7, "device": "cpu"},
        "tracking": {"log_every": 1, "tensorboard": False},
    }
    for key, value in overrides.items():
        *parents, last = key.split("__")
        node = data
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    return data


@pytest.fixture(scope="session")
def make_recipe() -> RecipeMaker:
    return lambda **overrides: Recipe.model_validate(recipe_dict(**overrides))


@pytest.fixture(scope="session")
def make_recipe_dict() -> Callable[..., dict[str, Any]]:
    return recipe_dict


# -- short runs


@pytest.fixture
def make_run(make_recipe: Callable[..., Recipe], model: Path, tmp_path: Path) -> Callable[..., Any]:
    """A run that is as short as possible, and draws and writes no more than it must."""
    from dmdr_train.checkpoint.find import find_checkpoint
    from dmdr_train.run.build import build
    from dmdr_train.run.runner import Run

    def make(**changes: Any) -> Any:
        basis: dict[str, Any] = {
            "model__path": str(model),
            "guidance": {"ratio": 1},
            "optim__batch_size": 2,
            "run__steps": 4,
            "run__output": str(tmp_path / "out"),
            "tracking__samples": {"count": 2},
        }
        settings = make_recipe(**{**basis, **changes})
        resume_from = find_checkpoint(settings, lambda text: None)
        run: Any = Run(settings, build(settings, torch.device("cpu"), resumed=resume_from is not None), resume_from)
        run.results.begin = run.finish = lambda: None
        return run

    return make


@pytest.fixture(scope="session")
def names() -> Callable[[Any], list[str]]:
    """`names(run)`: the checkpoints of a run."""
    from dmdr_train.checkpoint.find import checkpoints_in

    return lambda run: [path.name for path in checkpoints_in(run.folder / "checkpoints")]


@pytest.fixture(scope="session")
def during_step() -> Callable[[Any, int, Callable[[], object]], None]:
    def during_step(run: Any, step: int, act: Callable[[], object]) -> None:
        """Call `act` while the step that starts at `step` is under way."""
        train_step = run.trainer.train_step

        def stepping() -> dict[str, float]:
            if run.trainer.step == step:
                act()
            return train_step()

        run.trainer.train_step = stepping

    return during_step


# -- a toy family: three classes, latents of four numbers, networks of four parameters


class ToyNetwork(nn.Module):
    """v = a·x + b·sin(3x) + c·t + d·(label + 1), with a trainable change of strength `lora_scale` if adapted."""

    def __init__(self, start: tuple[float, ...], adapted: bool = False):
        super().__init__()
        self.base = nn.Parameter(torch.tensor(start), requires_grad=not adapted)
        self.change = nn.Parameter(torch.tensor([0.3, -0.2, 0.1, 0.05])) if adapted else None

    def forward(self, x: Tensor, t: Tensor, class_labels: Tensor, lora_scale: float = 1.0) -> Tensor:
        weights = self.base if self.change is None else self.base + lora_scale * self.change
        t, label = t.reshape(-1, 1, 1, 1), class_labels.reshape(-1, 1, 1, 1)
        return weights[0] * x + weights[1] * torch.sin(3 * x) + weights[2] * t + weights[3] * (label + 1)


class ToyFamily:
    name = "toy"
    process = FlowMatching(t_end=0.0)
    size = (2, 2)
    num_classes = 3

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        return 1, height, width

    def grid(self, steps: int, shift: float = 1.0) -> StepGrid:
        return StepGrid(steps, shift, self.process.t_end)

    def predict(self, network: Any, x_t: Tensor, t: Tensor, condition: dict[str, Tensor], **named: Any) -> Tensor:
        return network(x_t, t, **condition, **named)

    def condition(self, prompts: list[int]) -> dict[str, Tensor]:
        return {"class_labels": torch.tensor(prompts)}

    def null_condition(self, batch: int) -> dict[str, Tensor]:
        return {"class_labels": torch.full((batch,), self.num_classes)}

    def decode(self, latents: Tensor) -> Tensor:
        return torch.sigmoid(latents)


@pytest.fixture
def toy_family() -> ToyFamily:
    return ToyFamily()


@pytest.fixture
def toy_generator() -> ToyNetwork:
    return ToyNetwork((0.4, 0.7, -0.3, 0.2))


@pytest.fixture
def toy_guidance() -> ToyNetwork:
    return ToyNetwork((0.9, -0.5, 0.2, -0.1), adapted=True)


# -- tiny real models


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny SiT that draws pictures of 32 x 32; tests must not change it."""
    from dmdr_models import tiny

    return tiny.sit(tmp_path_factory.mktemp("models") / "sit")


@pytest.fixture(scope="session")
def sd3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny SD3; tests must not change it."""
    from dmdr_models import tiny

    return tiny.sd3(tmp_path_factory.mktemp("models") / "sd3")


@pytest.fixture(scope="session")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny SDXL; tests must not change it."""
    from dmdr_models import tiny

    return tiny.sdxl(tmp_path_factory.mktemp("models") / "sdxl")


@pytest.fixture(scope="session")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A file of five prompts, and a cache for what is made of it that is not the user's own."""
    import datasets

    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("a cat\na dog in a hat\ntwo red cubes\na lighthouse at night\nan orange on a blue plate\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", path.parent / "datasets")
        yield path


@pytest.fixture(scope="session")
def sdxl_pairs(make_recipe: RecipeMaker, sdxl: Path, prompts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight pairs of the tiny SDXL; tests must not change them."""
    from dmdr_train.training.make_pairs import make_pairs

    data = {"model__family": "sdxl", "model__path": str(sdxl), "data__prompts": str(prompts), "guidance__cfg": 7.0}
    folder = tmp_path_factory.mktemp("pairs") / "sdxl"
    make_pairs(make_recipe(**data), folder, 8, steps=2, batch_size=4, dtype="fp32", shard_size=5)
    return folder


@pytest.fixture(scope="session")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny image classifier of ten classes; tests must not change it."""
    from dmdr_models import tiny

    return tiny.classifier(tmp_path_factory.mktemp("models") / "vit")


@pytest.fixture(scope="session")
def one_process() -> Iterator[None]:
    """DeepSpeed's process group, of this process alone; the environment is left as it was found."""
    import torch.distributed as dist
    from deepspeed import DeepSpeedEngine
    from dmdr_train.distributed.process_group import start_processes

    before = dict(os.environ)
    start_processes(torch.device("cpu"))
    with pytest.MonkeyPatch.context() as patch:
        # ZeRO-3 would look through the whole step for the next use of every layer, for longer than a tiny step takes.
        patch.setattr(DeepSpeedEngine, "zero_max_reuse_distance", lambda engine: 0)
        yield
    dist.destroy_process_group()
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="session")
def toy_costs() -> Any:
    """Small round numbers in the place of what `dmdr_train.planning.costs` counts."""
    from dmdr_train.planning.costs import Costs, Role
    from dmdr_train.planning.counting import Cost

    return Costs(
        generator=Cost(10, 20),
        fake_score=Cost(10, 20, peak=5),
        teacher=Cost(10),
        decoder=Cost(0),
        rewards={},
        texts=0,
        roles={"generator": Role(1000, 1000, 0), "fake_score": Role(1100, 100, 2000)},
    )
