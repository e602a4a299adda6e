"""Checkpoints: whole or refused, of this recipe or refused, and never a way to run somebody's code."""

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from dmdr_train.base.atomic_files import fingerprint
from dmdr_train.base.errors import UserError
from dmdr_train.base.versions import versions
from dmdr_train.checkpoint.compatibility import compare
from dmdr_train.checkpoint.find import checkpoints_in, find_checkpoint, newest, run_of, step_of
from dmdr_train.checkpoint.input_fingerprints import fingerprints
from dmdr_train.checkpoint.load import load_checkpoint
from dmdr_train.checkpoint.manifest import RECIPE, signed, verify
from dmdr_train.checkpoint.retention import prune
from dmdr_train.checkpoint.save import Saving
from dmdr_train.distributed.averaged_weights import Average
from dmdr_train.distributed.deepspeed_internals import saved_types
from dmdr_train.recipe.load import dump_recipe
from dmdr_train.recipe.schema import Recipe
from dmdr_train.run.build import build
from dmdr_train.training.trainer import Trainer
from safetensors.torch import load_file

pytestmark = pytest.mark.usefixtures("one_process")
CPU = torch.device("cpu")


def made_of(settings: Recipe) -> tuple[Trainer, Average]:
    trainer = build(settings, CPU)
    return trainer, Average(trainer.generator, settings.optim.ema)


@pytest.fixture(scope="module")
def saved(make_recipe: Callable[..., Recipe], model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Any]:
    """For ZeRO 0 and 2: a run of three steps, a checkpoint at each, the last two kept."""
    runs = {}
    for stage in (0, 2):
        settings = make_recipe(model__path=str(model), optim__zero_stage=stage, optim__ema=0.5)
        trainer, average = made_of(settings)
        folder = tmp_path_factory.mktemp("checkpoints")
        for _ in range(3):
            trainer.train_step()
            average.update(trainer.step)
            path = Saving(folder, settings, trainer, average).finish()
            prune(folder, trainer.step, 2, 0, None)
        runs[stage] = (settings, path, trainer, average)
    return runs


@pytest.fixture
def copy(saved: dict[int, Any], tmp_path: Path) -> Path:
    """A checkpoint to do harm to."""
    return shutil.copytree(saved[0][1], tmp_path / "step-00000003")


def sign_again(path: Path, **changes: Any) -> None:
    """Make the manifest agree with the files and with these changes of it, as an attacker would."""
    manifest = {**json.loads((path / "manifest.json").read_text()), **changes}
    manifest["files"] = {name: fingerprint(path / name) for name in manifest["files"]}
    (path / "manifest.json").write_text(json.dumps(signed(manifest)))


def load(settings: Recipe, path: Path) -> tuple[Trainer, Average]:
    trainer, average = made_of(settings)
    load_checkpoint(path, trainer, average)
    return trainer, average


def test_the_newest_are_kept_whole(saved: dict[int, Any]) -> None:
    for _, path, _, _ in saved.values():
        assert [p.name for p in checkpoints_in(path.parent)] == ["step-00000002", "step-00000003"]
        assert sorted(os.listdir(path.parent)) == ["step-00000002", "step-00000003"]  # nothing half written
        files = set(json.loads((path / "manifest.json").read_text())["files"])
        on_disk = {str(p.relative_to(path)) for p in path.rglob("*") if p.is_file()}
        assert files == on_disk - {"manifest.json"}
        assert {"generator.safetensors", "student.safetensors", "fake_score.safetensors", "recipe.yaml"} < files


