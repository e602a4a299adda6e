"""One run from start to end, and its files."""

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import dmdr_models
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

Rows = Callable[[Path], list[dict[str, float]]]


def test_everything_is_written(finished: Any) -> None:
    workshop, outcome = finished
    out = workshop.folder / "out"
    assert {p.name for p in out.iterdir()} == {
        "recipe.yaml",
        "run.lock",
        "metrics.jsonl",
        "tensorboard",
        "checkpoints",
        "samples",
        "student",
        "evaluation.json",
        "summary.md",
        "report.html",
        "before_after.png",
        "curves.png",
    }
    assert [p.name for p in sorted((out / "checkpoints").iterdir())] == [f"step-0000000{n}" for n in (2, 4, 5)]
    assert list((out / "tensorboard").glob("events*"))
    for name in ("before_after", "curves"):
        with Image.open(out / f"{name}.png") as image:
            assert min(image.size) > 100
            assert len(image.convert("RGB").getcolors(1 << 24) or []) > 10
    rows = {p.stem for p in (out / "samples").iterdir()}
    assert rows == {"teacher-3", "teacher-2", "student-cold_start", "student-00000004", "student-joint"}
    assert f"dmdr-generate --family sit --model {Path('out') / 'student'}" in outcome.stdout
    assert f"dmdr-generate --family sit --model {Path('out') / 'student'}" in (out / "summary.md").read_text()
    assert "Wrote out/: report.html, summary.md, before_after.png, curves.png, student/, checkpoints/" in outcome.stdout
    page = (out / "report.html").read_text(encoding="utf-8")
    assert page.count('src="data:image/webp') == len(rows)
    assert "5 of 5 steps" in page
    assert "dmdr-generate --family sit" in page
    assert [line for line in outcome.remarks if not line.startswith("a checkpoint takes ")] == []


def test_metrics(finished: Any, read_rows: Rows) -> None:
    rows = read_rows(finished[0].folder / "out")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    assert all(math.isfinite(value) for row in rows for value in row.values())
    assert [("reward/class-label" in row, "loss/refl" in row) for row in rows] == [(n > 3, n > 3) for n in range(1, 6)]
    fade = [0.75 * 0.5 * (1 + math.cos(math.pi * k / 3)) for k in range(3)] + [0, 0]
    assert [row["teacher_scale"] for row in rows] == pytest.approx(fade, abs=1e-9)
    # The log row is written after the update, so it has the rate of the next update.
    cosine = [1e-3 * 0.5 * (1 + math.cos(math.pi * k / 5)) for k in range(1, 6)]
    assert [row["lr/generator"] for row in rows] == pytest.approx(cosine, abs=1e-9)


def test_the_evaluation_compares_what_it_should(finished: Any) -> None:
    out = finished[0].folder / "out"
    scores = json.loads((out / "evaluation.json").read_text())
    assert set(scores) == {"real", "teacher-3", "teacher-1", "cold_start", "joint"}
    assert scores["real"]["frechet"] < min(s["frechet"] for key, s in scores.items() if key != "real")
    summary = (out / "summary.md").read_text()
    assert all(f"| {score['name']} |" in summary for score in scores.values())


def test_the_recipe_that_is_kept_is_complete(finished: Any) -> None:
    workshop, _ = finished
    printed = workshop.run("--print-config").check().stdout
    assert yaml.safe_load((workshop.folder / "out/recipe.yaml").read_text()) == yaml.safe_load(printed)


def test_the_student_is_a_model_of_its_own(finished: Any) -> None:
    """The exported network is the averaged generator of the last checkpoint."""
    workshop, _ = finished
    student = dmdr_models.load("sit", workshop.folder / "out/student")
    weights = load_file(workshop.folder / "out/checkpoints/step-00000005/student.safetensors")
    network = student.load_network()
    assert all(torch.equal(p, weights[name]) for name, p in network.named_parameters())
    teacher = dict(dmdr_models.load("sit", workshop.folder / "sit").load_network().named_parameters())
    assert any(not torch.equal(weights[name], teacher[name]) for name in weights)
    trained = load_file(workshop.folder / "out/checkpoints/step-00000005/generator.safetensors")
    assert any(not torch.equal(weights[name], trained[name]) for name in weights)
    vae = student.decode(torch.zeros(1, *student.latent_shape(*student.size)))
    assert torch.equal(vae, dmdr_models.load("sit", workshop.folder / "sit").decode(torch.zeros(1, 4, 4, 4)))


def test_the_student_generates(finished: Any, tmp_path: Path) -> None:
    workshop, _ = finished
    command = ["-m", "dmdr_models.generate", "--model", "out/student", "--classes", "0,7", "--per-class", "3"]
    workshop.execute(*command, "-o", str(tmp_path / "grid.png")).check()
    with Image.open(tmp_path / "grid.png") as image:
        assert image.width > image.height >= 64
    sampling = json.loads((workshop.folder / "out/student/dmdr.json").read_text())
    assert sampling == {"family": "sit", "steps": 2, "method": "sde", "guidance": 1.0, "shift": 1.0}


