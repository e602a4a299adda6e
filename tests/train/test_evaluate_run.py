"""`dmdr-train evaluate` on a run of a tiny SD3: its rows, its files, and that no finished batch is done again."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dmdr_train
import pytest
import torch
from dmdr_train.base.atomic_files import fingerprint
from dmdr_train.base.errors import UserError
from dmdr_train.checkpoint.manifest import FAKE_SCORE, GENERATOR, MANIFEST, RECIPE, STUDENT, signed
from dmdr_train.cli import main
from dmdr_train.data.encode import all_prompts
from dmdr_train.evaluation import evaluator
from dmdr_train.evaluation.scores import Scores, read_scores
from dmdr_train.recipe.load import dump_recipe
from dmdr_train.recipe.schema import Recipe
from dmdr_train.run.evaluate_run import depends
from dmdr_train.run.python_api import open_run
from dmdr_train.training.networks import load_family, make_generator
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

ROWS = ["real", "teacher-2", "teacher-1", "step-2", "student"]


def write_checkpoint(settings: Recipe, folder: Path, step: int) -> None:
    """A checkpoint with weights of the student alone, and empty files where a training has others."""
    family = load_family(settings)
    draws = torch.Generator().manual_seed(step)
    student = {
        name: 0.1 * torch.randn(parameter.shape, generator=draws)
        for name, parameter in make_generator(settings, family).named_parameters()
        if parameter.requires_grad
    }
    path = folder / "checkpoints" / f"step-{step:08d}"
    path.mkdir(parents=True)
    (path / RECIPE).write_text(dump_recipe(settings))
    for name, tensors in ((GENERATOR, {}), (FAKE_SCORE, {}), (STUDENT, student)):
        save_file(tensors, path / name)
    files = {name: fingerprint(path / name) for name in (RECIPE, GENERATOR, STUDENT, FAKE_SCORE)}
    manifest = signed({"step": step, "world_size": 1, "weights": {}, "files": files})
    (path / MANIFEST).write_text(json.dumps(manifest))


@pytest.fixture(scope="module")
def made(
    make_recipe: Callable[..., Recipe], sd3: Path, prompts: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A run of two checkpoints; pictures of mixed sizes, prompts and two CLIPs to evaluate it with."""
    import open_clip

    folder = tmp_path_factory.mktemp("evaluate")
    vision, text = {"layers": 1, "width": 64, "patch_size": 8}, {"width": 64, "heads": 1, "layers": 1}
    clip: dict[str, Any] = {"embed_dim": 4, "vision_cfg": {"image_size": 16, **vision}, "text_cfg": text}
    (folder / "clip.json").write_text(json.dumps(clip))
    for name in ("one", "two"):
        with torch.random.fork_rng():
            torch.manual_seed(len(name) + ord(name[0]))
            torch.save(open_clip.CLIP(**clip).state_dict(), folder / f"{name}.bin")
    (folder / "styles.json").write_text(json.dumps({"anime": ["a girl", "a boat"], "photo": ["a street"]}))
    (folder / "pictures").mkdir()
    for i in range(40):
        Image.effect_noise((30 + i % 5, 40), 9 + i).save(folder / "pictures" / f"{i}.png")
    rewards = [
        {"name": "clip", "checkpoint": str(folder / f"{name}.bin"), "options": {"model": str(folder / "clip.json")}}
        for name in ("one", "two")
    ]
    evaluation = {
        "prompt_files": [str(prompts), str(folder / "styles.json")],
        "per_prompt": 2,
        "batch_size": 3,
        "teacher_steps": [2, 1],
        "reference": str(folder / "pictures"),
        "features": rewards[0],
        "rewards": rewards,
    }
    settings = make_recipe(
        model__family="sd3",
        model__path=str(sd3),
        model__generator_lora={"rank": 2, "alpha": 2},
        data__prompts=str(prompts),
        rollout__steps=2,
        tracking__evaluation=evaluation,
    )
    for step in (2, 4):
        write_checkpoint(settings, folder / "out", step)
    (folder / "out" / RECIPE).write_text(dump_recipe(settings))
    return folder


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many pictures are drawn from now on, batch by batch."""
    batches: list[int] = []

    def draw(*given: Any) -> Tensor:
        batches.append(len(given[5]))
        return original(*given)

    original = evaluator.draw_latents
    monkeypatch.setattr(evaluator, "draw_latents", draw)
    return batches


@pytest.fixture(scope="module")
def scores(made: Path, one_process: None) -> dict[str, Scores]:
    return dmdr_train.evaluate(made / "out")


def test_rows_and_columns(made: Path, scores: dict[str, Scores]) -> None:
    assert list(scores) == ROWS
    assert [row.name for row in scores.values()] == [
        "real pictures",
        "teacher, 2 steps",
        "teacher, 1 step",
        "student at step 2, 2 steps",
        "student at step 4, 2 steps",
    ]
    sets = ["prompts", "styles/anime", "styles/photo"]
    for key, row in scores.items():
        compared = (row.frechet, row.kernel, row.precision, row.recall, row.density, row.coverage, row.frechet_pixels)
        assert all(value is not None and math.isfinite(value) for value in compared)
        assert row.accuracy is None
        assert row.seconds is not None
        if key == "real":  # these are no pictures of the prompts
            assert (row.more, row.diversity) == ({}, None)
            continue
        assert list(row.more) == [*(f"clip-{i}" for i in (1, 2)), *(f"clip-{i}, {s}" for i in (1, 2) for s in sets)]
        assert row.diversity is not None
        for name, value in {**row.more, "diversity": row.diversity}.items():
            low, high = row.intervals[name]
            if not name.endswith("photo"):  # of one prompt, which says nothing of other prompts
                assert low <= value <= high
            else:
                assert math.isnan(low)
        means = [row.more[f"clip-1, {each}"] for each in sets]
        assert row.more["clip-1"] == pytest.approx((5 * means[0] + 2 * means[1] + means[2]) / 8)
    assert scores["real"].frechet < min(scores[key].frechet for key in ROWS[1:])
    assert scores["step-2"].more != scores["student"].more
    assert read_scores(made / "out/evaluation")["student"].more == scores["student"].more
    table = (made / "out/evaluation/evaluation.md").read_text()
    assert table.startswith("| pictures | FD | precision |")
    assert "| teacher, 1 step | " in table
    assert "nan" not in table  # of the single photo
    low, high = scores["student"].intervals["clip-1"]
    assert f"{scores['student'].more['clip-1']:.3f} [{low:.3f}, {high:.3f}]" in table


@pytest.mark.usefixtures("one_process")
def test_an_interrupted_evaluation_goes_on(
    made: Path, scores: dict[str, Scores], drawn: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(made / "out", tmp_path / "out", ignore=shutil.ignore_patterns("evaluation"))
    counting = evaluator.draw_latents

    def interrupt(*given: Any) -> Tensor:
        if len(drawn) == 8:
            raise KeyboardInterrupt
        return counting(*given)

    with monkeypatch.context() as patch:
        patch.setattr(evaluator, "draw_latents", interrupt)
        with pytest.raises(KeyboardInterrupt):
            dmdr_train.evaluate(tmp_path / "out")
    assert drawn == [3, 3, 3, 3, 3, 1, 3, 3]
    drawn.clear()
    resumed = dmdr_train.evaluate(tmp_path / "out")
    assert drawn == [3, 3, 3, 1] + 2 * [3, 3, 3, 3, 3, 1]
    assert {key: row.more for key, row in resumed.items()} == {key: row.more for key, row in scores.items()}
    drawn.clear()
    batch = next((tmp_path / "out/evaluation/batches").glob("student-*/00000003.safetensors"))
    batch.write_bytes(batch.read_bytes()[:-1])
    (tmp_path / "out/evaluation/batches/.00000000.safetensors.1.partial").touch()
    assert dmdr_train.evaluate(tmp_path / "out")["student"].frechet == scores["student"].frechet
    assert drawn == [3]  # the damaged one alone
    dmdr_train.evaluate(tmp_path / "out", "tracking.evaluation.seed=3", rows=["teacher"])
    assert sum(drawn) == 3 + 2 * 16


@pytest.mark.usefixtures("one_process")
def test_the_teacher_has_a_guidance_of_its_own(
    made: Path, scores: dict[str, Scores], drawn: list[int], tmp_path: Path
) -> None:
    shutil.copytree(made / "out", tmp_path / "out")
    guided = dmdr_train.evaluate(tmp_path / "out", "guidance.teacher_cfg=4")
    assert sum(drawn) == 2 * 16  # the two rows of the teacher, and nothing of the student
    assert guided["student"].more == scores["student"].more
    for key in ("teacher-2", "teacher-1"):
        assert guided[key].more != scores[key].more
    assert (scores["teacher-2"].name, guided["teacher-2"].name) == ("teacher, 2 steps", "teacher, 2 steps, guidance 4")
    drawn.clear()
    assert dmdr_train.evaluate(tmp_path / "out")["teacher-2"].more == scores["teacher-2"].more
    assert drawn == []


def test_measurements_depend_on_the_files_in_options(made: Path, tmp_path: Path) -> None:
    """Such as GenEval's metadata or an architecture: other contents under the same name give other scores."""
    shutil.copy(made / "clip.json", tmp_path)
    reward = f"[{{name: clip, checkpoint: {made / 'one.bin'}, options: {{model: {tmp_path / 'clip.json'}}}}}]"
    settings = open_run(made / "out", [f"tracking.evaluation.rewards={reward}"])
    before = depends(settings)
    assert depends(settings) == before
    (tmp_path / "clip.json").write_text((made / "clip.json").read_text().replace("}}", ', "quick_gelu": true}}'))
    assert depends(settings) != before


