"""Pairs of noise and the teacher's x0, and regression to them: on a tiny SiT and a tiny SD3."""

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dmdr_models
import pytest
import torch
import yaml
from dmdr_train.base.errors import UserError
from dmdr_train.base.random_draws import Draws, named_generator
from dmdr_train.cli import main
from dmdr_train.data.pairs import Pairs, check_pairs
from dmdr_train.data.shard_folder import MANIFEST
from dmdr_train.recipe.schema import Recipe
from dmdr_train.run import preflight, runner
from dmdr_train.run.build import build
from dmdr_train.training import make_pairs
from dmdr_train.training.trainer import Trainer
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

CPU = torch.device("cpu")
COUNT, STEPS, GUIDANCE = 13, 3, 8.0


def write(settings: Recipe, folder: Path, count: int = COUNT, **options: Any) -> Path:
    """Pairs in shards of five, drawn three at a time."""
    options = {"steps": STEPS, "guidance": GUIDANCE, "batch_size": 3, "dtype": "fp32", "shard_size": 5, **options}
    make_pairs.make_pairs(settings, folder, count, **options)
    return folder


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def teach(make_recipe: Callable[..., Recipe], model: Path) -> Recipe:
    """A recipe to make pairs by, of a tiny SiT."""
    return make_recipe(model__path=str(model), rollout={"shift": 2.0}, guidance={"cfg": GUIDANCE})


