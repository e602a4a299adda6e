"""QLoRA: both adapters are trained on one frozen network with quantised weights, and exported for the original."""

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import dmdr_models
import pytest
import torch
from dmdr_models.folder.quantisation import LIBRARIES
from dmdr_models.networks.lora import LoRANetwork
from dmdr_models.networks.quantised import quantise
from dmdr_train.base.errors import UserError
from dmdr_train.checkpoint.compatibility import changes
from dmdr_train.checkpoint.input_fingerprints import fingerprints
from dmdr_train.checkpoint.manifest import STUDENT
from dmdr_train.checkpoint.save import Saving
from dmdr_train.distributed.averaged_weights import Average
from dmdr_train.recipe.load import parse_recipe
from dmdr_train.recipe.schema import Recipe
from dmdr_train.reporting.student_export import export_state_dict, export_student
from dmdr_train.run import preflight
from dmdr_train.run.build import build
from dmdr_train.training.trainer import Trainer
from safetensors.torch import load_file
from torch import Tensor, nn

pytestmark = pytest.mark.usefixtures("one_process")
CPU = torch.device("cpu")
KINDS = [kind for kind, library in LIBRARIES.items() if importlib.util.find_spec(library)]
"""torchao is in the environment of the tests; NF4 is tested wherever bitsandbytes is installed, too."""


@pytest.fixture
def recipe(make_recipe: Callable[..., Recipe], sd3: Path, prompts: Path, tmp_path: Path) -> Callable[..., Recipe]:
    def recipe(folder: Path = sd3, **other: Any) -> Recipe:
        lora = {"rank": 4, "alpha": 4}
        model = {"family": "sd3", "path": str(folder), "generator_lora": lora, "fake_score_lora": lora}
        basis = {
            "model": model,
            "data__prompts": str(prompts),
            "guidance__ratio": 1,
            "run__output": str(tmp_path / "out"),
        }
        return make_recipe(**{**basis, **other})

    return recipe


def stored(weight: Any) -> Tensor:
    """The numbers that a quantised weight stands for."""
    if hasattr(weight, "qdata"):
        return weight.qdata.float() * weight.scale.float()
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(weight.data, weight.quant_state)


@pytest.fixture
def with_transformer(sd3: Path, tmp_path: Path) -> Callable[[str, Any], Path]:
    """with_transformer(name, network) is the folder of the tiny SD3 with another transformer."""

    def with_transformer(name: str, network: Any) -> Path:
        folder = shutil.copytree(sd3, tmp_path / name, ignore=shutil.ignore_patterns("transformer"))
        network.save_pretrained(folder / "transformer")
        return folder

    return with_transformer


def adapters(trainer: Trainer) -> dict[str, Tensor]:
    networks = {"generator": trainer.generator.module, "fake_score": trainer.guidance.module}
    return {
        f"{role}.{name}": p.detach() for role, network in networks.items() for name, p in network.named_parameters()
    }


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_is_that_of_the_stored_weights(
    recipe: Callable[..., Recipe], with_transformer: Callable[[str, Any], Path], kind: str
) -> None:
    settings = recipe(memory={"quantize": kind, "gradient_checkpointing": ["network"]})
    preflight.check(settings, 1, dry_run=True)
    trainer = build(settings, CPU)
    base: Any = trainer.guidance.module.base
    frozen = dmdr_models.load("sd3", settings.model.path).load_network()
    alone: Any = dmdr_models.load("sd3", settings.model.path).load_network()
    quantise(alone, kind)  # type: ignore[arg-type]
    for name, layer in alone.named_modules():
        if isinstance(layer, nn.Linear):
            frozen.get_submodule(name).weight.data = stored(layer.weight)
    plain = build(recipe(with_transformer("stored", frozen)), CPU)
    start = {name: tensor.clone() for name, tensor in adapters(trainer).items()}
    rows = [(trainer.train_step(), plain.train_step()) for _ in range(2)]
    for quantised, expected in rows:
        assert quantised == pytest.approx(expected, rel=1e-3)
    assert {p.requires_grad for name, p in base.named_parameters() if ".lora_" not in name} == {False}
    moved = {name for name, tensor in adapters(trainer).items() if not torch.equal(tensor, start[name])}
    assert len(moved) > 0.9 * len(start)
    x, t = torch.randn(1, *trainer.family.latent_shape(*trainer.family.size)), torch.tensor([0.5])
    condition = trainer.family.condition(["a fox"])
    with torch.no_grad():
        teacher = trainer.family.predict(trainer.guidance.module, x, t, condition, lora_scale=0.0)
        assert torch.equal(teacher, trainer.family.predict(alone, x, t, condition))


@pytest.fixture
def folder(sd3: Path, with_transformer: Callable[[str, Any], Path]) -> Path:
    """The tiny SD3 with a transformer that diffusers quantised and wrote."""
    from torchao.quantization import Int8WeightOnlyConfig

    settings = {"quantization_config": diffusers.TorchAoConfig(Int8WeightOnlyConfig()), "torch_dtype": torch.float32}
    network = diffusers.SD3Transformer2DModel.from_pretrained(sd3, subfolder="transformer", **settings)
    return with_transformer("int8", network)


