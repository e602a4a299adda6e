"""A LoRA that was trained on other weights than the model's takes them along, and goes onto no others."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dmdr_models
import pytest
import torch
from diffusers import SD3Transformer2DModel
from dmdr_models import tiny
from dmdr_models.folder.fingerprints import content_fingerprint
from dmdr_train.base.errors import UserError
from dmdr_train.checkpoint import compatibility
from dmdr_train.checkpoint.save import save_student
from dmdr_train.distributed.averaged_weights import Average
from dmdr_train.recipe.schema import Recipe
from dmdr_train.reporting.student_export import export_state_dict, export_student
from dmdr_train.run.build import build
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


def test_a_lora_goes_onto_no_other_weights(
    recipe: Callable[..., Recipe], other: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before: dict[str, dict[str, str]] = {}
    monkeypatch.setattr(compatibility, "read_manifest", lambda key, path: before)
    onto_others, plain = recipe(generator=str(other)), recipe()
    whole = recipe(generator=str(other), generator_lora=None)

    def refused(settings: Recipe) -> bool:
        try:
            compatibility.check_same_base(settings, tmp_path)
        except UserError as error:
            return re.search("^model.generator: is .* trained on other weights; give those of", str(error)) is not None
        return False

    assert [refused(one) for one in (onto_others, plain, whole)] == [False] * 3, "an export from before says nothing"
    before["inputs"] = {"model.path": "x"}
    assert [refused(one) for one in (onto_others, plain, whole)] == [True, False, False]
    before["inputs"]["model.generator"] = content_fingerprint(other)
    assert [refused(one) for one in (onto_others, plain, whole)] == [False, True, False]
    before["inputs"]["model.generator"] = "others"
    assert [refused(one) for one in (onto_others, plain, whole)] == [True, True, False]
    before["inputs"] = {"model.path": "x", "model.teacher_loras.0.path": "style"}
    with pytest.raises(UserError, match=r"^model.teacher_loras.0.path: is None, and the LoRA of run.init_from"):
        compatibility.check_same_base(plain, tmp_path)