@pytest.fixture(scope="module")
def pairs(teach: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Thirteen pairs of a tiny SiT; tests must not change them."""
    return write(teach, tmp_path_factory.mktemp("pairs") / "pairs")


# -- what they are


def test_a_pair_follows_from_seed_and_number(pairs: Path, model: Path) -> None:
    """Number 8 by hand: ten labels, Euler steps at shifted times, guidance."""
    family = dmdr_models.load("sit", model)
    network = family.load_network()
    label = int(torch.randint(10, (), generator=named_generator(7, "pairs", 0, "prompt", 8)))
    x = noise = torch.randn(1, *family.latent_shape(*family.size), generator=named_generator(7, "pairs", 0, "noise", 8))
    times = [2 * u / (1 + u) for u in (1, 2 / 3, 1 / 3, 0)]
    with torch.no_grad():
        for t, t_next in itertools.pairwise(times):
            cond, uncond = (
                family.predict(network, x, torch.tensor([t]), {"class_labels": torch.tensor([y])}) for y in (label, 10)
            )
            x = x + (t_next - t) * (uncond + GUIDANCE * (cond - uncond))
    shard = pairs / "shard-00000005-00000010.safetensors"
    found = load_file(shard)
    assert torch.equal(found["noise"][3], noise[0])
    torch.testing.assert_close(found["x0"][3], x[0], rtol=1e-4, atol=1e-5)
    with safe_open(shard, "pt") as file:
        assert json.loads(file.metadata()["prompts"])[3] == label


def test_the_manifest_tells_what_is_there(pairs: Path, capsys: pytest.CaptureFixture[str], teach: Recipe) -> None:
    before = content(pairs)
    write(teach, pairs)  # there is nothing left to do
    assert content(pairs) == before
    size = sum(len(data) for name, data in before.items() if name != MANIFEST)
    assert capsys.readouterr().out == f"Wrote {pairs}: 13 pairs, {size / 1e9:.3g} GB\n"
    manifest = json.loads((pairs / MANIFEST).read_text())
    expected = {"family": "sit", "resolution": 32, "steps": 3, "guidance": 8.0, "shift": 2.0, "seed": 7, "pairs": 13}
    assert expected.items() <= manifest.items()
    assert [entry["pairs"] for entry in manifest["shards"].values()] == [5, 5, 3]


def test_texts_are_drawn_each_once_in_an_epoch(
    sd3: Path, prompts: Path, make_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    model = {"family": "sd3", "path": str(sd3), "max_tokens": 8}
    settings = make_recipe(model=model, data={"prompts": str(prompts)}, guidance={"cfg": 1.5, "teacher_cfg": 3.0})
    folder = write(settings, tmp_path / "pairs", count=10, steps=2, guidance=None)
    found = Pairs(folder, (16, 4, 4), batch_size=4)
    assert sorted(found.prompts[:5]) == sorted(found.prompts[5:]) == sorted(prompts.read_text().splitlines())
    assert json.loads((folder / MANIFEST).read_text())["guidance"] == 3.0  # the teacher's own
    family = dmdr_models.load("sd3", sd3, max_tokens=8)
    start = found.draw(Draws(7, ("generator", 0), range(3)))
    condition = family.condition(start.prompts)
    expected = dmdr_models.sample(family, family.load_network(), condition, start.noise, 2, guidance=3.0)
    assert start.target is not None
    torch.testing.assert_close(start.target, expected, rtol=1e-3, atol=1e-4)


# -- how they are written


@pytest.mark.bits
def test_several_processes_write_what_one_writes(
    teach: Recipe, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        write(teach, tmp_path / "pairs")
    assert content(tmp_path / "pairs") == content(pairs)


@pytest.mark.bits
@pytest.mark.parametrize("after", [0, 4])
def test_an_interrupted_command_goes_on(
    teach: Recipe, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    """`after` so many batches, two of which make a shard."""
    calls = []

    def sample(*arguments: Any) -> Tensor:
        calls.append(len(arguments[3]))
        if len(calls) > after:
            raise KeyboardInterrupt
        return dmdr_models.sample(*arguments)

    folder = tmp_path / "pairs"
    with monkeypatch.context() as patch:
        patch.setattr(make_pairs, "sample", sample)
        with pytest.raises(KeyboardInterrupt):
            write(teach, folder)
    assert len(list(folder.glob("shard-*"))) == after // 2
    assert content(write(teach, folder)) == content(pairs)


def test_more_pairs_join_those_that_are_there(teach: Recipe, pairs: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(pairs, tmp_path / "pairs"))
    (folder / "shard-00000005-00000010.safetensors").write_bytes(b"damaged")
    damaged = content(folder)
    planned = make_pairs.pairs_folder("--output", folder).plan(17, 5)
    assert list(planned) == ["shard-00000005-00000010.safetensors", "shard-00000013-00000017.safetensors"]
    assert content(folder) == damaged
    write(teach, folder, 17)
    now, before = content(folder), content(pairs)
    assert now.keys() - before.keys() == {"shard-00000013-00000017.safetensors"}
    assert all(now[name] == before[name] for name in before if name != MANIFEST)
    assert len(Pairs(folder, (4, 4, 4), 4).prompts) == 17


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"steps": 4}, "was made with steps 3, not 4; give another folder, or a new one to dmdr-train pairs"),
        ({"guidance": 2.0}, "was made with guidance 8.0, not 2.0"),
        ({"dtype": "bf16"}, "was made with dtype fp32, not bf16"),
    ],
)
def test_pairs_of_another_kind_are_not_added(teach: Recipe, pairs: Path, changes: dict[str, Any], said: str) -> None:
    before = content(pairs)
    with pytest.raises(UserError, match=f"^--output: {pairs} {said}"):
        write(teach, pairs, **changes)
    assert content(pairs) == before


# -- what a run says of them


@pytest.fixture(scope="module")
def settings(make_recipe: Callable[..., Recipe], model: Path, pairs: Path) -> Callable[..., Recipe]:
    """Regression for three steps, then distribution matching for two."""

    def settings(**changes: Any) -> Recipe:
        basis: dict[str, Any] = {
            "model__path": str(model),
            "data": {"pairs": str(pairs)},
            "objectives": [
                {"kind": "regression", "stop": 3},
                {"kind": "distribution_matching", "start": 3},
            ],
            "guidance": {"ratio": 2, "dynamics": {"steps": 4}},
            "optim__generator": {"lr": 1e-2, "eps": 1e-3},
            "optim__fake_score": {"lr": 1e-2, "eps": 1e-3, "schedule": "cosine"},
            "run__steps": 5,
            "tracking__samples": {"count": 2},
        }
        return make_recipe(**{**basis, **changes})

    return settings


def test_preflight(
    settings: Callable[..., Recipe], pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dmdr_models import tiny

    preflight.check(settings(run__output=str(tmp_path / "out")), 1)
    check_pairs(settings(model__resolution=32))
    broken = {}
    for name in ("unfinished", "damaged"):
        broken[name] = Path(shutil.copytree(pairs, tmp_path / name))
    (broken["damaged"] / "shard-00000000-00000005.safetensors").unlink()
    manifest = json.loads((pairs / MANIFEST).read_text())
    (broken["unfinished"] / MANIFEST).write_text(json.dumps(manifest | {"shards": {}}))
    other = str(tiny.sit(tmp_path / "other", seed=1))
    for changes, said in (
        ({"data": {"pairs": "gone"}}, "gone holds no manifest.json; give a folder that dmdr-train pairs wrote"),
        ({"data": {"pairs": str(broken["unfinished"])}}, ".*is not finished; go on with dmdr-train pairs -o"),
        ({"data": {"pairs": str(broken["damaged"])}}, ".*is missing or damaged; repair it with dmdr-train pairs -o"),
        ({"model__path": other}, f"{pairs} was made with network "),
        ({"model__resolution": 64}, f"{pairs} was made with resolution 32, not 64"),
    ):
        with pytest.raises(UserError, match=f"^data.pairs: {said}"):
            check_pairs(settings(**changes))
    with pytest.raises(UserError, match=r"data.pairs: .* holds .* and the model.s latents are .4, 8, 8.; give pairs"):
        Pairs(pairs, (4, 8, 8), 4)


# -- regression


pytestmark = pytest.mark.usefixtures("one_process")


def trained(settings: Recipe, steps: int) -> tuple[list[dict[str, float]], Trainer]:
    trainer = build(settings, CPU)
    return [trainer.train_step() for _ in range(steps)], trainer


def test_the_loss_by_hand(settings: Callable[..., Recipe], pairs: Path, model: Path) -> None:
    """x0 at the first time of the grid, on the pairs that are this step's."""
    rows, _ = trained(settings(), 1)
    family = dmdr_models.load("sit", model)
    network = family.load_network()
    order = torch.randperm(13, generator=named_generator(7, "prompts", "generator", 0))[:4].tolist()
    tensors = [load_file(path) for path in sorted(pairs.glob("shard-*"))]
    noise, x0 = (torch.cat([part[name] for part in tensors])[order] for name in ("noise", "x0"))
    labels = [Pairs(pairs, (4, 4, 4), 4).prompts[row] for row in order]
    with torch.no_grad():
        v = family.predict(network, noise, torch.ones(4), family.condition(labels))
    assert rows[0]["loss/regression"] == pytest.approx((noise - v - x0).square().mean().item(), rel=1e-5)


def test_the_loss_falls(settings: Callable[..., Recipe]) -> None:
    recipe = settings(objectives=[{"kind": "regression"}], guidance={}, optim__batch_size=13, optim__generator__lr=2e-3)
    rows, trainer = trained(recipe, 40)
    losses = [row["loss/regression"] for row in rows]
    assert losses[-1] < 0.4 * losses[0]
    assert all("loss/fake_score" not in row for row in rows)
    assert not any(p.any() for n, p in trainer.guidance.module.named_parameters() if "lora_B" in n)


def test_the_fake_score_waits_for_distribution_matching(settings: Callable[..., Recipe]) -> None:
    """And so do its learning rate and the dynamic phase."""
    rows, trainer = trained(settings(), 5)
    assert [sorted(name for name in row if name.startswith("loss/")) for row in rows] == [
        *[["loss/regression"]] * 3,
        *[["loss/distribution_matching", "loss/fake_score"]] * 2,
    ]
    assert rows[3]["teacher_scale"] == 0.5
    assert trainer.guidance.get_lr()[0] == pytest.approx(0, abs=1e-9)  # at the end of four updates
    alone = trained(settings(objectives=[{"kind": "distribution_matching"}], data={}), 1)[0]
    assert rows[4]["teacher_scale"] < alone[0]["teacher_scale"] == 0.5


def test_both_at_once_see_the_same_pairs(settings: Callable[..., Recipe], pairs: Path) -> None:
    both = [{"kind": "regression", "weight": 0.5}, {"kind": "distribution_matching"}]
    trainer = build(settings(objectives=both), CPU)
    for update in ("fake_score", "generator"):
        draws = trainer.micro_batches(update, 0)[0]
        found, expected = trainer.rollouts.draw(draws, 0, {"pairs"}), Pairs(pairs, (4, 4, 4), 4).draw(draws)
        assert found.prompts == expected.prompts
        assert torch.equal(found.target, expected.target)  # type: ignore[arg-type]
    rows = [trainer.train_step() for _ in range(2)]
    assert {"loss/regression", "loss/distribution_matching", "loss/fake_score"} <= rows[0].keys()


def test_the_split_of_a_batch_does_not_change_the_run(settings: Callable[..., Recipe]) -> None:
    whole, _ = trained(settings(optim__batch_size=8), 4)
    split, _ = trained(settings(optim__batch_size=8, optim__accumulation=8), 4)
    for row, expected in zip(split, whole, strict=True):
        assert row == pytest.approx(expected, rel=1e-3, abs=1e-7)


def test_a_dry_run_reaches_every_stage(settings: Callable[..., Recipe]) -> None:
    assert {"loss/fake_score", "loss/distribution_matching", "loss/regression"} <= runner.dry_run(settings()).keys()


# -- the command


@pytest.mark.bits
def test_the_command(
    teach: Recipe, pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("recipe.yaml").write_text(yaml.safe_dump(teach.model_dump(mode="json")))
    command = ["pairs", "--config", "recipe.yaml", "-o", "pairs", "--steps", "3", "--dtype", "fp32"]
    main([*command, "--count", "3", "--batch-size", "3"])
    assert capsys.readouterr().out.startswith("Wrote pairs: 3 pairs, ")
    found, expected = (load_file(next(iter(sorted(folder.glob("shard-*"))))) for folder in (Path("pairs"), pairs))
    assert all(torch.equal(found[name], expected[name][:3]) for name in found)
    for arguments, said in (
        (["--count", "0"], "--count: must be at least 1, got 0"),
        (["--count", "3", "--guidance", "0.5"], "--guidance: must be at least 1, which is no guidance, got 0.5"),
        (["--count", "3", "model.path=gone"], "error: model.path: no model folder gone"),
        (["--count", "3", "--steps", "4"], "error: --output: pairs was made with steps 3, not 4"),
    ):
        with pytest.raises(SystemExit) as caught:
            main([*command, *arguments])
        assert caught.value.code == 2
        assert said in capsys.readouterr().err
