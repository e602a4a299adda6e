"""dmdr-score compare, run as a user runs it, against torchmetrics on the same features."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dmdr_rewards.cli import main
from dmdr_rewards.compare import extraction, intervals
from dmdr_rewards.compare.intervals import estimates
from dmdr_rewards.compare.metrics import Statistics, density_coverage, precision_recall
from dmdr_rewards.networks.classifier import ImageClassifier
from PIL import Image
from torch import Tensor, nn

from .test_cli import fails

NETWORK = ("--features", "class-label=classifier")
QUIET = ("--workers", "0", "--device", "cpu")


def draw(folder: Path, count: int, seed: int, mean: float) -> None:
    """Pictures of several sizes: blocks of noise around a colour."""
    folder.mkdir()
    draws = np.random.default_rng(seed)
    for number in range(count):
        height, width = draws.integers(20, 40, 2)
        blocks = draws.normal(mean, 40, (1, 1, 3)) + draws.normal(0, 60, (5, 5, 3)).repeat(8, 0).repeat(8, 1)
        pixels = blocks[:height, :width].clip(0, 255).astype("uint8")
        Image.fromarray(pixels).save(folder / f"{number:03d}.png")


@pytest.fixture(scope="module")
def drawn(vit_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compare")
    (folder / "classifier").symlink_to(vit_folder)
    draw(folder / "a", 40, seed=0, mean=110)
    draw(folder / "b", 30, seed=1, mean=140)
    return folder


@pytest.fixture
def home(drawn: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(drawn)
    return drawn


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    capsys.readouterr()
    main(["compare", *arguments, *QUIET, "--json"])
    return json.loads(capsys.readouterr().out)


def values(result: dict[str, Any], network: str = "class-label") -> dict[str, float]:
    return {name: each["value"] for name, each in result["features"][network]["measures"].items()}


def features(folder: str) -> Tensor:
    """By the classifier's own call, one picture at a time."""
    classifier = ImageClassifier.from_folder("classifier")
    return torch.cat([classifier.features([path]) for path in sorted(Path(folder).iterdir())])


class Given(nn.Module):
    num_features = 32

    def forward(self, rows: Tensor) -> Tensor:
        return rows


