"""The complete path on a tiny SDXL: pairs, regression, cold start, ReFL, export, one step with stock diffusers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

Rows = Callable[[Path], list[dict[str, float]]]
Compare = Callable[[list[dict[str, float]], list[dict[str, float]]], None]

REWARD = {"name": "clip", "checkpoint": "clip.bin", "options": {"model": "clip.json"}}
RECIPE: dict[str, Any] = {
    "model": {"family": "sdxl", "path": "sdxl", "vae": "taesd", "fake_score_lora": {"rank": 2, "alpha": 2}},
    "data": {"prompts": "prompts.txt", "pairs": "pairs"},
    "objectives": [
        {"kind": "regression", "stop": 2},
        {"kind": "distribution_matching", "start": 2},
        {"kind": "refl", "weight": 0.3, "start": 4, "reward": REWARD},
    ],
    "guidance": {"ratio": 2, "cfg": 7.0, "cfg_jitter": 0.5},
    "optim": {
        "batch_size": 4,
        "accumulation": 2,
        "generator": {"lr": 1e-4, "eps": 1e-3},
        "fake_score": {"lr": 1e-3, "eps": 1e-3},
    },
    "memory": {"gradient_checkpointing": ["network", "vae"]},
    "run": {"output": "out", "steps": 5},
    "tracking": {"log_every": 1, "tensorboard": False, "samples": {"count": 2, "prompts": ["a cat", "a dog in a hat"]}},
}
PAIRS = ("pairs", "--config", "recipe.yaml", "--count", "6", "--steps", "2", "--dtype", "fp32", "--batch-size", "2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, write_texts: Callable[[Path], None]) -> Path:
    """A tiny SDXL, a tiny decoder, a tiny CLIP in open_clip's format, prompts."""
    from dmdr_models import tiny

    made = tmp_path_factory.mktemp("sdxl")
    tiny.sdxl(made / "sdxl")
    tiny.taesd(made / "taesd")
    write_texts(made)
    return made


@pytest.fixture(scope="module")
def whole(folder: Path, make_workshop: Any) -> Any:
    """Make pairs, then train all stages in one run with one process; tests must not change it."""
    workshop = make_workshop(folder, RECIPE)
    workshop.write()
    made = workshop.dmdr_train(*PAIRS, "-o", "pairs").check()
    assert "Wrote pairs: 6 pairs, " in made.stdout
    assert made.remarks == []
    assert [line[:18] for line in workshop.run().check().remarks] == ["a checkpoint takes"]
    return workshop


def test_every_stage_took_place(whole: Any, read_rows: Rows) -> None:
    rows = read_rows(whole.folder / "out")
    assert [{name[5:] for name in row if name.startswith("loss/")} for row in rows] == [
        *[{"regression"}] * 2,
        *[{"distribution_matching", "fake_score"}] * 2,
        {"distribution_matching", "fake_score", "refl"},
    ]
    names = {path.stem for path in (whole.folder / "out/samples").iterdir()}
    assert names == {"teacher-50", "teacher-1", "student-regression", "student-cold_start", "student-joint"}


def test_a_gpu_is_emulated(whole: Any, read_rows: Rows, same_numbers: Compare) -> None:
    """Make pairs, train by regression, distribution matching and ReFL, and draw, on a second device."""
    whole.dmdr_train(*PAIRS, "-o", "pairs-emulated", emulated=True).check()
    whole.run("run.output=emulated", "data.pairs=pairs-emulated", "tracking.samples.count=1", emulated=True).check()
    same_numbers(read_rows(whole.folder / "emulated"), read_rows(whole.folder / "out"))
    draw = ("--model", "sdxl", "--unet", "emulated/student/unet", "a fox", "-o", "emulated.png", "--device", "emulated")
    whole.execute("-m", "dmdr_models.generate", "--family", "sdxl", *draw, emulated=True).check()


def test_two_processes_equal_one(whole: Any, read_rows: Rows) -> None:
    """Train at ZeRO 2; `tests/train/test_sdxl_training.py` tests the other stages, and bf16."""
    changes = ["run.output=two", "optim.zero_stage=2", "optim.accumulation=1"]
    whole.run(*changes, processes=2).check()
    for row, expected in zip(read_rows(whole.folder / "two"), read_rows(whole.folder / "out"), strict=True):
        for key in (key for key in expected if key.startswith(("loss/", "reward/"))):
            assert row[key] == pytest.approx(expected[key], rel=2e-3, abs=1e-6), (row["step"], key)


def test_stock_diffusers_draws_what_dmdr_generate_draws(whole: Any) -> None:
    """Draw one step from a single file with the student's state dict; the exported folder draws the same."""
    import numpy as np
    from diffusers import LCMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel

    whole.dmdr_train("export", "out", "-o", "unet.bin").check()
    arguments = ["--family", "sdxl", "--model", "sdxl", "--unet", "unet.bin", "a photo of a cat", "-o", "cat.png"]
    arguments += ["--steps", "1", "--size", "32", "--seed", "0"]
    whole.execute("-m", "dmdr_models.generate", *arguments).check()

    unet: Any = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(whole.folder / "sdxl/unet"))
    unet.load_state_dict(torch.load(whole.folder / "unet.bin", weights_only=True))
    pipe: Any = StableDiffusionXLPipeline.from_pretrained(whole.folder / "sdxl", unet=unet)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)
    expected = pipe(
        "a photo of a cat",
        num_inference_steps=1,
        timesteps=[399],
        guidance_scale=0,
        height=32,
        width=32,
        generator=torch.Generator().manual_seed(0),
    ).images[0]
    with Image.open(whole.folder / "cat.png") as found:
        assert np.abs(np.asarray(found, dtype=int) - np.asarray(expected, dtype=int)).max() <= 1

    student = whole.folder / "out/student"
    folder = load_file(student / "unet/diffusion_pytorch_model.safetensors")
    trained = load_file(whole.folder / "out/checkpoints/step-00000005/student.safetensors")
    for name, value in unet.state_dict().items():
        assert torch.equal(value, folder[name])
        assert torch.equal(value, trained[name])
    card = (student / "README.md").read_text()
    assert "timesteps=[399]" in card
    assert "dmdr-generate" in card