def test_two_processes_share_what_is_left(
    made: Path, scores: dict[str, Scores], python: Callable[..., Any], tmp_path: Path
) -> None:
    shutil.copytree(made / "out", tmp_path / "out")
    batches = sorted((tmp_path / "out/evaluation/batches").rglob("*.safetensors"))
    for path in batches[::2]:
        path.unlink()
    kept = {path: path.stat().st_mtime_ns for path in batches[1::2]}
    said = python("-m", "dmdr_train", "evaluate", "out", folder=tmp_path, processes=2).check().stdout
    assert "Wrote out/evaluation/: evaluation.json, evaluation.md, recipe.yaml\nWrote out/report.html\n" in said
    assert said.count("real pictures") == 1
    found = read_scores(tmp_path / "out/evaluation")
    assert list(found) == ROWS
    for key, row in found.items():
        assert row.frechet == pytest.approx(scores[key].frechet, rel=1e-4)
        assert row.more == pytest.approx(scores[key].more, rel=1e-4)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert all(path.is_file() for path in batches)


@pytest.mark.usefixtures("one_process")
def test_a_picture_that_is_not_finite_is_named_and_not_counted(
    made: Path, scores: dict[str, Scores], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    shutil.copytree(made / "out", tmp_path / "out", ignore=shutil.ignore_patterns("evaluation"))
    original = evaluator.draw_latents

    def draw(*given: Any) -> Tensor:
        latents = original(*given)
        if 4 in given[5]:
            latents[given[5].index(4), 0, 0, 0] = torch.nan
        return latents

    monkeypatch.setattr(evaluator, "draw_latents", draw)
    row = dmdr_train.evaluate(tmp_path / "out", rows=["student"])["student"]
    assert row.broken == [4]
    assert "student at step 4, 2 steps: 1 of 16 pictures are not finite: 4 ('two red cubes')" in capsys.readouterr().err
    assert row.frechet is not None
    assert math.isfinite(row.frechet)
    assert row.more["clip-1, styles/anime"] == scores["student"].more["clip-1, styles/anime"]
    assert row.more["clip-1, prompts"] != scores["student"].more["clip-1, prompts"]
    assert math.isfinite(row.more["clip-1, prompts"])


MISTAKES = [
    (["tracking.evaluation=null"], "tracking.evaluation: is not set in .*; give it here, such as"),
    (["optim.clip=2"], "optim.clip: belongs to the run's training and stays; give tracking.evaluation, "),
    (
        ["tracking.evaluation.prompt_files=gone.txt"],
        r"tracking.evaluation.prompt_files.0: no file or folder 'gone.txt'",
    ),
    (
        ["tracking.evaluation.prompt_files=[]", "tracking.evaluation.per_prompt=1"],
        "tracking.evaluation.prompt_files: is empty and family sd3 takes texts",
    ),
    (["tracking.evaluation.reference=gone"], "tracking.evaluation.reference: no folder 'gone'"),
    (
        ["tracking.evaluation.per_prompt=4"],
        "pictures has 40 pictures and 32 evaluated pictures need 64 of them, half as reference and half as real",
    ),
    (
        ["tracking.evaluation.rewards=[{name: class-label, checkpoint: .}]"],
        "tracking.evaluation.rewards.0.name: class-label does not go with a model that takes texts",
    ),
    (
        ["tracking.evaluation.features={name: incepton, checkpoint: .}"],
        "tracking.evaluation.features.name: unknown network 'incepton': did you mean 'inception'",
    ),
    (
        ["tracking.evaluation.features={name: inception, checkpoint: gone.pth}"],
        "tracking.evaluation.features.checkpoint: checkpoint gone.pth: no such file or folder; give the network's",
    ),
    (
        ["tracking.evaluation.features={name: inception}"],
        "tracking.evaluation.features.checkpoint: inception comes without a checkpoint",
    ),
    (
        ["tracking.evaluation.labels=drawn"],
        "tracking.evaluation.labels: drawn has no effect beside prompt_files, which gives the labels; use in_turn",
    ),
    (
        ["tracking.evaluation.classifier=."],
        "tracking.evaluation.classifier: has no effect beside features, since the prompts are texts; leave it out",
    ),
    (
        ["tracking.evaluation={prompt_files: one.txt, classifier: .}"],
        "tracking.evaluation.classifier: has no effect without a reference, since the prompts are texts; leave it out",
    ),
    (
        ["tracking.evaluation.reference=null", "tracking.evaluation.per_prompt=1"],
        "tracking.evaluation.features: clip has no effect without a reference or 2 per_prompt; leave it out",
    ),
    (
        ["tracking.evaluation={prompt_files: one.txt, rewards: true}"],
        "tracking.evaluation: measures nothing; give rewards, a reference, or 2 or more as per_prompt",
    ),
    (["tracking.evaluation.reference=shapes"], "tracking.evaluation.prompt_files: shapes has its own prompts"),
]


@pytest.mark.parametrize(("changes", "message"), MISTAKES, ids=[changes[0] for changes, _ in MISTAKES])
def test_a_mistake_is_one_line(made: Path, changes: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        dmdr_train.evaluate(made / "out", *changes)


def test_the_teacher_needs_no_checkpoint(made: Path, tmp_path: Path, one_process: None) -> None:
    shutil.copy(made / "out" / RECIPE, tmp_path)
    changes = ["tracking.evaluation.reference=null", "tracking.evaluation.teacher_steps=[1]"]
    assert list(dmdr_train.evaluate(tmp_path, *changes, rows=["teacher"])) == ["teacher-1"]
    with pytest.raises(UserError, match=r"^run: .* holds no checkpoint"):
        dmdr_train.evaluate(tmp_path, *changes, rows=["teacher", "student"])
    with pytest.raises(UserError, match=r"^--rows: .* has no pictures for real; give other rows"):
        dmdr_train.evaluate(tmp_path, *changes, rows=["real"])


def test_the_deepspeed_launcher_may_start_it(capsys: pytest.CaptureFixture[str]) -> None:
    """It puts an option of its own before the command."""
    with pytest.raises(SystemExit):
        main(["--local_rank=0", "evaluate", "nowhere"])
    assert capsys.readouterr().err == "error: run: nowhere holds no recipe.yaml; give the folder of a run\n"


def test_the_prompts_are_encoded_too(made: Path) -> None:
    prompts = all_prompts(open_run(made / "out"))["prompt"]
    assert {"a girl", "a boat", "a street", "two red cubes"} <= set(prompts)


@pytest.mark.usefixtures("one_process")
def test_a_reference_picture_that_cannot_be_read_is_named(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "pictures", tmp_path / "pictures")
    (tmp_path / "pictures/7.png").write_text("no picture")
    changes = [f"tracking.evaluation.reference={tmp_path}/pictures", "tracking.evaluation.batch_size=40"]
    with pytest.raises(UserError, match=r"tracking.evaluation.reference: .*7.png cannot be read as a picture"):
        dmdr_train.evaluate(made / "out", *changes, rows=["real"])


@pytest.mark.usefixtures("one_process")
def test_a_file_of_statistics_gives_the_frechet_distance_alone(made: Path, tmp_path: Path) -> None:
    import numpy as np

    for width in (4, 5):
        np.savez(tmp_path / f"{width}.npz", mu=np.zeros(width), sigma=np.eye(width))
    change = "tracking.evaluation.reference=" + str(tmp_path / "{}.npz")
    row = dmdr_train.evaluate(made / "out", change.format(4), rows=["real", "student"])["student"]
    assert row.frechet is not None
    assert row.frechet > 0
    assert (row.kernel, row.precision, row.frechet_pixels) == (None, None, None)
    with pytest.raises(UserError, match=r"5.npz has features of width 5 and the network of width 4; use the same"):
        dmdr_train.evaluate(made / "out", change.format(5), rows=["student"])


@pytest.mark.usefixtures("one_process")
def test_features_are_those_of_dmdr_score_compare(
    made: Path, classifier: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """The same pictures, written to files, have the same measures."""
    from dmdr_rewards.cli import main as score
    from torchvision.utils import save_image

    pictures: dict[str, list[Tensor]] = {"reference": [], "student": []}
    original = evaluator.Evaluator._measured

    def keep(self: Any, images: Tensor, index: range, source: evaluator.Source) -> Any:
        pictures[source.key].extend(images)
        return original(self, images, index, source)

    monkeypatch.setattr(evaluator.Evaluator, "_measured", keep)
    change = f"tracking.evaluation.features={{name: class-label, checkpoint: {classifier}}}"
    row = dmdr_train.evaluate(made / "out", change, "tracking.evaluation.rewards=false", rows=["student"])["student"]
    for name, images in pictures.items():
        (tmp_path / name).mkdir()
        for number, image in enumerate(images):
            save_image(image, tmp_path / name / f"{number:02d}.png")
    folders = [str(tmp_path / "student"), str(tmp_path / "reference")]
    network = ["--features", f"class-label={classifier}", "--workers", "0", "--device", "cpu", "--halves", "0"]
    score(["compare", *folders, *network, "--json"])
    found = json.loads(capsys.readouterr().out)["features"]["class-label"]["measures"]
    assert [found[name]["value"] for name in ("fd", "precision", "recall", "is")] == pytest.approx(
        [row.frechet, row.precision, row.recall, row.inception], rel=1e-3
    )
    assert row.inception is not None
    assert row.inception > 1
