"""Promises about the package as a whole: imports, names, documentation."""

import ast
import dataclasses
import inspect
import subprocess
import sys
from pathlib import Path

import dmdr_core
import pytest
import torch

SOURCES = sorted(Path(dmdr_core.__file__).parent.glob("**/*.py"))
SIGNATURES = {
    "FlowMatching": "(t_end=0.0)",
    "VariancePreserving": "(alphas_cumprod)",
    "StepGrid": "(num_steps, shift=1.0, t_end=0.0)",
    "BetaRenoise": "(alpha=4.0, beta=1.5, anneal_steps=0)",
    "UniformRenoise": "()",
    "cosine_anneal": "(start, end, step, total)",
    "guided": "(cond, uncond, scale)",
    "rollout": "(predict, process, grid, noise, mode='sde', generator=None, num_steps=None)",
    "visit": "(predict, process, grid, noise, mode='sde', generator=None)",
    "visited_states": "(predict, process, grid, noise, chosen, mode='sde', generator=None, in_step=False)",
    "authors_states": "(predict, process, grid, noise, chosen, mode='sde', generator=None, in_step=False)",
    "final_samples": "(predict, process, grid, states, positions, mode='sde', generator=None, in_step=False)",
    "CoefficientsPreserving": "(eta)",
    "gaussian_step": "(process, x_t, x0, t, t_next, eta=1.0)",
    "gaussian_log_density": "(x, mean, std)",
    "gaussian_kl": "(mean, other, std)",
    "policy_loss": "(log_density, old_log_density, advantage, clip)",
    "randn": "(shape, generator=None, *, device=None, dtype=torch.float32)",
    "dmd_gradient": "(x0, x0_real, x0_fake, eps=1e-08)",
    "dmd_loss": "(x0, x0_real, x0_fake, eps=1e-08, weight=None)",
    "decoupled_gradient": "(x0_fake, x0_cond, ca_cond, ca_uncond, scale, matching_norm=1.0, ca_norm=1.0, "
    "matching_weight=1.0, ca_weight=1.0, eps=1e-08)",
    "mean_distance": "(x0, x0_real)",
    "surrogate_loss": "(x0, direction)",
    "renoise_state": "(x_s, noise, s, t)",
    "sub_interval_target": "(x_s, noise, s, t)",
    "sub_interval_loss": "(prediction, x_s, noise, s, t, most=10.0)",
    "ancestral_step": "(x_t, x0, noise, t, t_next)",
    "denoising_loss": "(prediction, target, weight=None)",
    "hinge": "(reward, margin=0.7)",
    "relative_reward": "(positive, negative, k=0.1)",
    "group_advantage": "(rewards, group_size)",
}


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} imports relatively"
            yield node.module.split(".")[0]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_imports_torch_and_the_standard_library_only(path):
    assert set(imported(path)) <= {"torch", "dmdr_core"} | sys.stdlib_module_names


def test_importing_loads_nothing_that_torch_does_not():
    code = (
        "import sys, torch; before = set(sys.modules); import dmdr_core; "
        "print(*sorted({m.split('.')[0] for m in set(sys.modules) - before} - sys.stdlib_module_names))"
    )
    path = str(Path(dmdr_core.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {path!r}); {code}"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["dmdr_core"]


@pytest.mark.parametrize("name", SIGNATURES)
def test_the_contract(name):
    signature = inspect.signature(getattr(dmdr_core, name))
    bare = [parameter.replace(annotation=inspect.Parameter.empty) for parameter in signature.parameters.values()]
    assert str(inspect.Signature(bare)) == SIGNATURES[name]


def test_every_public_thing_is_documented_and_sorted():
    assert list(dmdr_core.__all__) == sorted(dmdr_core.__all__)
    assert set(SIGNATURES) <= set(dmdr_core.__all__)
    for name in dmdr_core.__all__:
        thing = getattr(dmdr_core, name)
        if inspect.isfunction(thing):
            assert all(
                part in thing.__doc__ for part in ("Args:", "Returns:", "Raises:", *inspect.signature(thing).parameters)
            ), name
        elif inspect.isclass(thing):
            methods = [m for n, m in vars(thing).items() if inspect.isfunction(m) and not n.startswith("_")]
            assert thing.__doc__
            assert all(method.__doc__ for method in methods), name


def test_dataclasses_are_frozen():
    table = torch.tensor([0.9, 0.1])
    for frozen in (
        *(dmdr_core.FlowMatching(), dmdr_core.VariancePreserving(table), dmdr_core.StepGrid(4)),
        *(dmdr_core.TimestepGrid(4), dmdr_core.BetaRenoise(), dmdr_core.UniformRenoise()),
        dmdr_core.Rollout((), table, table),
    ):
        names = [field.name for field in dataclasses.fields(frozen)] or ["anything"]
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(frozen, names[0], 2)
    assert dmdr_core.StepGrid(4) == dmdr_core.StepGrid(4)


def test_types_are_shipped():
    assert (Path(dmdr_core.__file__).parent / "py.typed").exists()