def test_a_quantised_folder_trains_as_one_that_is_quantised_here(
    recipe: Callable[..., Recipe], folder: Path, tmp_path: Path
) -> None:
    here, there = recipe(memory__quantize="int8"), recipe(folder)
    preflight.check(there, 1, dry_run=True)
    trainer = build(there, CPU)
    assert trainer.train_step() == build(here, CPU).train_step()
    assert fingerprints(there)["model.path"] != fingerprints(here)["model.path"]
    (tmp_path / "checkpoints").mkdir()
    average = Average(trainer.generator, None)
    source = Saving(tmp_path / "checkpoints", there, trainer, average, fingerprints(there)).finish()
    assert not [name for name in load_file(source / STUDENT) if ".lora_" not in name]
    with pytest.raises(UserError, match=r"--output: .*int8 has quantised weights \(torchao\), into which no LoRA is"):
        export_state_dict(tmp_path / "student.safetensors", there, source)


def test_the_student_is_a_lora_for_the_original(recipe: Callable[..., Recipe], sd3: Path, tmp_path: Path) -> None:
    settings = recipe(memory__quantize="int8")
    trainer = build(settings, CPU)
    trainer.train_step()
    (tmp_path / "checkpoints").mkdir()
    average = Average(trainer.generator, None)
    source = Saving(tmp_path / "checkpoints", settings, trainer, average, fingerprints(settings)).finish()
    export_student(tmp_path / "student", settings, source)
    assert json.loads((tmp_path / "student/adapter_config.json").read_text())["base_model_name_or_path"] == sd3.name
    network: Any = dmdr_models.load("sd3", sd3).load_network()
    lora = LoRANetwork(network, 4, 4, trainer.family.lora_targets)
    lora.start_from(trainer.family.read_lora(tmp_path / "student"))
    trained: Any = trainer.generator.module
    expected = trained.adapter_state()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in lora.adapter_state().items())
    pipeline = diffusers.StableDiffusion3Pipeline.from_pretrained(sd3)
    pipeline.load_lora_weights(tmp_path / "student")
    again = [(change.key, change.kind) for change in changes(recipe(memory__quantize="fp8"), source)]
    assert again == [("memory.quantize", "must not change")]


NO_LORA: dict[str, Any] = {"generator_lora": None}
OUTPUT = {"rank": 4, "alpha": 4, "init": "output_gaussian"}
OBSTACLES = [
    (NO_LORA, {}, "a generator whose own weights are trained; set model.generator_lora"),
    ({"generator": "other"}, {}, "model.generator other; leave that out"),
    ({}, {"optim__zero_stage": 3}, "optim.zero_stage 3; use 2"),
    ({}, {"memory__shared_backbone": False}, "memory.shared_backbone false; use shared_backbone null"),
    ({"generator_lora": OUTPUT}, {}, "model.generator_lora.init output_gaussian; use gaussian"),
    ({"fake_score_lora": OUTPUT}, {}, "model.fake_score_lora.init output_gaussian; use gaussian"),
]


def changed(make: Callable[..., dict[str, Any]], model: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    lora = {"rank": 4, "alpha": 4}
    basis = {"family": "sd3", "path": "sd3", "generator_lora": lora, "fake_score_lora": lora}
    return make(**{"model": {**basis, **model}, "data__prompts": "prompts.txt", **other})


@pytest.mark.parametrize(("model", "other", "line"), OBSTACLES)
def test_what_does_not_go_with_quantize(
    make_recipe_dict: Callable[..., dict[str, Any]], model: dict[str, Any], other: dict[str, Any], line: str
) -> None:
    with pytest.raises(UserError) as caught:
        parse_recipe(changed(make_recipe_dict, model, {"memory": {"quantize": "int8"}, **other}))
    assert str(caught.value) == f"memory.quantize: int8 does not go with {line}, or use null"


@pytest.fixture(scope="module")
def declared(sd3: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny SD3, whose config says that its weights are quantised; nothing here reads them."""
    folder = shutil.copytree(sd3, tmp_path_factory.mktemp("declared") / "model")
    config = folder / "transformer/config.json"
    config.write_text(
        json.dumps({**json.loads(config.read_text()), "quantization_config": {"quant_method": "torchao"}})
    )
    return folder


@pytest.mark.parametrize(
    ("model", "other", "line"),
    [
        *(each for each in OBSTACLES if each[0].get("generator") is None),
        ({}, {"memory__quantize": "fp8"}, "memory.quantize fp8; use null"),
        ({"teacher_loras": [{"path": "style"}]}, {}, "model.teacher_loras, which are added to the teacher's weights;"),
    ],
)
def test_what_does_not_go_with_a_quantised_folder(
    make_recipe_dict: Callable[..., dict[str, Any]],
    declared: Path,
    prompts: Path,
    monkeypatch: pytest.MonkeyPatch,
    model: dict[str, Any],
    other: dict[str, Any],
    line: str,
) -> None:
    monkeypatch.setattr(preflight, "check_loras", lambda *given: None)
    settings = parse_recipe(
        changed(make_recipe_dict, {"path": str(declared), **model}, {**other, "data__prompts": str(prompts)})
    )
    with pytest.raises(UserError) as caught:
        preflight.check(settings, 1, dry_run=True)
    expected = f"model.path: {declared} has quantised weights (torchao), which do not go with {line}"
    assert str(caught.value).startswith(expected)
    assert str(caught.value).endswith("or give the folder of the weights before quantisation")


def test_a_missing_library_is_named(recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight.importlib.util, "find_spec", lambda name: None)
    for kind, library in LIBRARIES.items():
        line = rf"memory.quantize: {library} is not installed; pip install dmdr-train\[{library}\], or leave it out"
        with pytest.raises(UserError, match=line):
            preflight.check(recipe(memory__quantize=kind), 1, dry_run=True)