def test_print_config(workshop: Any) -> None:
    before = workshop.snapshot()
    outcome = workshop.run("optim.clip=0.5", "--print-config", "run.seed=3").check()
    printed = yaml.safe_load(outcome.stdout)
    assert (printed["optim"]["clip"], printed["run"]["seed"], printed["optim"]["zero_stage"]) == (0.5, 3, 0)
    assert workshop.snapshot() == before


def test_dry_run_with_lora_and_zero_3(workshop: Any) -> None:
    """This run also has a LoRA on the generator, and weights in several files."""
    before = workshop.snapshot()
    outcome = workshop.run("--dry-run", "optim.zero_stage=3", "model.generator_lora={rank: 2, targets: [to_q]}").check()
    assert workshop.snapshot() == before
    assert [line[:18] for line in outcome.remarks] == ["a checkpoint takes"]
    assert "loss/refl" in outcome.stdout
    assert "nothing was written" in outcome.stdout


def test_bf16_with_a_generator_lora(workshop: Any, read_rows: Rows) -> None:
    changes = ("optim.precision=bf16", "optim.zero_stage=2", "run.steps=4", "model.generator_lora={rank: 2}")
    assert [line[:18] for line in workshop.run(*changes).check().remarks] == ["a checkpoint takes"]
    assert len(read_rows(workshop.folder / "out")) == 4
    student = dmdr_models.load("sit", workshop.folder / "out/student").load_network()
    teacher = dict(dmdr_models.load("sit", workshop.folder / "sit").load_network().named_parameters())
    merged = {name for name, p in student.named_parameters() if not torch.equal(p, teacher[name])}
    assert merged
    assert all(name.endswith(("to_q.weight", "to_v.weight")) for name in merged)


TINY = ("model.path=sit", "model.vae=null", "optim.precision=fp32", "optim.batch_size=2", "run.steps=2")


def test_the_built_in_recipes_of_sit_xl(workshop: Any, read_rows: Rows) -> None:
    """The cold start, and then the DINOv2 reward from its result, with stand-ins for the models."""
    samples = "tracking.samples.count=2"
    workshop.run(*TINY, samples, config="sit-xl-2-cold-start").check()
    cold = workshop.folder / "runs/sit-xl-2-cold-start"
    assert (cold / "samples/student-cold_start.png").exists()

    reward = ("objectives.1.reward.checkpoint=dinov2", "objectives.1.reward.options={image_size: 16}")
    workshop.run(*TINY, samples, *reward, "tracking.log_every=1", config="sit-xl-2-refl").check()
    refl = workshop.folder / "runs/sit-xl-2-refl"
    assert all("reward/dinov2" in row for row in read_rows(refl))
    assert (refl / "samples/student-joint.png").exists()

    weights = [load_file(run / "checkpoints/step-00000002/generator.safetensors") for run in (cold, refl)]
    teacher = dict(dmdr_models.load("sit", workshop.folder / "sit").load_network().named_parameters())
    moved = [
        max((a - b).abs().max().item() for a, b in zip(*pair, strict=True))
        for pair in (
            (weights[0].values(), [teacher[name] for name in weights[0]]),
            (weights[0].values(), weights[1].values()),
            (weights[1].values(), [teacher[name] for name in weights[1]]),
        )
    ]
    # Two updates move a weight by at most 2 · lr (and a little weight decay): 4e-5, then 2e-5 more.
    assert 0 < moved[0] < 4.1e-5
    assert 0 < moved[1] < 2.1e-5
    assert moved[2] > 3e-5


def test_a_run_can_be_made_longer_and_is_scored_again(finished: Any, tmp_path: Path) -> None:
    workshop, _ = finished
    shutil.copytree(workshop.folder, tmp_path / "longer", symlinks=True)
    longer = replace(workshop, folder=tmp_path / "longer")
    before = json.loads((longer.folder / "out/evaluation.json").read_text())
    remarks = longer.run("--resume", "run.steps=6").check().remarks
    assert [line.split()[0] for line in remarks] == ["changed:", "resuming", "a"]
    after = json.loads((longer.folder / "out/evaluation.json").read_text())
    assert after["joint"] != before["joint"]
    assert {k: v for k, v in after.items() if k != "joint"} == {k: v for k, v in before.items() if k != "joint"}


def test_a_damaged_student_is_not_handed_out(finished: Any, open_workshop: Any, tmp_path: Path) -> None:
    workshop = open_workshop(tmp_path / "copy")
    shutil.copytree(finished[0].folder / "out", workshop.folder / "out")
    weights = workshop.folder / "out/checkpoints/step-00000005/student.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    for command in (("export", "out", "-o", "new/student"), ("evaluate", "out")):
        outcome = workshop.dmdr_train(*command)
        assert outcome.code == 2
        assert outcome.errors == [
            "run: out/checkpoints/step-00000005/student.safetensors is damaged; give another checkpoint"
        ]
    assert not (workshop.folder / "new").exists()