def test_all_of_it_is_on_the_disk_before_it_has_its_name(
    saved: dict[int, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a machine that loses its power then leaves is whole, or not there."""
    settings, _, trainer, average = saved[0]
    settled: list[str] = []
    names: list[set[str]] = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (settled.append(os.readlink(f"/proc/self/fd/{fd}")), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda old, new: (names.append(set(settled)), replace(old, new)))
    path = Saving(tmp_path, settings, trainer, average).finish()
    (before,) = names
    partial = path.with_name(f".{path.name}.partial")
    assert before == {str(partial / found.relative_to(path)) for found in (path, *path.rglob("*"))}
    assert settled[-1] == str(tmp_path)


@pytest.mark.parametrize("stage", [0, 2])
def test_what_is_loaded_is_what_was_saved(saved: dict[int, Any], stage: int) -> None:
    settings, path, trainer, average = saved[stage]
    again, again_average = load(settings, path)
    assert again.step == 3
    for name in ("generator", "guidance"):
        ours, theirs = getattr(trainer, name), getattr(again, name)
        expected = dict(ours.module.named_parameters())
        for key, parameter in theirs.module.named_parameters():
            assert torch.equal(parameter, expected[key]), key
        assert theirs.get_lr() == ours.get_lr()
        for old, new in zip(_tensors(ours.optimizer), _tensors(theirs.optimizer), strict=True):
            assert torch.equal(old, new)
    student = load_file(path / "student.safetensors")
    for key, value in average.state.items():
        assert torch.equal(again_average.state[key], value)
        assert torch.equal(student[key].flatten(), value)
    assert not torch.equal(
        average.state["proj_out.bias"], dict(trainer.generator.module.named_parameters())["proj_out.bias"]
    )


def _tensors(optimizer: Any) -> list[torch.Tensor]:
    """Moments and counters of an AdamW, inside DeepSpeed's wrapper or bare."""
    inner = getattr(optimizer, "optimizer", optimizer)
    return [v for state in inner.state.values() for v in state.values() if isinstance(v, torch.Tensor)]


@pytest.mark.parametrize("name", ["generator.safetensors", "recipe.yaml", "generator/mp_rank_00_model_states.pt"])
def test_a_damaged_file_is_named(copy: Path, name: str) -> None:
    content = bytearray((copy / name).read_bytes())
    content[len(content) // 2] ^= 1
    (copy / name).write_bytes(content)
    with pytest.raises(UserError) as caught:
        verify("run.resume", copy)
    assert str(caught.value) == f"run.resume: {copy / name} is damaged; give another checkpoint"


@pytest.mark.parametrize("name", ["average-rank0.safetensors", "guidance/mp_rank_00_model_states.pt"])
def test_a_missing_file_is_named(copy: Path, name: str) -> None:
    (copy / name).unlink()
    with pytest.raises(UserError) as caught:
        verify("run.init_from", copy)
    assert str(caught.value) == f"run.init_from: {copy / name} is missing; give another checkpoint"


@pytest.mark.parametrize(
    "damage", [lambda text: text[:18], lambda text: text.replace('"step": 3', '"step": 7'), lambda text: "{}"]
)
def test_a_damaged_manifest_is_named(copy: Path, damage: Callable[[str], str]) -> None:
    """Also where it reads as one."""
    intact = (copy / "manifest.json").read_text()
    (copy / "manifest.json").write_text(damage(intact))
    assert damage(intact) != intact
    with pytest.raises(UserError, match=r"run.resume: .*manifest.json is damaged; give another checkpoint"):
        verify("run.resume", copy)


@pytest.mark.parametrize("name", ["recipe.yaml", "student.safetensors"])
def test_a_checkpoint_that_does_not_list_all_its_files_is_not_whole(copy: Path, name: str) -> None:
    files = json.loads((copy / "manifest.json").read_text())["files"]
    sign_again(copy, files={other: entry for other, entry in files.items() if other != name})
    with pytest.raises(UserError, match=rf"^run.resume: {copy / name} is missing; give another checkpoint$"):
        verify("run.resume", copy)


@pytest.mark.parametrize("changes", [{"step": -5}, {"world_size": 0}, {"weights": []}])
def test_a_manifest_of_nothing_that_can_be_is_damaged(copy: Path, changes: dict[str, Any]) -> None:
    sign_again(copy, **changes)
    with pytest.raises(UserError, match=r"manifest.json is damaged"):
        verify("run.resume", copy)


def test_a_disk_that_gives_nothing_back_is_damage(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(path: Path) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))

    monkeypatch.setattr("dmdr_train.checkpoint.manifest.fingerprint", failing)
    with pytest.raises(UserError, match=r"cannot be read \(Input/output error\); give another checkpoint"):
        verify("run.resume", copy)


@pytest.mark.parametrize("key", ["run__resume", "run__init_from"])
def test_damage_is_seen_before_anything_is_done_with_it(
    make_recipe: Callable[..., Recipe], saved: dict[int, Any], copy: Path, key: str
) -> None:
    (copy / "generator.safetensors").write_bytes(b"nothing")
    settings = make_recipe(model__path=saved[0][0].model.path, optim__ema=0.5, **{key: str(copy)})
    with pytest.raises(UserError, match=r"generator.safetensors is damaged"):
        find_checkpoint(settings) or build(settings, CPU)


def test_auto_falls_back_to_the_checkpoint_before(
    make_recipe: Callable[..., Recipe], saved: dict[int, Any], tmp_path: Path
) -> None:
    """Damaged, cut short, swapped, or gone: the file is named and the one before is taken; an explicit path is not."""
    settings, path, _, _ = saved[0]
    run = tmp_path / "run"
    shutil.copytree(path.parent, run / "checkpoints")
    newer, older = (run / "checkpoints" / name for name in ("step-00000003", "step-00000002"))
    basis = {"model__path": settings.model.path, "optim__ema": 0.5, "run__output": str(run)}
    auto, given = (make_recipe(**basis, run__resume=choice) for choice in ("auto", str(newer)))
    intact = {name: (newer / name).read_bytes() for name in ("generator.safetensors", "manifest.json")}
    harms = {
        "generator.safetensors": [
            intact["generator.safetensors"][:-1],
            (newer / "fake_score.safetensors").read_bytes(),
        ],
        "manifest.json": [b"", b"[]", intact["manifest.json"][:-9]],
    }
    for name, contents in harms.items():
        for content in contents:
            (newer / name).write_bytes(content)
            said: list[str] = []
            assert find_checkpoint(auto, said.append) == older
            warning = f"warning: run.resume: {newer / name} is damaged; falling back to the checkpoint before"
            assert said[0] == warning
            with pytest.raises(UserError, match=rf"{newer / name} is damaged; give another checkpoint"):
                find_checkpoint(given, said.append)
        (newer / name).write_bytes(intact[name])
    assert find_checkpoint(auto, print) == newer
    for checkpoint_folder in (newer, older):
        (checkpoint_folder / "student.safetensors").unlink()
    with pytest.raises(UserError, match=r"run.resume: every checkpoint in .*/checkpoints is damaged; give another run"):
        find_checkpoint(auto, print)


def test_what_differs_is_said(make_recipe: Callable[..., Recipe], saved: dict[int, Any], copy: Path) -> None:
    """A line for every key, whether it may change or not, and for packages."""
    manifest = json.loads((copy / "manifest.json").read_text())
    assert manifest["versions"] == versions()
    sign_again(copy, versions={"torch": "1.0"})
    basis = {"model__path": saved[0][0].model.path, "optim__ema": 0.5}
    said: list[str] = []
    changes = {"run__steps": 20, "run__output": "elsewhere", "guidance__ratio": 5, "optim__clip": 2.0}
    with pytest.raises(UserError) as caught:
        compare(make_recipe(**basis, **changes), copy, said.append)
    assert said == [
        f"must not change: guidance.ratio is 5 here and 2 in {copy}",
        f"must not change: optim.clip is 2.0 here and 1.0 in {copy}",
        f"changed: run.steps is 20 here and 10 in {copy}",
        f"changed: torch is {versions()['torch']} here and 1.0 in {copy}",
    ]
    assert str(caught.value).startswith(f"guidance.ratio: is 5 here and 2 in {copy}; set it back, or start a new run")


def test_without_its_manifest_it_is_none_or_damaged(make_recipe: Callable[..., Recipe], copy: Path) -> None:
    (copy / "manifest.json").unlink()
    shutil.copytree(copy, copy.parents[1] / "run/checkpoints" / copy.name)
    with pytest.raises(UserError, match=r"run.resume: every checkpoint in .* is damaged; give another run"):
        find_checkpoint(make_recipe(run__resume="auto", run__output=str(copy.parents[1] / "run")), print)
    with pytest.raises(UserError, match=r"run.resume: .* holds no checkpoint"):
        newest("run.resume", str(copy))


class Attack:
    """Unpickling it leaves a file."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> Any:
        return (Path.write_text, (self.mark, "your code was here"))


@pytest.mark.parametrize("stage", [0, 2])
def test_code_in_a_checkpoint_is_not_run(saved: dict[int, Any], tmp_path: Path, stage: int) -> None:
    settings, path, _, _ = saved[stage]
    pickles = [str(p.relative_to(path)) for p in path.rglob("*.pt")]
    assert len(pickles) == {0: 2, 2: 4}[stage]
    for number, name in enumerate(pickles):
        mark, bad = tmp_path / f"mark{number}", shutil.copytree(path, tmp_path / f"bad{number}")
        with torch.serialization.safe_globals(saved_types()):
            content = torch.load(bad / name, weights_only=True)
        torch.save({**content, "lr_scheduler": Attack(mark)}, bad / name)
        sign_again(bad)
        with pytest.raises(UserError) as caught:
            load(settings, bad)
        assert name in str(caught.value)
        assert not mark.exists()
    torch.load(bad / name, weights_only=False)  # what the trainer must not do
    assert mark.exists(), "the attack must be one"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("run__seed", 8),
        ("optim__batch_size", 8),
        ("optim__zero_stage", 1),
        ("optim__ema", None),
        ("optim__generator", {"lr": 1e-3, "betas": [0.5, 0.9]}),
        ("guidance__ratio", 5),
        ("guidance__dynamics", {"steps": 4}),
        ("guidance__teacher_cfg", 2.0),
        ("objectives", [{"kind": "distribution_matching", "weight": 2.0}]),
        ("model__fake_score_lora", {"rank": 8, "alpha": 4}),
        ("memory__shared_backbone", False),
        ("memory__reward_crop", 16),
        ("data__classes", [1, 2]),
        ("rollout__steps", 2),
    ],
)
def test_another_recipe_is_refused(
    make_recipe: Callable[..., Recipe], saved: dict[int, Any], key: str, value: Any
) -> None:
    changes = {"model__path": saved[0][0].model.path, "optim__ema": 0.5, key: value}
    with pytest.raises(UserError) as caught:
        compare(make_recipe(**changes), saved[0][1], print)
    assert str(caught.value).startswith(key.replace("__", "."))
    assert "set it back, or start a new run with another run.output" in str(caught.value)


@pytest.mark.parametrize(("key", "value", "refused"), [("seed", 1, True), ("teacher_steps", [1], False)])
def test_rows_of_an_evaluation_are_measured_alike(
    make_recipe: Callable[..., Recipe], saved: dict[int, Any], copy: Path, key: str, value: Any, refused: bool
) -> None:
    evaluation = {"reference": "shapes", "classifier": "any"}
    basis = {"model__path": saved[0][0].model.path, "optim__ema": 0.5}
    (copy / RECIPE).write_text(dump_recipe(make_recipe(**basis, tracking__evaluation=evaluation)))
    asked = make_recipe(**basis, tracking__evaluation=evaluation | {key: value})
    if refused:
        with pytest.raises(UserError, match=f"tracking.evaluation.{key}: is {value} here"):
            compare(asked, copy, print)
    else:
        compare(asked, copy, print)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("run__steps", 20),
        ("run__output", "elsewhere"),
        ("run__checkpoint_every", 1),
        ("optim__generator", {"lr": 5e-4}),
        ("optim__fake_score", {"lr": 5e-4}),
        ("optim__accumulation", 2),
        ("tracking", {"log_every": 3}),
        ("memory__gradient_checkpointing", ["network"]),
    ],
)
def test_a_harmless_change_is_not(
    make_recipe: Callable[..., Recipe], saved: dict[int, Any], key: str, value: Any
) -> None:
    changes = {"model__path": saved[0][0].model.path, "optim__ema": 0.5, key: value}
    said: list[str] = []
    compare(make_recipe(**changes), saved[0][1], said.append)
    assert all(line.startswith(f"changed: {key.replace('__', '.')}") for line in said)
    assert bool(said) == (key != "run__output")


@pytest.mark.parametrize("stage", [0, 2])
def test_another_learning_rate_is_the_one_that_goes_on(
    make_recipe: Callable[..., Recipe], saved: dict[int, Any], stage: int
) -> None:
    """At the place of its schedule that the checkpoint was at."""
    settings, path, _, _ = saved[stage]
    rates = {"optim__generator": {"lr": 5e-4, "warmup": 7}, "optim__fake_score": {"lr": 2e-4}}
    changes = {"model__path": settings.model.path, "optim__zero_stage": stage, "optim__ema": 0.5}
    trainer, _ = load(make_recipe(**changes, **rates), path)
    assert trainer.generator.get_lr() == [5e-4 * 4 / 8]
    assert trainer.guidance.get_lr() == [2e-4]
    trainer.train_step()
    assert trainer.generator.get_lr() == [5e-4 * 5 / 8]
    assert [group["lr"] for group in trainer.guidance.optimizer.param_groups] == [2e-4]


def test_a_key_that_an_earlier_version_did_not_know_has_its_default(
    make_recipe: Callable[..., Recipe], saved: dict[int, Any], copy: Path
) -> None:
    settings = saved[0][0]
    text = (copy / "recipe.yaml").read_text()
    assert "  group_size: 1\n" in text
    (copy / "recipe.yaml").write_text(text.replace("  group_size: 1\n", ""))
    said: list[str] = []
    compare(make_recipe(model__path=settings.model.path, optim__ema=0.5), copy, said.append)
    assert said == []
    (copy / "recipe.yaml").write_text(text.replace("  group_size: 1\n", "  group_size: 1\n  later: 2\n"))
    with pytest.raises(UserError, match=r"^rollout.later: is None here and 2 in "):
        compare(make_recipe(model__path=settings.model.path, optim__ema=0.5), copy, said.append)


def test_fewer_steps_than_were_made_are_refused(make_recipe: Callable[..., Recipe], saved: dict[int, Any]) -> None:
    settings, path, _, _ = saved[0]
    changes = {"model__path": settings.model.path, "optim__ema": 0.5, "run__steps": step_of(path) - 1}
    with pytest.raises(UserError, match=rf"^run.steps: {step_of(path) - 1} is below the step of {path}; give at least"):
        compare(make_recipe(**changes), path, print)


def test_an_evaluation_may_come_and_go_and_not_change(
    make_recipe: Callable[..., Recipe], model: Path, classifier: Path, tmp_path: Path
) -> None:
    """What it measured before would stand in one table with what it measures now."""

    def settings(**evaluation: Any) -> Recipe:
        with_it = {"classifier": str(classifier), "reference": "shapes", "pictures": 100, **evaluation}
        return make_recipe(model__path=str(model), tracking={"evaluation": with_it if evaluation else None})

    with_it, without = settings(every=2), settings()
    trainer, average = made_of(without)
    for before, after in ((with_it, without), (without, with_it), (with_it, settings(every=3))):
        path = Saving(tmp_path, before, trainer, average, fingerprints(before)).finish()
        compare(after, path, print)
    path = Saving(tmp_path, with_it, trainer, average, fingerprints(with_it)).finish()
    for changed in ({"pictures": 200}, {"seed": 5}, {"reference": str(classifier)}):
        (name,) = changed
        with pytest.raises(UserError, match=rf"^tracking.evaluation.{name}: "):
            compare(settings(every=2, **changed), path, print)


def test_the_run_of_a_checkpoint() -> None:
    assert run_of(Path("/runs/a/checkpoints/step-00000003")) == Path("/runs/a")
    assert run_of(Path("/elsewhere/step-00000003")) is None
    assert run_of(Path("/step-00000003")) is None


def test_files_that_are_not_a_checkpoints_own_are_not_read(
    make_recipe: Callable[..., Recipe], saved: dict[int, Any], copy: Path
) -> None:
    settings, path = saved[0][:2]
    for name in ("average-rank1.safetensors", "generator/zero_pp_rank_1_mp_rank_00_optim_states.pt"):
        (copy / name).write_text("no weights")
    _, found = load(make_recipe(model__path=settings.model.path, optim__ema=0.5), copy)
    _, expected = load(make_recipe(model__path=settings.model.path, optim__ema=0.5), path)
    assert all(torch.equal(found.state[name], expected.state[name]) for name in expected.state)
    assert found.state


def test_inputs_may_move_and_not_change(
    make_recipe: Callable[..., Recipe], saved: dict[int, Any], model: Path, classifier: Path, tmp_path: Path
) -> None:
    """A teacher and a reward are known by what they hold, wherever they lie."""
    here, there = tmp_path / "here", tmp_path / "there"
    for place in (here, there):
        shutil.copytree(model, place / "sit")
        shutil.copytree(classifier, place / "reward")

    def settings(place: Path) -> Recipe:
        reward = {"name": "class-label", "checkpoint": str(place / "reward")}
        objectives = [{"kind": "distribution_matching"}, {"kind": "refl", "reward": reward}]
        return make_recipe(model__path=str(place / "sit"), objectives=objectives)

    made = settings(here)
    trainer, average = made_of(made)
    path = Saving(tmp_path / "checkpoints", made, trainer, average, fingerprints(made)).finish()
    said: list[str] = []
    compare(settings(there), path, said.append)
    assert said == [
        f"moved: model.path is {there}/sit here and {here}/sit in {path}",
        f"moved: objectives.1.reward.checkpoint is {there}/reward here and {here}/reward in {path}",
    ]
    shutil.copytree(there / "sit", tmp_path / "vae")
    (tmp_path / "vae/vae/config.json").write_text((here / "sit/vae/config.json").read_text() + " ")
    other = made.model_copy(update={"model": made.model.model_copy(update={"path": str(tmp_path / "vae")})})
    with pytest.raises(UserError, match=r"^model.vae: .*, with other contents; set it back"):
        compare(other, path, print)
    weights = bytearray((here / "reward/model.safetensors").read_bytes())
    weights[-1] ^= 1
    (here / "reward/model.safetensors").write_bytes(weights)
    with pytest.raises(UserError) as caught:
        compare(made, path, said.append)
    assert str(caught.value).startswith(f"objectives.1.reward.checkpoint: is {here}/reward here and {here}/reward in ")
    assert f"{path}, with other contents; set it back, or start a new run" in str(caught.value)
    assert said[2:] == [
        f"must not change: objectives.1.reward.checkpoint is {here}/reward here and {here}/reward in {path}, "
        "with other contents"
    ]


def test_another_number_of_processes_is_said(
    make_recipe: Callable[..., Recipe], saved: dict[int, Any], copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sign_again(copy, world_size=2)
    changes = {"model__path": saved[0][0].model.path, "optim__ema": 0.5}
    said: list[str] = []
    compare(make_recipe(**changes), copy, said.append)
    assert said == [f"changed: the number of processes is 1 here and 2 in {copy}"]
    with pytest.raises(UserError) as caught:
        compare(make_recipe(**changes, optim__eight_bit=True), copy, said.append)
    assert str(caught.value).startswith("optim.eight_bit: ")


def test_which_checkpoint_is_asked_for(
    make_recipe: Callable[..., Recipe], saved: dict[int, Any], tmp_path: Path
) -> None:
    settings, path, _, _ = saved[0]
    run = tmp_path / "run"
    shutil.copytree(path.parent, run / "checkpoints")

    def found(resume: str, output: Path = run) -> Path | None:
        changes = {"run__resume": resume, "run__output": str(output), "optim__ema": 0.5}
        return find_checkpoint(make_recipe(model__path=settings.model.path, **changes))

    newer, older = run / "checkpoints/step-00000003", run / "checkpoints/step-00000002"
    assert found("never") is None
    assert found("auto") == newer
    assert found("auto", tmp_path / "new") is None
    assert found(str(run)) == found(str(run / "checkpoints")) == newer
    assert found(str(older)) == older
    with pytest.raises(UserError, match=r"run.resume: .*nowhere holds no checkpoint"):
        found(str(tmp_path / "nowhere"))


def test_weights_of_another_model_are_refused(
    make_recipe: Callable[..., Recipe], saved: dict[int, Any], model: Path
) -> None:
    path = saved[0][1]
    lora = {"rank": 8, "alpha": 4}
    other = make_recipe(model__path=str(model), model__fake_score_lora=lora, run__init_from=str(path))
    with pytest.raises(
        UserError, match=r"run.init_from: .*fake_score.safetensors belongs to another model: .*lora_A"
    ) as e:
        build(other, CPU)
    assert "has shape (4, 32) there and (8, 32) here" in str(e.value)


def test_the_checkpoint_of_another_model_is_refused(
    make_recipe: Callable[..., Recipe], saved: dict[int, Any], tmp_path: Path
) -> None:
    """model.path may change, since folders move; what is in it may not."""
    from dmdr_models import tiny

    wider = make_recipe(model__path=str(tiny.sit(tmp_path / "wider", width=48)), optim__ema=0.5)
    with pytest.raises(UserError, match=r"run.resume: .*generator.safetensors belongs to another model: .* has shape"):
        load(wider, saved[0][1])


def test_a_new_run_from_the_networks_of_another(
    make_recipe: Callable[..., Recipe], saved: dict[int, Any], model: Path
) -> None:
    _, path, trainer, _ = saved[0]
    new = build(make_recipe(model__path=str(model), run__init_from=str(path), run__seed=99), CPU)
    assert new.step == 0
    for ours, theirs in ((trainer.generator, new.generator), (trainer.guidance, new.guidance)):
        for (name, a), b in zip(ours.module.named_parameters(), theirs.module.parameters(), strict=True):
            assert torch.equal(a, b), name


def test_the_recipe_is_kept_with_the_checkpoint(saved: dict[int, Any]) -> None:
    settings, path, _, _ = saved[0]
    assert (path / "recipe.yaml").read_text() == dump_recipe(settings)