def test_two_folders_agree_with_torchmetrics(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from torchmetrics.image.fid import FrechetInceptionDistance
    from torchmetrics.image.kid import KernelInceptionDistance

    result = run(capsys, "a", "b", *NETWORK, "--halves", "2", "-o", "measures.json")
    assert result == json.loads(Path("measures.json").read_text())
    assert (result["a"]["pictures"], result["b"]["pictures"]) == (40, 30)
    metrics: dict[str, Any] = {
        "fd": FrechetInceptionDistance(feature=Given()).set_dtype(torch.float64),
        "kid": KernelInceptionDistance(feature=Given(), subsets=200, subset_size=30),
    }
    for metric in metrics.values():
        metric.update(features("b").double(), real=True)
        metric.update(features("a").double(), real=False)
    found = values(result)
    assert found["fd"] == pytest.approx(float(metrics["fd"].compute()), rel=1e-4)
    assert found["kid"] == pytest.approx(float(metrics["kid"].compute()[0]), rel=0.1)  # other random subsets
    manifolds = [*precision_recall(features("b"), features("a")), *density_coverage(features("b"), features("a"))]
    names = ("precision", "recall", "density", "coverage")
    assert [found[name] for name in names] == pytest.approx(manifolds, abs=0.01)
    assert abs(manifolds[0] - manifolds[1]) > 0.02, "A and B cannot be exchanged"
    log_p = torch.cat(
        [ImageClassifier.from_folder("classifier").logits([path]) for path in sorted(Path("a").iterdir())]
    )
    log_p = log_p.double().log_softmax(dim=1)
    kl = log_p.exp() * (log_p - log_p.exp().mean(dim=0).log())
    assert found["is"] == pytest.approx(float(kl.sum(dim=1).mean().exp()), rel=1e-4)
    for measure in (result["features"]["class-label"]["measures"][name] for name in ("fd", "is")):
        assert 0 <= measure["low"] < measure["value"] < measure["high"]


def test_the_table_shows_each_network(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["compare", "a", "b", *NETWORK, "--features", "small@class-label=classifier", *QUIET, "--halves", "0"])
    printed = capsys.readouterr().out
    assert "a (40) against b (30)" in printed
    assert all(
        word in printed
        for word in ("class-label", "small", "fd", "kid", "recall", "coverage", "0 is best", "of A alone")
    )
    assert "intervals" not in printed


def test_a_reference_of_statistics(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    known = Statistics.of(features("b"))
    np.savez("b.npz", mu=known.mean.numpy(), sigma=known.covariance.numpy())
    pictures = values(run(capsys, "a", "b", *NETWORK, "--halves", "0"))
    found = {"fd": pytest.approx(pictures["fd"], rel=1e-4), "is": pytest.approx(pictures["is"], rel=1e-6)}
    assert values(run(capsys, "a", "b.npz", *NETWORK)) == found
    np.savez("wide.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    assert "B: wide.npz has 2048 features and class-label has 32" in fails(
        capsys, "compare", "a", "wide.npz", *NETWORK, *QUIET
    )


def test_a_reference_batch_of_adm(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """FD by its statistics, which are of more pictures, and the other measures by the pictures in it."""
    squares = [np.asarray(Image.open(path).resize((24, 24))) for path in sorted(Path("b").iterdir())]
    Path("b_squares").mkdir(exist_ok=True)
    for number, square in enumerate(squares):
        Image.fromarray(square).save(f"b_squares/{number:03d}.png")
    known = Statistics.of(features("b"))
    np.savez("batch.npz", np.stack(squares), mu=known.mean.numpy(), sigma=known.covariance.numpy(), mu_s=np.zeros(3))
    np.savez("samples.npz", np.stack(squares))
    options = (*NETWORK, "--halves", "0")
    result = run(capsys, "a", "batch.npz", *options)
    assert result["b"] == {"statistics": "batch.npz", "images": "batch.npz", "pictures": 30, "left_out": 0}
    found, plain = values(result), values(run(capsys, "a", "b_squares", *options))
    assert found.pop("fd") == pytest.approx(values(run(capsys, "a", "b", *options))["fd"], rel=1e-4)
    assert found == {name: value for name, value in plain.items() if name != "fd"}
    assert values(run(capsys, "a", "samples.npz", *options)) == plain
    main(["compare", "samples.npz", "batch.npz", *NETWORK, *QUIET, "--halves", "2"])
    assert "samples.npz (30) against batch.npz (30)" in capsys.readouterr().out


def test_squares_come_first(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Pictures that already are such squares are compared as they are."""
    for name in ("a", "b"):
        shutil.rmtree(f"{name}24", ignore_errors=True)
        Path(f"{name}24").mkdir()
        for path in Path(name).iterdir():
            picture = Image.open(path)
            scale = 24 / min(picture.size)
            width, height = (int(side * scale) for side in picture.size)
            left, top = int((width - 24) / 2), int((height - 24) / 2)
            small = picture.resize((width, height), Image.Resampling.BICUBIC)
            small.crop((left, top, left + 24, top + 24)).save(f"{name}24/{path.name}")
    small = run(capsys, "a", "b", *NETWORK, "--halves", "0", "--size", "24")
    assert values(small) == values(run(capsys, "a24", "b24", *NETWORK, "--halves", "0"))
    assert values(small) != values(run(capsys, "a", "b", *NETWORK, "--halves", "0"))
    assert "centre crop 24x24; squash to 16x16" in small["features"]["class-label"]["preprocess"]


def test_pictures_count_once_and_unread_ones_are_left_out(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree("a", tmp_path / "c")
    (tmp_path / "c" / "000.png").write_bytes(b"no picture")
    rows = [f'{{"file_name": "{path.name}", "prompt": ["x", "y"]}}\n' for path in sorted(Path("a").iterdir())]
    (tmp_path / "c" / "table.jsonl").write_text("".join(rows))
    with pytest.warns(UserWarning, match="A: pictures left out: 1, such as 000.png: cannot be read"):
        result = run(capsys, str(tmp_path / "c" / "table.jsonl"), "b", *NETWORK, "--halves", "0")
    assert result["a"] == {"images": str(tmp_path / "c" / "table.jsonl"), "pictures": 39, "left_out": 1}


def test_shared_and_few_pictures_cause_warnings(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "again").symlink_to(home / "b")
    with (
        pytest.warns(UserWarning, match="A and B share 30 pictures"),
        pytest.warns(UserWarning, match="B has 30 pictures for the 32 features of class-label: FD is far too high"),
    ):
        same = values(run(capsys, str(tmp_path / "again"), "b", *NETWORK, "--halves", "0"))
    assert same["fd"] == pytest.approx(0, abs=1e-3)
    assert (same["precision"], same["recall"]) == (1.0, 1.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("a", "few", *NETWORK), "B: few holds 5 pictures: give at least 12"),
        (("nothing", "b", *NETWORK), "A: nothing: no picture there; give a folder"),
        (("a", "b", "--features", "incepton=x"), "unknown network 'incepton': did you mean 'inception'"),
        (("a", "b", "--features", "inception"), "--features inception: inception comes without a checkpoint: give"),
        (
            ("a", "b", "--features", "inception=x.pth"),
            "x.pth: no such file or folder; the official weights: curl -LO https://",
        ),
        (
            ("a", "b", "--features", "dinov2=x.pth"),
            "x.pth: no such file or folder; the official weights: curl -O https://",
        ),
        (("a", "b", "--features", "class-label=classifier:2"), "--features: class-label has the weight 2"),
        (("a", "b", *NETWORK, "--option", "class-label.shape=3"), "class-label"),
        (("a", "b", *NETWORK, "--halves", "1"), "--halves: 1 has no spread"),
        (("a", "b", *NETWORK, "-o", "nowhere/out.json"), "-o: nowhere/out.json: nowhere is no folder"),
        (("a", "none.npz", *NETWORK), "B: none.npz: No such file or directory; give one that exists"),
        (("a", "other.npz", *NETWORK), "B: other.npz cannot be read as statistics"),
    ],
)
def test_mistakes_are_one_line(
    arguments: tuple[str, ...], message: str, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.savez("other.npz", x=np.zeros(3))
    if not Path("few").exists():
        draw(Path("few"), 5, seed=2, mean=100)
    assert message in fails(capsys, "compare", *arguments, *QUIET)


def test_features_that_are_not_finite_are_refused(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    network = extraction.FeatureNetwork.__call__

    def broken(self: Any, pixels: Tensor) -> Tensor:
        found = network(self, pixels)
        found[min(7, len(found) - 1)] = float("nan")
        return found

    monkeypatch.setattr(extraction.FeatureNetwork, "__call__", broken)
    with pytest.raises(SystemExit) as stop:
        main(["compare", "a", "b", *NETWORK, *QUIET])
    assert stop.value.code == 1
    assert "the features of 007.png in A are not finite" in capsys.readouterr().err


def test_intervals_are_as_wide_as_the_measures_vary() -> None:
    """s over halves is near the standard deviation over sets that are drawn anew."""
    draws = torch.Generator().manual_seed(0)

    def sets() -> tuple[Tensor, Tensor]:
        return 0.85 * torch.randn(100, 4, generator=draws) + 0.25, torch.randn(100, 4, generator=draws)

    found = [estimates(*sets(), halves=10) for _ in range(20)]
    for name in ("fd", "kid", "precision", "recall", "density", "coverage"):
        true = torch.tensor([each[name].value for each in found]).std()
        widths = [(high - low) / (2 * 1.96) for each in found for low, high in [(each[name].low, each[name].high)]]
        told = torch.tensor(widths).mean()
        assert 0.5 < told / true < 2, (name, told, true)


def test_the_same_sets_have_the_same_intervals() -> None:
    a, b = torch.randn(2, 30, 4, generator=torch.Generator().manual_seed(0))
    before = torch.get_rng_state()
    assert estimates(a, b, halves=3) == estimates(a, b, halves=3)
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises(ValueError, match=f"a set of 11 pictures is too small: give at least {intervals.LEAST}"):
        estimates(a[:11], b, halves=3)