def test_the_commands_on_a_finished_run(finished: Any, tmp_path: Path) -> None:
    workshop, folder = finished[0], finished[0].folder
    assert workshop.dmdr_train("export", "out", "-o", str(tmp_path / "student")).check().remarks == []
    name = "transformer/diffusion_pytorch_model.safetensors"
    ours, theirs = load_file(tmp_path / "student" / name), load_file(folder / "out/student" / name)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)

    evaluated = workshop.dmdr_train("evaluate", "out").check()
    assert evaluated.remarks == []
    accuracy = json.loads((folder / "out/evaluation.json").read_text())["joint"]["accuracy"]
    assert f"{accuracy:.3f}" in evaluated.stdout

    missing = workshop.dmdr_train("report", "nowhere")
    assert missing.code == 2
    assert missing.stderr.startswith("error: run: nowhere holds no recipe.yaml")


@pytest.fixture(scope="module")
def emulated(finished: Any) -> Any:
    """The complete run again, on a second device; tests must not change it."""
    workshop, _ = finished
    remarks = workshop.run("run.output=emulated", emulated=True).check().remarks
    assert [line[:18] for line in remarks] == ["a checkpoint takes"]
    return workshop


def test_a_gpu_is_emulated(emulated: Any, read_rows: Rows, same_numbers: Any) -> None:
    """The device gives the CPU's numbers for the training of all weights, a reward, the average and the evaluation."""
    device, cpu = emulated.folder / "emulated", emulated.folder / "out"
    same_numbers(read_rows(device), read_rows(cpu))
    found, expected = (json.loads((run / "evaluation.json").read_text()) for run in (device, cpu))
    assert {key: row["frechet"] for key, row in found.items()} == pytest.approx(
        {key: row["frechet"] for key, row in expected.items()}, rel=1e-2
    )
    a, b = (load_file(run / "checkpoints/step-00000005/student.safetensors") for run in (device, cpu))
    assert max((a[key] - b[key]).abs().max().item() for key in a) < 2e-5  # five updates of 1e-3


def test_a_run_goes_on_on_an_emulated_gpu(emulated: Any, read_rows: Rows) -> None:
    """A run that is resumed from the checkpoint of the second step equals the uninterrupted run bit for bit."""
    changes = ["run.resume=emulated/checkpoints/step-00000002", "run.output=resumed", "tracking.evaluation=null"]
    emulated.run(*changes, emulated=True).check()
    for name in ("generator", "student", "fake_score"):
        file = f"checkpoints/step-00000005/{name}.safetensors"
        a, b = (load_file(emulated.folder / run / file) for run in ("emulated", "resumed"))
        assert all(torch.equal(a[key], b[key]) for key in a), name


def test_pictures_are_drawn_and_scored_on_an_emulated_gpu(emulated: Any) -> None:
    """dmdr-generate and dmdr-score draw and score the same as on the CPU."""
    folder, devices = emulated.folder, ("cpu", "emulated")
    (folder / "drawn").mkdir()
    draw = ("--family", "sit", "--model", "emulated/student", "--classes", "3", "--seed", "5")
    for device in devices:
        where = ("--device", device, "-o", f"drawn/{device}.png")
        emulated.execute("-m", "dmdr_models.generate", *draw, *where, emulated=True).check()
    cpu, other = (Image.open(folder / f"drawn/{device}.png").convert("RGB").tobytes() for device in devices)
    assert max(abs(a - b) for a, b in zip(cpu, other, strict=True)) <= 1

    labels = [{"file_name": f"{device}.png", "label": 3} for device in devices]
    (folder / "labels.jsonl").write_text("".join(json.dumps(row) + "\n" for row in labels))
    score = ("drawn", "--reward", "class-label=classifier", "--prompts", "labels.jsonl", "--workers", "0")
    for device in devices:
        where = ("--device", device, "-o", f"scores-{device}.jsonl")
        emulated.execute("-m", "dmdr_rewards.cli", *score, *where, emulated=True).check()
    files = ((folder / f"scores-{device}.jsonl").read_text().splitlines() for device in devices)
    ours, theirs = ([json.loads(line)["class-label"] for line in lines] for lines in files)
    assert len(ours) == 2
    assert ours == pytest.approx(theirs, rel=1e-4)


def test_an_emulated_gpu_takes_half_precision(emulated: Any, read_rows: Rows) -> None:
    """Train in fp16 with DeepSpeed's loss scaling, which a CPU refuses, and with ZeRO 2 on two processes."""
    changes = ["run.output=half", "optim.precision=fp16", "optim.zero_stage=2", "optim.accumulation=1"]
    changes += ["tracking.evaluation=null", "tracking.samples.every=0"]
    remarks = emulated.run(*changes, emulated=True, processes=2).check().remarks
    assert [line[:18] for line in remarks] == ["a checkpoint takes"]
    rows = read_rows(emulated.folder / "half")
    assert all(math.isfinite(value) for row in rows for value in row.values())
    assert {"loss_scale/generator", "loss_scale/fake_score"} <= rows[-1].keys()
    for row, expected in zip(rows, read_rows(emulated.folder / "out"), strict=True):
        assert row["loss/fake_score"] == pytest.approx(expected["loss/fake_score"], rel=0.1)
