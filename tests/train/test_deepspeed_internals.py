"""What `deepspeed_internals` uses is there, each by its name: what a new DeepSpeed has changed fails here."""

import ast
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed
import dmdr_train
import pytest
import torch
from dmdr_train.distributed import deepspeed_internals
from dmdr_train.distributed.deepspeed_engine import make_engine
from dmdr_train.distributed.deepspeed_internals import (
    MODEL_FILES,
    MOMENTS,
    OPTIMIZER_FILES,
    WEIGHTS,
    model_state_for,
    optimizer_content,
    optimizer_state,
)
from dmdr_train.recipe.schema import Optim, Optimizer
from torch import nn

PACKAGE = Path(str(dmdr_train.__file__)).parent
OF_ENGINES = {"checkpoint_engine", "_copy_recovery_script", "_get_all_ckpt_names"}
OF_OPTIMIZERS = {
    "fp16_groups",
    "fp32_groups",
    "bit16_groups",
    "nccl_start_alignment_factor",
    "overflow_checker",
    "check_overflow",
}
OF_MASTERS = {"_hp_mapping", "lp_fragment_address", "get_hp_fragment", "_get_fp32_opt_state_partition"}
OF_PARAMETERS = {"ds_tensor", "ds_shape", "ds_numel", "ds_status", "partition"}
OF_DEEPSPEED = {"_WORLD_GROUP", "__compatible_ops__"}
OF_FILES = {"dp_world_size", "optimizer_state_dict", *WEIGHTS, *MOMENTS, MODEL_FILES, OPTIMIZER_FILES}


@pytest.fixture
def engine(one_process: None) -> Callable[[int], Any]:
    def engine(stage: int) -> Any:
        settings = Optimizer(lr=0.1)
        optim = Optim(batch_size=2, generator=settings, fake_score=settings, zero_stage=stage)
        return make_engine(nn.Linear(3, 2), optim, settings, 5, torch.device("cpu"))

    return engine


def attributes(path: Path) -> set[str]:
    """The attributes that a module reads and sets, also those by `getattr` and `hasattr`."""
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    asked = [
        node.args[1] for node in nodes if isinstance(node, ast.Call) and _name(node.func) in ("getattr", "hasattr")
    ]
    texts = {node.value for node in asked if isinstance(node, ast.Constant)}
    return {node.attr for node in nodes if isinstance(node, ast.Attribute)} | {str(text) for text in texts}


def texts(path: Path) -> set[str]:
    """The texts in a module's code."""
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    return {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}


def _name(node: ast.expr) -> str:
    return node.id if isinstance(node, ast.Name) else ""


def test_one_module_uses_them() -> None:
    known = OF_ENGINES | OF_OPTIMIZERS | OF_MASTERS | OF_PARAMETERS - {"partition"} | OF_DEEPSPEED
    home = Path(str(deepspeed_internals.__file__))
    assert known <= attributes(home)
    for path in PACKAGE.rglob("*.py"):
        used = {name for name in attributes(path) if name in known or name.startswith("ds_")}
        assert path == home or not used, path
        assert path == home or not OF_FILES & texts(path), path
    assert texts(home) >= OF_FILES


@pytest.mark.parametrize("name", sorted(OF_ENGINES))
def test_an_engine_has(engine: Callable[[int], Any], name: str) -> None:
    assert callable(getattr(engine(0), name)) or name == "checkpoint_engine"


@pytest.mark.parametrize("name", ["save", "load"])
def test_the_checkpoint_engine_has(engine: Callable[[int], Any], name: str) -> None:
    assert callable(getattr(engine(0).checkpoint_engine, name))


@pytest.mark.parametrize("name", sorted(OF_PARAMETERS))
def test_a_parameter_of_stage_3_has(engine: Callable[[int], Any], name: str) -> None:
    weight = engine(3).module.weight
    assert hasattr(weight, name)
    assert (weight.ds_shape, weight.ds_numel, weight.ds_status.name) == ((2, 3), 6, "NOT_AVAILABLE")


@pytest.mark.parametrize(("stage", "expected"), [(1, ([8], [1], 2)), (2, ([8], [1], 2)), (3, ([6, 2], [2], 1))])
def test_the_layout_of_an_optimizer(engine: Callable[[int], Any], stage: int, expected: Any) -> None:
    assert deepspeed_internals.layout(engine(stage)) == expected


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_saved_optimizer(engine: Callable[[int], Any], stage: int, tmp_path: Path) -> None:
    files: dict[str, Any] = {}
    made = engine(stage)
    made.backward(made(torch.ones(2, 3)).sum())
    made.step()
    (tmp_path / "one").mkdir()
    deepspeed_internals.save_engine(made, tmp_path, "one", lambda state, path: files.update({path.name: state}))
    (saved,) = [optimizer_state(content) for name, content in files.items() if name.endswith(OPTIMIZER_FILES)]
    (weights,) = [name for name in WEIGHTS if name in saved]
    (moments,) = [name for name in MOMENTS if name in saved]
    assert sum(flat.numel() for flat in saved[weights]) == 8
    assert {"exp_avg", "exp_avg_sq"} <= set(saved[moments]["state"][0])
    assert optimizer_state(optimizer_content(saved)) is saved
    models = [content for name, content in files.items() if name.endswith(MODEL_FILES)]
    assert [content["dp_world_size"] for content in models] == [1]
    assert model_state_for(3, models[0]) == {**models[0], "dp_world_size": 3}
    assert not list(tmp_path.rglob("*.p*")), "no file that we did not write"


def test_the_operation_in_shared_memory_and_the_group() -> None:
    assert "deepspeed_shm_comm" in deepspeed.ops.__compatible_ops__
    assert hasattr(deepspeed.utils.groups, "_WORLD_GROUP")
    assert deepspeed_internals.saved_types()
