"""What is known to be wrong with a text-to-image recipe before a weight is read."""

import re
from collections.abc import Callable
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
from dmdr_models import registry
from dmdr_train.base.errors import UserError
from dmdr_train.data.embedding_cache import prepare
from dmdr_train.objectives.refl import ReFL
from dmdr_train.recipe.load import apply_override, parse_recipe
from dmdr_train.run import preflight

MISTAKES = [
    (["data.prompts=none.txt"], "data.prompts: no file or folder 'none.txt'; give one that exists, or a hub name"),
    (["data.prompts=null", "data.embeddings=null"], "data.prompts: is null and family sd3 takes texts; give a file"),
    (["model.max_tokens=9"], "data.embeddings: cache was made with max_tokens 8, not 9; give another folder"),
    (["model.resolution=2048"], "model.resolution: resolution 2048 is not in "),
    (["model.path=no-resolution"], "model.path: no model folder"),
    (["model.resolution=100"], "model.resolution: resolution 100 is not a multiple of 16"),
    (["model.generator_lora.targets=[to_x]"], "model.generator_lora.targets: 'to_x' matches no layer of the network"),
    (["objectives.1.reward.checkpoint=none.bin"], "objectives.1.reward.checkpoint: no file or folder 'none.bin'"),
    (["objectives.1.reward.checkpoint=null"], "objectives.1.reward.checkpoint: is null and clip needs its weights"),
    (["objectives.1.reward.name=ocr"], "objectives.1.reward.name: ocr has no gradient, which refl needs; use another"),
    (["objectives.1.reward.name=class-label"], "objectives.1.reward.name: class-label does not go with a model that"),
    (
        ["objectives.2.reward={name: aesthetic, checkpoint: clip.bin}"],
        "objectives.2.reward.name: aesthetic reads no text, which srpo needs; use another",
    ),
    (["objectives.1.reward.name=klip"], "objectives.1.reward.name: "),
    (["optim.eight_bit=true"], "optim.eight_bit: bitsandbytes is not installed; pip install dmdr-train[eight-bit]"),
    (
        ["optim.tf32=true", "optim.precision=bf16"],
        "optim.tf32: true has no effect with optim.precision bf16; use false",
    ),
    (["memory.offload_optimizer=true"], "memory.offload_optimizer: true needs optim.zero_stage 1, 2 or 3; set one"),
    (
        ["memory.offload_optimizer=true", "optim.zero_stage=2", "optim.eight_bit=true"],
        "memory.offload_optimizer: true does not go with optim.eight_bit, which updates weights on a GPU only; set one",
    ),
    (
        ["memory.offloaded_adam=deepspeed"],
        "memory.offloaded_adam: deepspeed has no effect without memory.offload_optimizer; set it to true, or use torch",
    ),
    (
        ["memory.channels_last=true", "optim.zero_stage=3"],
        "memory.channels_last: true does not go with optim.zero_stage 3, which stores all weights flat; use stage",
    ),
    (
        ["memory.compile=true", "optim.zero_stage=3"],
        "memory.compile: true does not go with optim.zero_stage 3, which fetches the weights within a block; use stage",
    ),
    (["memory.offload_text_encoders=true"], "memory.offload_text_encoders: true has no effect without text encoders"),
    (["data.classes=[1]"], "data.classes: has no effect beside data.prompts; leave one of them out"),
    (["tracking.evaluation={classifier: ., reference: shapes}"], "tracking.evaluation.reference: shapes does not go"),
    (["watch={rewards: [{name: clip, checkpoint: no.bin}]}"], "watch.rewards.0.checkpoint: no file or folder 'no.bin'"),
    (["watch={rewards: [{name: dinov2, checkpoint: prompts.txt}]}"], "watch.rewards.0.name: dinov2 does not go with a"),
    (["model.family=sit"], "model.path: sd3/transformer holds a SD3Transformer2DModel, not a SiTTransformer"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from dmdr_models import tiny

    made = tmp_path_factory.mktemp("preflight")
    tiny.sd3(made / "sd3")
    (made / "prompts.txt").write_text("a cat\n")
    (made / "clip.bin").touch()
    return made


@pytest.fixture
def recipe(make_recipe_dict: Callable[..., dict[str, Any]], folder: Path, monkeypatch: Any) -> dict[str, Any]:
    monkeypatch.chdir(folder)
    reward = {"name": "clip", "checkpoint": "clip.bin"}
    data = make_recipe_dict(
        model={"family": "sd3", "path": "sd3", "max_tokens": 8, "generator_lora": {"rank": 4, "alpha": 4}},
        data={"prompts": "prompts.txt"},
        objectives=[
            {"kind": "distribution_matching"},
            {"kind": "refl", "reward": reward},
            {"kind": "srpo", "start": 2, "reward": reward},
        ],
    )
    prepare(parse_recipe(data), Path("cache"), "fp32")
    return data


def test_a_recipe_without_mistakes_passes(recipe: dict[str, Any]) -> None:
    preflight.check(parse_recipe(recipe), 1)


@pytest.mark.parametrize(("changes", "line"), MISTAKES, ids=[line.partition(":")[0] for _, line in MISTAKES])
def test_a_mistake_is_named(recipe: dict[str, Any], changes: list[str], line: str) -> None:
    if "cache" in line or "text encoders" in line:
        changes = [*changes, "data.embeddings=cache"]
    for change in changes:
        apply_override(recipe, change)
    with pytest.raises(UserError) as caught:
        preflight.check(parse_recipe(recipe), 1)
    assert str(caught.value).startswith(line)


def test_a_reward_without_gradient_goes_with_an_objective_that_needs_none(
    recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    apply_override(recipe, "objectives.1.reward={name: ocr, checkpoint: a model}")
    with pytest.raises(UserError, match="ocr has no gradient, which refl needs"):
        preflight.check(parse_recipe(recipe), 1)
    monkeypatch.setattr(ReFL, "needs", frozenset({"reward"}))
    preflight.check(parse_recipe(recipe), 1)


BARE = """
from dmdr_models.folder.layout import Layout

LAYOUT = Layout(name="bare", parts={"network": ()}, opens="bare_layout:Bare")
"""


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ("model.vae=vae", "model.vae: the family bare has no VAE; leave it out"),
        ("memory.vae_tiling=true", "memory.vae_tiling: the family bare has no VAE; leave it out"),
        ("memory.channels_last=true", "memory.channels_last: the family bare has no VAE; leave it out"),
        ("memory.vae_slicing=true", "memory.vae_slicing: the family bare has no VAE; leave it out"),
        ("memory.gradient_checkpointing=[vae]", "memory.gradient_checkpointing: the family bare has no VAE; leave it"),
        ("model.max_tokens=8", "model.max_tokens: the family bare leaves no choice; set it to null"),
        ("memory.gradient_checkpointing=[network]", ""),
    ],
)
def test_what_another_packages_family_lacks(
    make_recipe_dict: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: Any, change: str, line: str
) -> None:
    (tmp_path / "bare_layout.py").write_text(BARE)
    monkeypatch.syspath_prepend(tmp_path)
    entry = EntryPoint("bare", "bare_layout:LAYOUT", registry.GROUP)
    known = registry._entries()
    monkeypatch.setattr(registry, "_entries", lambda: [*known, entry])
    data = make_recipe_dict(model={"family": "bare", "path": "bare"})
    apply_override(data, change)
    settings = parse_recipe(data)
    if line:
        with pytest.raises(UserError, match=f"^{re.escape(line)}"):
            preflight.check_options(settings)
    else:
        preflight.check_options(settings)


def test_what_the_compiler_needs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A compiler, Python's headers, and on a GPU Triton."""
    for name in ("CC", "CXX"):
        monkeypatch.delenv(name, raising=False)
    there: set[str] = set()
    monkeypatch.setattr(preflight.shutil, "which", lambda name: name if name in there else None)
    monkeypatch.setattr(preflight.importlib.util, "find_spec", lambda name: name if name in there else None)
    monkeypatch.setattr(preflight.sysconfig, "get_path", lambda name: str(tmp_path))

    def said(device: str) -> str:
        with pytest.raises(UserError) as caught:
            preflight.check_compiler(device)
        return str(caught.value)

    assert said("cpu") == "memory.compile: there is no compiler g++; install one, or use false"
    assert said("auto") == "memory.compile: there is no compiler gcc or clang; install one, or use false"
    assert said("cuda").startswith("memory.compile: triton is not installed; ")
    there |= {"triton", "g++", "clang"}
    for device in ("cpu", "auto", "cuda"):
        assert said(device).startswith(f"memory.compile: there is no {tmp_path}/Python.h; install Python's headers, ")
    (tmp_path / "Python.h").touch()
    for device in ("cpu", "auto", "cuda"):
        preflight.check_compiler(device)
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert said("cpu").startswith("memory.compile: there is no compiler no-such-compiler; ")


def test_what_compiles_an_extension(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CXX", raising=False)
    there: set[str] = set()
    monkeypatch.setattr(preflight.shutil, "which", lambda name: name if name in there else None)
    monkeypatch.setattr(preflight.sysconfig, "get_path", lambda name: str(tmp_path))
    for missing in ("no ninja, which compiles it; pip install ninja", "no compiler c++", f"no {tmp_path}/Python.h; "):
        with pytest.raises(UserError, match=f"^memory.offloaded_adam: there is {re.escape(missing)}.*, or use torch$"):
            preflight.check_extensions("memory.offloaded_adam", "torch")
        there.add("c++" if "ninja" in there else "ninja")
    (tmp_path / "Python.h").touch()
    preflight.check_extensions("memory.offloaded_adam", "torch")
