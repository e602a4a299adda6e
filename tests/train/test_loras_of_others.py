"""A teacher with LoRAs of others in its weights, and a generator whose LoRA continues another."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dmdr_models
import pytest
import torch
from dmdr_models.networks.lora import LoRANetwork
from dmdr_train.base.errors import UserError
from dmdr_train.checkpoint import compatibility
from dmdr_train.checkpoint.input_fingerprints import fingerprints
from dmdr_train.checkpoint.manifest import RECIPE, STUDENT
from dmdr_train.data.pairs import made_with
from dmdr_train.recipe.load import dump_recipe, resolve_paths
from dmdr_train.recipe.schema import Recipe
from dmdr_train.reporting.model_card import model_card
from dmdr_train.reporting.student_export import load_student
from dmdr_train.run import preflight
from dmdr_train.run.build import build
from dmdr_train.training.networks import load_family, load_network, make_generator
from safetensors.torch import save_file
from torch import Tensor

pytestmark = pytest.mark.usefixtures("one_process")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def style(sd3: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA of rank 4 and alpha 8 on the attention of the tiny SD3, as after some training."""
    family, generator = dmdr_models.load("sd3", sd3), torch.Generator().manual_seed(1)
    lora = LoRANetwork(family.load_network(), 4, 8, family.lora_targets, generator)
    for name, parameter in lora.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=0.2, generator=generator)
    folder = tmp_path_factory.mktemp("loras") / "style"
    family.students.save_lora(lora, folder)
    return folder


@pytest.fixture
def recipe(make_recipe: Callable[..., Recipe], sd3: Path, prompts: Path, tmp_path: Path) -> Callable[..., Recipe]:
    def recipe(**changes: Any) -> Recipe:
        basis: dict[str, Any] = {
            "model": {
                "family": "sd3",
                "path": str(sd3),
                "max_tokens": 8,
                "generator_lora": {"rank": 4, "alpha": 4},
                "fake_score_lora": {"rank": 2, "alpha": 2},
            },
            "data__prompts": str(prompts),
            "run__output": str(tmp_path / "out"),
        }
        return make_recipe(**{**basis, **changes})

    return recipe


def products(lora: LoRANetwork) -> dict[str, Tensor]:
    """alpha / r · B·A of each layer."""
    state = lora.adapter_state()
    layers = {name.rpartition(".lora_")[0] for name in state}
    found = {at: state[f"{at}.lora_B.weight"] @ state[f"{at}.lora_A.weight"] for at in layers}
    return {f"{at}.weight": lora.alpha / lora.rank * product for at, product in found.items()}


@pytest.fixture
def expected(sd3: Path, style: Path) -> dict[str, Tensor]:
    """The weights of the teacher with the style at 0.5."""
    family = dmdr_models.load("sd3", sd3)
    lora = LoRANetwork(family.load_network(), 4, 8, family.lora_targets)
    lora.start_from(family.read_lora(style))
    added, state = products(lora), family.load_network().state_dict()
    assert set(added) <= set(state)
    return {name: tensor + 0.5 * added[name] if name in added else tensor for name, tensor in state.items()}


def assert_same(network: Any, expected: dict[str, Tensor]) -> None:
    for name, tensor in network.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("lora", [True, False], ids=["LoRA", "all weights"])
def test_teacher_and_generator_start_from_base_and_style(
    recipe: Callable[..., Recipe], style: Path, expected: dict[str, Tensor], lora: bool
) -> None:
    changes: dict[str, Any] = {} if lora else {"model__generator_lora": None}
    given = [{"path": str(style), "strength": 0.25}, {"path": str(style), "strength": 0.25}]
    settings = recipe(model__teacher_loras=given, **changes)
    preflight.check(settings, 1, dry_run=True)
    family = load_family(settings)
    assert_same(load_network(settings.model, family), expected)
    generator = make_generator(settings, family)
    assert_same(generator.merged() if isinstance(generator, LoRANetwork) else generator, expected)
    trainer = build(settings, CPU)
    row = trainer.train_step()
    assert row != build(recipe(**changes), CPU).train_step()


def test_the_student_contains_the_teachers_loras(
    recipe: Callable[..., Recipe], style: Path, expected: dict[str, Tensor], tmp_path: Path
) -> None:
    settings = recipe(model__teacher_loras=[{"path": str(style), "strength": 0.5}])
    family = load_family(settings)
    trained = make_generator(settings, family)
    assert isinstance(trained, LoRANetwork)
    for parameter in trained.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.2)
    save_file({name: p for name, p in trained.named_parameters() if p.requires_grad}, tmp_path / STUDENT)
    _, student = load_student(settings, tmp_path)
    added = products(trained)
    assert_same(student, {name: tensor + added.get(name, 0) for name, tensor in expected.items()})
    card = model_card(settings, family, tmp_path / "student", {})
    assert "and from its LoRA `style` at 0.5" in card
    assert f"--weights {tmp_path / 'student'}" in card
    assert "--adapter" not in card


