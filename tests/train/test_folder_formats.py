"""Model folders as people have them are trained on; others are refused before anything is loaded."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from dmdr_train.base.errors import UserError
from dmdr_train.checkpoint.input_fingerprints import fingerprints
from dmdr_train.recipe.schema import Recipe
from dmdr_train.run import preflight
from dmdr_train.run.build import build

pytestmark = pytest.mark.usefixtures("one_process")
PIPELINES = {"sd3": "StableDiffusion3Pipeline", "sdxl": "StableDiffusionXLPipeline"}
NETWORKS = {"sd3": "transformer", "sdxl": "unet"}


@pytest.fixture
def recipe(make_recipe: Callable[..., Recipe], prompts: Path) -> Callable[..., Recipe]:
    def recipe(family: str, folder: Path, **changes: Any) -> Recipe:
        lora = {"rank": 2, "alpha": 2}
        model = {"family": family, "path": str(folder), "generator_lora": lora, "fake_score_lora": lora}
        return make_recipe(**{"model": model, "data__prompts": str(prompts), "guidance__ratio": 1, **changes})

    return recipe


def step(settings: Recipe) -> dict[str, float]:
    preflight.check(settings, 1, dry_run=True)
    fingerprints(settings)
    return build(settings, torch.device("cpu")).train_step()


@pytest.mark.parametrize("family", ["sd3", "sdxl"])
def test_a_variant_and_shards_train_as_the_plain_folder(
    sd3: Path, sdxl: Path, recipe: Callable[..., Recipe], tmp_path: Path, family: str
) -> None:
    folder = {"sd3": sd3, "sdxl": sdxl}[family]
    pipeline = getattr(diffusers, PIPELINES[family]).from_pretrained(folder)
    pipeline.save_pretrained(tmp_path / "both", variant="fp16", max_shard_size="60KB")
    (tmp_path / "both/prompts.txt").touch()
    assert len(list((tmp_path / "both" / NETWORKS[family]).glob("*fp16-0000*"))) > 1
    assert step(recipe(family, tmp_path / "both")) == step(recipe(family, folder))


def test_sd3_without_t5_trains(sd3: Path, recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    pipeline = diffusers.StableDiffusion3Pipeline.from_pretrained(sd3, text_encoder_3=None, tokenizer_3=None)
    pipeline.save_pretrained(tmp_path / "small")
    assert step(recipe("sd3", tmp_path / "small")) != step(recipe("sd3", sd3))


def quantise(part: Path) -> None:
    config = json.loads((part / "config.json").read_text())
    (part / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gguf"}}))


def pickle(part: Path) -> None:
    [file] = part.glob("*.safetensors")
    file.rename(file.with_suffix(".bin"))


@pytest.mark.parametrize(
    ("key", "part", "change", "line"),
    [
        ("model.path", "unet", quantise, "says that the weights are quantised (gguf), which is not supported"),
        ("model.path", "vae", pickle, "a pickle; only safetensors are read"),
        ("model.vae", "vae", pickle, "a pickle; only safetensors are read"),
        ("model.generator", "unet", pickle, "a pickle; only safetensors are read"),
    ],
)
def test_what_is_refused(
    sdxl: Path, recipe: Callable[..., Recipe], tmp_path: Path, key: str, part: str, change: Any, line: str
) -> None:
    folder = shutil.copytree(sdxl, tmp_path / "model")
    change(folder / part)
    given = {} if key == "model.path" else {key.replace(".", "__"): str(folder / part)}
    settings = recipe("sdxl", folder if key == "model.path" else sdxl, **given)
    with pytest.raises(UserError) as caught:
        preflight.check(settings, 1, dry_run=True)
    assert str(caught.value).startswith(f"{key}: ")
    assert line in str(caught.value)


def test_a_model_in_one_file_is_refused(sdxl: Path, recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    shutil.copy(next((sdxl / "unet").glob("*.safetensors")), tmp_path / "style.safetensors")
    with pytest.raises(UserError, match=r"model\.path: .*style\.safetensors is a model in one file; make a folder"):
        preflight.check(recipe("sdxl", tmp_path / "style.safetensors"), 1, dry_run=True)
