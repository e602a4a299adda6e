"""The complete path on a tiny SD3: encode, cold start, ReFL, SRPO, export, generate, with the users' commands."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from dmdr_train.checkpoint.find import checkpoints_in
from PIL import Image
from safetensors.torch import load_file

Rows = Callable[[Path], list[dict[str, float]]]
Compare = Callable[[list[dict[str, float]], list[dict[str, float]]], None]

REWARD = {"name": "clip", "checkpoint": "clip.bin", "options": {"model": "clip.json"}}
RECIPE: dict[str, Any] = {
    "model": {
        "family": "sd3",
        "path": "sd3",
        "max_tokens": 8,
        "generator_lora": {"rank": 4, "alpha": 8},
        "fake_score_lora": {"rank": 4, "alpha": 8},
    },
    "data": {"prompts": "prompts.txt", "embeddings": "cache"},
    "rollout": {"steps": 4, "mode": "ode", "shift": 3.0},
    "objectives": [
        {"kind": "distribution_matching"},
        {"kind": "refl", "weight": "auto", "ratio": 0.5, "start": 2, "stop": 4, "reward": REWARD},
        {"kind": "srpo", "weight": 0.1, "start": 4, "reward": REWARD},
    ],
    "guidance": {"ratio": 2, "cfg": 4.0, "cfg_jitter": 0.5, "dynamics": {"steps": 3}},
    "optim": {
        "batch_size": 4,
        "accumulation": 2,
        "generator": {"lr": 1e-2, "eps": 1e-3},
        "fake_score": {"lr": 1e-2, "eps": 1e-3},
        "ema": 0.9,
    },
    "run": {"output": "out", "steps": 6, "checkpoint_every": 3, "keep_last": 3},
    "tracking": {"log_every": 1, "samples": {"count": 2, "prompts": ["a cat", "a dog in a hat"]}},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, write_texts: Callable[[Path], None]) -> Path:
    """A tiny SD3, a tiny CLIP in open_clip's format, prompts."""
    from dmdr_models import tiny

    made = tmp_path_factory.mktemp("text-to-image")
    tiny.sd3(made / "sd3")
    write_texts(made)
    return made


@pytest.fixture(scope="module")
def whole(folder: Path, make_workshop: Any) -> Any:
    """Encode once, then train from the cache with one process, without text encoders; tests must not change it."""
    workshop = make_workshop(folder, RECIPE)
    workshop.write()
    encode = ("encode", "--config", "recipe.yaml", "-o", "cache", "--dtype", "fp32", "data.embeddings=null")
    *_, cut = workshop.dmdr_train(*encode).check().remarks
    assert cut.startswith("warning: prompts: ")
    assert " are cut to the 8 tokens of text_encoder_3 (model.max_tokens); the longest has " in cut
    shutil.copytree(folder / "sd3", folder / "sd3-without-texts", ignore=shutil.ignore_patterns("text_encoder*"))
    remarks = workshop.run("model.path=sd3-without-texts").check().remarks
    assert [line[:18] for line in remarks] == ["a checkpoint takes"]
    return workshop


def test_every_stage_took_place(whole: Any, read_rows: Rows) -> None:
    rows = read_rows(whole.folder / "out")
    assert {"loss/srpo", "weight/refl"} <= {key for row in rows for key in row}
    assert [("loss/refl" in row, "loss/srpo" in row) for row in rows] == [
        *[(False, False)] * 2,
        *[(True, False)] * 2,
        *[(False, True)] * 2,
    ]
    assert rows[2]["weight/refl"] == 0  # in its first step it only measures
    ratio = 0.5 * rows[2]["grad_norm/distribution_matching"] / rows[2]["grad_norm/refl"]
    assert rows[3]["weight/refl"] == pytest.approx(ratio, rel=1e-5)
    names = {path.stem for path in (whole.folder / "out/samples").iterdir()}
    assert names == {"teacher-50", "teacher-4", "student-cold_start", "student-refl", "student-srpo"}


@pytest.mark.parametrize("stage", [2, 3])
def test_two_processes_equal_one(whole: Any, read_rows: Rows, same_numbers: Compare, stage: int) -> None:
    """Run with text encoders; ZeRO-3 with two networks, the other stages with one."""
    name = f"two-{stage}"
    changes = [f"run.output={name}", "data.embeddings=null", f"optim.zero_stage={stage}", "optim.accumulation=1"]
    remark, *cut = whole.run(*changes, processes=2).check().remarks
    assert [line.split(": ")[:2] for line in cut] == [
        ["warning", "data.prompts"],
        ["warning", "tracking.samples.prompts"],
    ]
    newest = checkpoints_in(whole.folder / name / "checkpoints")[-1]
    size = sum(path.stat().st_size for path in newest.rglob("*") if path.is_file())
    said = float(remark.removeprefix("a checkpoint takes ").split()[0]) * 1e9
    assert size - 5e-3 * said <= said <= size + 1.5e5 + 5e-3 * said  # three digits
    same_numbers(read_rows(whole.folder / name), read_rows(whole.folder / "out"))