def test_the_style_decides_what_goes_on(recipe: Callable[..., Recipe], style: Path, tmp_path: Path) -> None:
    other = shutil.copytree(style, tmp_path / "other")
    (other / "README.md").write_text("another")
    plain, one, two = (
        recipe(model__teacher_loras=[{"path": str(path), "strength": strength} for path, strength in loras])
        for loras in ([], [(style, 0.5)], [(style, 0.6)])
    )
    assert len({made_with(settings.model)["network"] for settings in (plain, one, two)}) == 3
    found = fingerprints(one)["model.teacher_loras.0.path"]
    assert fingerprints(two)["model.teacher_loras.0.path"] == found
    assert found != fingerprints(recipe(model__teacher_loras=[{"path": str(other)}]))["model.teacher_loras.0.path"]


def test_a_resumed_run_needs_its_start_no_more(
    recipe: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lora = {"rank": 4, "start": str(tmp_path / "gone")}
    with pytest.raises(UserError, match=r"model\.generator_lora\.start: no folder"):
        preflight.check(recipe(model__generator_lora=lora), 1, dry_run=True)
    preflight.check(recipe(model__generator_lora=lora, run__resume=str(tmp_path)), 1, dry_run=True)
    saved, asked = tmp_path / "saved", recipe(model__generator_lora={"rank": 4})
    saved.mkdir()
    (saved / RECIPE).write_text(dump_recipe(recipe(model__generator_lora=lora)))
    monkeypatch.setattr(compatibility, "read_manifest", lambda key, path: {"inputs": fingerprints(asked)})
    [change] = compatibility.changes(asked, saved)
    assert (change.key, change.kind) == ("model.generator_lora.start", "changed")


def test_paths_are_looked_up_beside_the_recipe(style: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = {"generator_lora": {"start": "style"}, "teacher_loras": [{"path": "style"}]}
    found = resolve_paths(model, style.parent)
    assert found == {"generator_lora": {"start": str(style)}, "teacher_loras": [{"path": str(style)}]}


def test_a_lora_is_continued(recipe: Callable[..., Recipe], style: Path, sd3: Path) -> None:
    settings = recipe(model__generator_lora={"rank": 4, "alpha": 2, "start": str(style)})
    preflight.check(settings, 1, dry_run=True)
    trainer = build(settings, CPU)
    family = dmdr_models.load("sd3", sd3)
    expected = family.read_lora(style).changes
    found = products(trainer.generator.module)
    assert found.keys() == {f"{layer}.weight" for layer in expected}
    for layer, (a, b, scale) in expected.items():
        torch.testing.assert_close(found[f"{layer}.weight"], scale * b @ a, rtol=1e-5, atol=1e-6)
    assert build(settings, CPU, resumed=True).generator.module.adapter_state().keys()
    trainer.train_step()


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"generator_lora": {"rank": 8, "start": "STYLE"}}, "model.generator_lora.rank: 8 is not that of "),
        ({"generator_lora": {"rank": 4, "start": "none"}}, "model.generator_lora.start: no folder none, nor such a"),
        ({"teacher_loras": [{"path": "none"}]}, "model.teacher_loras.0.path: no folder none, nor such a file"),
        ({"teacher_loras": [{"path": "STYLE"}, {"path": "MODEL"}]}, "model.teacher_loras.1.path: "),
    ],
)
def test_mistakes_come_before_anything_is_loaded(
    recipe: Callable[..., Recipe], style: Path, sd3: Path, changes: dict[str, Any], line: str
) -> None:
    def placed(node: Any) -> Any:
        if isinstance(node, dict):
            return {key: placed(value) for key, value in node.items()}
        if isinstance(node, list):
            return [placed(value) for value in node]
        return {"STYLE": str(style), "MODEL": str(sd3)}.get(node, node)

    settings = recipe(**{f"model__{key}": placed(value) for key, value in changes.items()})
    with pytest.raises(UserError) as caught:
        preflight.check(settings, 1, dry_run=True)
    assert str(caught.value).startswith(line)


def test_other_layers_are_refused(recipe: Callable[..., Recipe], style: Path) -> None:
    settings = recipe(model__generator_lora={"rank": 4, "targets": ["to_q"], "start": str(style)})
    with pytest.raises(UserError, match=r"model\.generator_lora\.start: .*adapts other layers, .*add_k_proj: set targ"):
        build(settings, CPU)


def test_one_start_alone(make_recipe: Callable[..., Recipe]) -> None:
    with pytest.raises(ValueError, match=r"model\.generator_lora\.start: has no effect beside run\.init_from"):
        make_recipe(model__generator_lora={"start": "a"}, run__init_from="b")
