"""Plant device mistakes in the source, one at a time; a training step on the emulated device must fail for each.

No backward pass may run in this process itself; it forks a process for every attempt.
"""

import ast
import importlib
import inspect
import io
import multiprocessing
import os
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}  # must be set before torch and DeepSpeed are imported

import emulated
import pytest
from dmdr_models import tiny
from dmdr_train.recipe.schema import Recipe
from dmdr_train.run import runner

emulated.replace_gpu()

MODEL = {"fake_score_lora": {"rank": 2, "alpha": 2}}
OPTIM = {"batch_size": 2, "generator": {"lr": 1e-3}, "fake_score": {"lr": 1e-3}}
RUN = {"output": "out", "steps": 3, "seed": 7}


def of_labels(folder: Path) -> dict[str, Any]:
    """Return a recipe for a SiT with a reward: it trains all weights of one network and a LoRA on another."""
    reward = {"kind": "refl", "weight": 0.1, "start": 1, "reward": {"name": "class-label", "checkpoint": "classifier"}}
    reward["reward"]["checkpoint"] = str(folder / "classifier")
    return {
        "model": {"family": "sit", "path": str(folder / "sit"), **MODEL},
        "rollout": {"steps": 2},
        "objectives": [{"kind": "distribution_matching"}, reward],
        "optim": OPTIM,
        "guidance": {"cfg": 1.5, "ratio": 1},
        "run": RUN,
    }


def of_texts(folder: Path) -> dict[str, Any]:
    """Return a recipe for an SD3: two LoRAs on one network, with texts encoded during the training."""
    return {
        "model": {
            "family": "sd3",
            "path": str(folder / "sd3"),
            "max_tokens": 8,
            "generator_lora": {"rank": 2, "alpha": 2},
            **MODEL,
        },
        "data": {"prompts": str(folder / "prompts.txt")},
        "rollout": {"steps": 2, "mode": "ode"},
        "objectives": [{"kind": "distribution_matching"}],
        "optim": OPTIM,
        "guidance": {"cfg": 4.0, "ratio": 1},
        "run": RUN,
    }


def of_noise_levels(folder: Path) -> dict[str, Any]:
    """Return a recipe for an SDXL, whose process is a table of noise levels, with the authors' training states."""
    recipe = of_texts(folder)
    recipe["model"] = {"family": "sdxl", "path": str(folder / "sdxl"), **MODEL}
    recipe["rollout"] = {"steps": 2, "states": "authors"}
    return recipe


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("models")
    for make in (tiny.sit, tiny.sd3, tiny.sdxl, tiny.classifier):
        make(made / make.__name__)
    (made / "prompts.txt").write_text("a cat\na dog in a hat\n")
    return made


@dataclass(frozen=True)
class MixUp:
    """A planted mistake: in the module, `wrong` replaces `right`; `recipe` makes a run that reaches it."""

    module: str
    right: str
    wrong: str
    recipe: Callable[[Path], dict[str, Any]]