def test_a_run_goes_on_with_another_number_of_processes(whole: Any, read_rows: Rows, same_numbers: Compare) -> None:
    """Two processes, one, two again: the numbers equal one process throughout, including the automatic weight."""
    changes = ["model.path=sd3-without-texts", "run.output=moved", "run.resume=auto", "run.checkpoint_every=2"]
    for processes, steps in ((2, 2), (1, 4), (2, 6)):
        accumulation = f"optim.accumulation={2 // processes}"
        whole.run(*changes, accumulation, "optim.zero_stage=2", processes=processes).check()
        for later in checkpoints_in(whole.folder / "moved/checkpoints")[steps // 2 :]:
            shutil.rmtree(later)
    same_numbers(read_rows(whole.folder / "moved"), read_rows(whole.folder / "out"))


def test_a_gpu_is_emulated(whole: Any, read_rows: Rows, same_numbers: Compare) -> None:
    """Run one network with two adapters, text encoders, ReFL, SRPO, early warning and drawing on a second device."""
    encode = ("encode", "--config", "recipe.yaml", "-o", "cache-emulated", "--dtype", "fp32", "data.embeddings=null")
    whole.dmdr_train(*encode, emulated=True).check()
    ours, theirs = (
        load_file(next((whole.folder / name).glob("*.safetensors"))) for name in ("cache-emulated", "cache")
    )
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value)
    shutil.copy(whole.folder / "clip.bin", whole.folder / "held-out.bin")
    held_out = "{name: clip, checkpoint: held-out.bin, options: {model: clip.json}}"
    changes = ["run.output=emulated", "data.embeddings=null", "memory.offload_text_encoders=true"]
    changes += ["tracking.samples.count=1"]
    changes += ["memory.gradient_checkpointing=[network, vae, rewards]"]
    changes += [f"watch={{every: 6, prompts: 2, pictures: 2, rewards: [{held_out}]}}"]
    remarks = whole.run(*changes, emulated=True).check().remarks
    assert [line[:18] for line in remarks] == ["a checkpoint takes", "warning: data.prom", "warning: tracking."]
    rows = read_rows(whole.folder / "emulated")
    assert "watch/held_out/clip" in rows[-1]
    same_numbers(rows, read_rows(whole.folder / "out"))
    draw = ("--model", "sd3", "--adapter", "emulated/student", "a fox", "-o", "emulated.png", "--device", "emulated")
    whole.execute("-m", "dmdr_models.generate", *draw, emulated=True).check()


def test_generate_draws_what_stock_diffusers_draws(whole: Any) -> None:
    """Draw from the export with dmdr-generate, and with diffusers and PEFT alone at the training's times."""
    import numpy as np
    from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

    student = whole.folder / "out/student"
    arguments = ("--model", "sd3", "--adapter", "out/student", "a fox", "-o", "fox.png", "--seed", "3")
    whole.execute("-m", "dmdr_models.generate", *arguments).check()
    pipe: Any = StableDiffusion3Pipeline.from_pretrained(whole.folder / "sd3")
    pipe.set_progress_bar_config(disable=True)
    pipe.load_lora_weights(student)
    pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(student, subfolder="scheduler")
    generator = torch.Generator().manual_seed(3)
    sigmas = torch.linspace(1, 0.001, 5)[:-1].tolist()
    size = {"height": 32, "width": 32, "max_sequence_length": 8}
    expected = pipe("a fox", sigmas=sigmas, guidance_scale=0, generator=generator, **size).images[0]
    with Image.open(whole.folder / "fox.png") as found:
        assert np.abs(np.asarray(found, dtype=int) - np.asarray(expected, dtype=int)).max() <= 1
    card = (student / "README.md").read_text()
    assert "sigmas=torch.linspace(1" in card
    assert "dmdr-generate" in card


def test_export_and_evaluate_from_the_command_line(whole: Any) -> None:
    assert whole.dmdr_train("export", "out", "-o", "again").check().remarks == []
    first, second = (load_file(whole.folder / name / "adapter_model.safetensors") for name in ("out/student", "again"))
    assert all(torch.equal(first[key], second[key]) for key in first)
    outcome = whole.dmdr_train("evaluate", "out")
    assert outcome.code == 2
    assert len(outcome.errors) == 1
    assert outcome.errors[0].startswith("tracking.evaluation: is not set in out/recipe.yaml; give it here, such as 'tr")


MISTAKES = [
    (["model.max_tokens=9"], "data.embeddings: cache was made with max_tokens 8, not 9; give another folder"),
    (["memory.reward_crop=12"], "memory.reward_crop: 12 must be a multiple of 8, at most the resolution 32"),
    (["run.resume=out", "model.generator_lora={rank: 8, alpha: 8}"], "model.generator_lora.rank: is 8 here and 4 in"),
]


@pytest.mark.parametrize(("changes", "line"), MISTAKES, ids=[line.partition(":")[0] for _, line in MISTAKES])
def test_a_mistake_is_one_line_and_changes_nothing(whole: Any, changes: list[str], line: str) -> None:
    before = whole.snapshot()
    resume = any(change.startswith("run.resume") for change in changes)
    outcome = whole.run(*changes, *([] if resume else ["run.output=new"]))
    assert outcome.code == 2
    assert len(outcome.errors) == 1
    assert outcome.errors[0].startswith(line)
    assert "Traceback" not in outcome.stderr
    assert whole.snapshot() == before
