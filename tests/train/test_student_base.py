"""A LoRA that was trained on other weights than the model's takes them along, and goes onto no others."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dmdr_models
import pytest
import torch
from diffusers import SD3Transformer2DModel
from dmdr_models import tiny
from dmdr_models.networks.lora import LoRANetwork
from dmdr_train.base.errors import UserError
from dmdr_train.checkpoint.compatibility import changes
from dmdr_train.checkpoint.input_fingerprints import fingerprints
from dmdr_train.checkpoint.manifest import MANIFEST, RECIPE, signed
from dmdr_train.checkpoint.save import save_student
from dmdr_train.distributed.averaged_weights import Average
from dmdr_train.recipe.load import dump_recipe
from dmdr_train.recipe.schema import Recipe
from dmdr_train.reporting.student_export import export_state_dict, export_student
from dmdr_train.run.build import build
from dmdr_train.run.preflight import check
from torch import Tensor

pytestmark = pytest.mark.usefixtures("one_process")
LORA = {"rank": 4, "alpha": 8}


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with other weights for the tiny SD3, such as a fine-tuned one."""
    folder = tiny.sd3(tmp_path_factory.mktemp("models") / "finetuned", seed=7)
    return folder / "transformer"


@pytest.fixture
def recipe(make_recipe: Callable[..., Recipe], sd3: Path, prompts: Path) -> Callable[..., Recipe]:
    def recipe(**model: Any) -> Recipe:
        basis = {"family": "sd3", "path": str(sd3), "max_tokens": 8, "generator_lora": LORA, "fake_score_lora": LORA}
        return make_recipe(model=basis | model, data__prompts=str(prompts))

    return recipe


def test_the_export_is_the_student(recipe: Callable[..., Recipe], sd3: Path, other: Path, tmp_path: Path) -> None:
    settings = recipe(generator=str(other))
    trainer = build(settings, torch.device("cpu"))
    for name, parameter in trainer.generator.module.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=0.3)
    save_student(tmp_path / "weights", trainer, Average(trainer.generator.module, None))
    export_student(tmp_path / "student", settings, tmp_path / "weights")
    export_state_dict(tmp_path / "original.safetensors", settings, tmp_path / "weights", original=True)

    family = dmdr_models.load("sd3", sd3)
    condition = family.condition(["a red circle"])
    x = torch.randn(1, *family.latent_shape(*family.size), generator=torch.Generator().manual_seed(1))

    @torch.no_grad()
    def asked(network: Any) -> Tensor:
        return family.predict(network, x, torch.tensor([0.9]), condition)

    expected = asked(trainer.generator.module)
    for without in (family.load_network(), family.load_network(other)):
        assert (asked(without) - expected).abs().max() > 0.1
    torch.testing.assert_close(asked(family.load_network(tmp_path / "student")), expected, atol=1e-4, rtol=1e-4)
    reader: Any = SD3Transformer2DModel
    original = {"config": str(sd3), "subfolder": "transformer", "local_files_only": True}
    found = reader.from_single_file(str(tmp_path / "original.safetensors"), **original)
    torch.testing.assert_close(asked(found), expected, atol=1e-4, rtol=1e-4)

    assert not list((tmp_path / "student").glob("*.safetensors")), "no LoRA that others would put on the wrong weights"
    card = (tmp_path / "student/README.md").read_text()
    assert f"dmdr-generate --model {sd3} --weights {tmp_path / 'student'}" in card
    assert "It began with the weights `transformer`, which it contains." in card
    assert "load_lora_weights" not in card


def test_a_lora_of_the_models_own_weights_stays_one(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    settings = recipe()
    trainer = build(settings, torch.device("cpu"))
    save_student(tmp_path / "weights", trainer, Average(trainer.generator.module, None))
    export_student(tmp_path / "student", settings, tmp_path / "weights")
    names = ["adapter_model.safetensors", "kohya_lora.safetensors", "pytorch_lora_weights.safetensors"]
    assert sorted(file.name for file in (tmp_path / "student").glob("*.safetensors")) == names
    assert "It began with" not in (tmp_path / "student/README.md").read_text()


def test_loras_go_onto_no_other_weights(recipe: Callable[..., Recipe], sd3: Path, other: Path, tmp_path: Path) -> None:
    """The recipe of a run, and what is refused when another run begins from it."""
    moved = shutil.copytree(sd3, tmp_path / "moved")
    style, whole = save_style(tmp_path / "style", sd3), {"generator_lora": None}

    bare: dict[str, Any] = {"step": 1, "world_size": 1, "weights": {}, "files": {}}

    def refused(began: dict[str, Any], goes_on: dict[str, Any], inputs: bool = True) -> str | None:
        checkpoint, first = tmp_path / "step-1", recipe(**began)
        checkpoint.mkdir(exist_ok=True)
        (checkpoint / RECIPE).write_text(dump_recipe(first))
        manifest = {"inputs": fingerprints(first)} if inputs else {}
        (checkpoint / MANIFEST).write_text(json.dumps(signed(bare | manifest)))
        try:
            check(begun_from(recipe(**goes_on), checkpoint), world=1, dry_run=True)
        except UserError as error:
            return str(error)
        return None

    onto_others = {"generator": str(other)}
    strong, weak = ({"teacher_loras": [{"path": str(style), "strength": value}]} for value in (1.0, 0.5))
    for one in ({}, onto_others, strong, onto_others | whole):
        assert refused(one, one) is None
        assert refused(one, one | {"path": str(moved)}) is None, "the same contents"
        assert refused(one, weak, inputs=False) is None, "an export from before says nothing"
    assert refused(onto_others | whole, whole) is None, "all weights are those of the checkpoint"
    trained = f"and run.init_from {tmp_path / 'step-1'} was trained on other weights"
    assert refused({}, {"path": str(other.parent)}) == (
        f"model.path: is {other.parent}, {trained}; give that run's, {sd3}"
    )
    assert refused(whole, whole | {"path": str(other.parent)}), "the fake score is a LoRA of the teacher"
    assert refused({}, onto_others) == f"model.generator: is {other}, {trained}; leave it out"
    assert refused(onto_others, {}) == f"model.generator: is None, {trained}; give that run's, {other}"
    assert refused(strong, {}) == f"model.teacher_loras.0.path: is None, {trained}; give that run's, {style}"
    assert refused({}, strong) == f"model.teacher_loras.0.path: is {style}, {trained}; leave it out"
    assert refused(strong, weak) == (
        f"model.teacher_loras.0.strength: is 0.5, and 1.0 in run.init_from {tmp_path / 'step-1'}; set it to that"
    )
    resumed = changes(recipe(**weak, path=str(other.parent)), tmp_path / "step-1")
    expected = {"model.path", "model.teacher_loras.0.strength"}
    assert expected <= {change.key for change in resumed if change.kind == "must not change"}


def begun_from(settings: Recipe, checkpoint: Path) -> Recipe:
    return settings.model_copy(update={"run": settings.run.model_copy(update={"init_from": str(checkpoint)})})


def save_style(folder: Path, model: Path) -> Path:
    """Write a LoRA of others into a folder."""
    family = dmdr_models.load("sd3", model)
    family.students.save_lora(LoRANetwork(family.load_network(), 2, 2, family.lora_targets), folder)
    return folder