MIX_UPS = {
    "a generator of the CPU fills a tensor of the device": MixUp(
        "dmdr_models.networks.lora",
        "start = torch.empty(a.shape, dtype=a.dtype)",
        "start = torch.empty_like(a)",
        of_texts,
    ),
    "noise stays on the CPU": MixUp(
        "dmdr_train.training.renoising",
        "draws.each(purpose), device=x0.device)",
        "draws.each(purpose))",
        of_labels,
    ),
    "times stay on the CPU": MixUp(
        "dmdr_core.training_states",
        "return states, _moved(grid.times[chosen], noise)",
        "return states, grid.times[chosen]",
        of_labels,
    ),
    "a table stays on the CPU": MixUp(
        "dmdr_core.process", "self.alphas_cumprod.to(x.device)[", "self.alphas_cumprod.cpu()[", of_noise_levels
    ),
    "labels stay on the CPU": MixUp(
        "dmdr_models.families.class_labels", "on_device(labels.long(), self.device)", "labels.long()", of_labels
    ),
    "token indices stay on the CPU": MixUp(
        "dmdr_models.families.text_encoders", "tokens = on_device(tokens, self.device)", "tokens = tokens", of_texts
    ),
    "a condition stays on the CPU": MixUp(
        "dmdr_models.families.text_family",
        "return {name: on_device(value, self.device) for",
        "return {name: value.cpu() for",
        of_texts,
    ),
    "a mask of the device picks from the CPU": MixUp(
        "dmdr_core.training_states",
        "going = everyone[chosen > step]",
        "going = everyone[_moved(chosen, noise) > step]",
        of_labels,
    ),
    "weights stay on the CPU": MixUp(
        "dmdr_models.families.latent_family", "self.vae.to(self.device)", 'self.vae.to("cpu")', of_labels
    ),
    "pictures are read before they are copied": MixUp(
        "dmdr_train.objectives.reward_objective",
        "= score.detach().mean()",
        "= float(score.detach().numpy().mean())",
        of_labels,
    ),
    "a group of the device gets a tensor of the CPU": MixUp(
        "dmdr_train.distributed.collectives",
        """        return values
    stacked = torch.tensor(list(values.values()), dtype=torch.float64, device=_communicating())""",
        """        pass
    stacked = torch.tensor(list(values.values()), dtype=torch.float64)""",
        of_labels,
    ),
}


def plant(mix_up: MixUp) -> None:
    """Replace the code of the module's functions, also for modules that have imported them already."""
    module = importlib.import_module(mix_up.module)
    source = inspect.getsource(module)
    assert mix_up.right in source, f"{mix_up.module} does not have {mix_up.right!r} any more: plant another mistake"
    planted = ModuleType(module.__name__)
    planted.__dict__.update(module.__dict__)
    tree = ast.parse(source.replace(mix_up.right, mix_up.wrong))
    exec(compile(tree, str(module.__file__), "exec"), planted.__dict__)
    swap(vars(module), vars(planted))


def swap(ours: Any, theirs: Any) -> None:
    for name, value in list(ours.items()):
        other = theirs.get(name)
        if isinstance(value, type) and value.__module__ == ours.get("__name__", value.__module__):
            swap(vars(value), vars(other))
        found, planted = code_of(value), code_of(other)
        if isinstance(found, FunctionType) and isinstance(planted, FunctionType):
            found.__code__ = planted.__code__


def code_of(value: Any) -> Any:
    """Return the function inside a property, a class method or a wrapper."""
    value = getattr(value, "fget", None) or getattr(value, "func", None) or getattr(value, "__func__", value)
    return inspect.unwrap(value) if callable(value) else value


def step(recipe: dict[str, Any], mix_up: MixUp | None) -> str:
    """Take the first step of every stage; return the error message if a step fails."""
    if mix_up is not None:
        plant(mix_up)
    with redirect_stdout(io.StringIO()):
        try:
            runner.dry_run(Recipe.model_validate(recipe))
        except (RuntimeError, TypeError, ValueError) as error:
            return f"{type(error).__name__}: {error}"
    return ""


def attempt(recipe: dict[str, Any], mix_up: MixUp | None) -> str:
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return str(pool.apply(step, (recipe, mix_up)))


@pytest.mark.parametrize("recipe", [of_labels, of_texts, of_noise_levels])
def test_without_a_mistake_the_steps_are_taken(folder: Path, recipe: Callable[[Path], dict[str, Any]]) -> None:
    assert attempt(recipe(folder), None) == ""


@pytest.mark.parametrize("name", MIX_UPS)
def test_a_mistake_is_met(folder: Path, name: str) -> None:
    mix_up = MIX_UPS[name]
    found = attempt(mix_up.recipe(folder), mix_up)
    assert any(words in found for words in ("same device", "generator", "on cpu", "numpy", "device type cpu")), found
