"""dmdr-score, run as a user runs it, with a classifier and a third party's reward of texts."""

import csv
import json
import os
import re
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dmdr_rewards
import forking
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from dmdr_rewards.cli import main
from PIL import Image

PLUGIN = '''
import time

import numpy as np
import torch
from dmdr_rewards import RewardInfo
from dmdr_rewards.pictures.images import as_images


class Redness:
    """Mean red of pictures of one size, plus a hundredth per letter of the prompt."""

    info = RewardInfo(
        name="redness", description="mean red", range=(0.0, 9.0), licence="MIT", source="here", prompt="text",
        differentiable=True, image_size=None, preprocess="none",
    )

    def __init__(self, checkpoint=None, device="cpu", dtype=torch.float32, gain=1.0, pause=0.0):
        self.gain, self.pause = gain, pause

    def score(self, images, prompts):
        time.sleep(self.pause)
        red = as_images(images, torch.device("cpu"), torch.float32)[:, 0].mean(dim=(1, 2))
        if "refuse" in prompts:
            raise ValueError("this prompt is not for me")
        lengths = torch.tensor([len(prompt) if prompt != "nan" else float("nan") for prompt in prompts])
        return self.gain * red + lengths / 100
'''


@pytest.fixture(scope="session")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an installed package that offers the reward `redness`."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "redness.py").write_text(PLUGIN)
    info = folder / "redness-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: redness\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[dmdr_rewards]\nredness = redness:Redness\n")
    return folder


@pytest.fixture
def home(shop: Path, vit_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where the command runs: pictures/ of several sizes, prompts.jsonl, and classifier/."""
    monkeypatch.syspath_prepend(shop)
    monkeypatch.chdir(tmp_path)
    Path("classifier").symlink_to(vit_folder)
    Path("pictures").mkdir()
    rows = []
    for number in range(11):
        size = (12 + number % 3, 20, 3)
        pixels = np.random.default_rng(number).integers(0, 256, size).astype(np.uint8)
        Image.fromarray(pixels).save(f"pictures/{number:02}.png")
        rows.append({"file_name": f"{number:02}.png", "prompt": f"prompt {'x' * number}", "label": number % 7})
    Path("prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    yield tmp_path
    sys.modules.pop("redness", None)


CLASSES = ("--reward", "class-label=classifier")
BOTH = (*CLASSES, "--reward", "redness:-0.5")
QUICK = ("--prompts", "prompts.jsonl", "--workers", "0", "--batch-size", "4", "--device", "cpu")


def run(*arguments: str, images: str = "pictures", output: str = "s.jsonl") -> list[dict[str, Any]]:
    main([images, *QUICK, "-o", output, *arguments])
    return read(output)


def read(output: str) -> list[dict[str, Any]]:
    if output.endswith(".parquet"):
        return pq.read_table(output).to_pylist()
    with open(output, encoding="utf-8") as file:
        return list(csv.DictReader(file)) if output.endswith(".csv") else [json.loads(line) for line in file]


def fails(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 2, **where: Any) -> str:
    """The one line on stderr of a command that ends in exit code `code`."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run(*arguments, **where)
    assert stop.value.code == code
    lines = [line for line in capsys.readouterr().err.splitlines() if line and "Loading weights" not in line]
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    return lines[0]


def test_rows_hold_what_the_rewards_say(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = run(*BOTH, output="s.parquet")
    files = sorted(Path("pictures").iterdir())
    classifier = dmdr_rewards.create("class-label", "classifier")
    redness = dmdr_rewards.create("redness")
    assert [row["file_name"] for row in rows] == [file.name for file in files]
    for number, (row, file) in enumerate(zip(rows, files, strict=True)):
        assert (row["prompt"], row["label"], row["error"]) == (f"prompt {'x' * number}", number % 7, None)
        assert row["class-label"] == pytest.approx(classifier.score([file], [number % 7]).item(), abs=1e-5)
        assert row["redness"] == pytest.approx(redness.score([file], [row["prompt"]]).item(), abs=1e-6)
        assert row["total"] == row["class-label"] - 0.5 * row["redness"]
        assert row["class-label.sha256"] == dmdr_rewards.networks.checkpoint_files.sha256("classifier")
        assert row["class-label.preprocess"] == classifier.info.preprocess
        assert row["redness.sha256"] is None
        assert (row["redness.preprocess"], row["dtype"]) == ("none", "float32")
    assert os.listdir() == [name for name in os.listdir() if "partial" not in name]

    printed = capsys.readouterr().out
    scores = np.array([row["class-label"] for row in rows])
    [line] = [line for line in printed.splitlines() if "class-label" in line]
    shown = [cell.strip() for cell in line.strip("│ ").split("│")]
    numbers = (scores.mean(), scores.std(), scores.min(), scores.max())
    assert shown == ["class-label", "1", "11", *(f"{number:.5g}" for number in numbers)]
    assert "11 pictures, 0 with an error; 11 scored now" in printed


@pytest.mark.parametrize("output", ["s.jsonl", "s.csv"])
def test_the_other_formats_hold_the_same(output: str, home: Path) -> None:
    expected = run(*BOTH, output="s.parquet")
    rows = run(*BOTH, output=output)
    if output == "s.csv":
        expected = [{name: "" if value is None else str(value) for name, value in row.items()} for row in expected]
    assert rows == expected


def test_batches_and_workers_change_no_more_than_rounding(home: Path) -> None:
    one = run(*BOTH, "--batch-size", "1")
    many = run(*BOTH, "--batch-size", "11", "--workers", "2", output="m.jsonl")
    for left, right in zip(one, many, strict=True):
        assert left["total"] == pytest.approx(right["total"], abs=1e-5)


def test_what_cannot_be_scored_has_an_error_in_its_row(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("pictures/03.png").write_bytes(b"no picture")
    table = Path("prompts.jsonl").read_text().replace('"prompt xx"', '"nan"').replace('"prompt xxxxx"', '"refuse"')
    Path("prompts.jsonl").write_text(table)
    rows = run(*BOTH)
    errors = {row["file_name"]: row["error"] for row in rows if row["error"]}
    assert errors.keys() == {"02.png", "03.png", "05.png"}
    assert errors["02.png"] == "redness: nan"
    assert errors["03.png"].startswith("cannot be read: ")
    assert errors["05.png"] == "redness: this prompt is not for me"
    assert rows[2]["redness"] is rows[2]["total"] is rows[3]["class-label"] is rows[5]["redness"] is None
    assert rows[2]["class-label"] < 0
    printed = capsys.readouterr().out
    assert "11 pictures, 3 with an error" in printed
    assert "  02.png: redness: nan" in printed

    # Repaired, they are scored by the same command, and nothing else is.
    Image.new("RGB", (12, 20)).save("pictures/03.png")
    again = run(*BOTH)
    assert "11 pictures, 2 with an error; 3 scored now" in capsys.readouterr().out
    assert again[3]["error"] is None
    asked = (2, 3, 5)
    assert [row for i, row in enumerate(again) if i not in asked] == [r for i, r in enumerate(rows) if i not in asked]
    for i in (2, 5):  # in another batch, which may round otherwise
        assert again[i] == pytest.approx(rows[i])


def test_a_prompt_that_was_cut_has_a_note_in_its_row(
    home: Path, clip_file: Path, clip_json: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = Path("prompts.jsonl").read_text().replace('"prompt xx"', f'"{"word " * 30}"')
    Path("prompts.jsonl").write_text(table)
    Path("pictures/01.png").write_bytes(b"no picture")
    rows = run("--reward", f"clip={clip_file}", "--option", f"clip.model={clip_json}", *CLASSES)
    notes = {row["file_name"]: row["note"] for row in rows if row["note"]}
    assert notes == {"02.png": "clip reads 12 of the prompt's 32 tokens"}
    assert "with a note, in the column note; first: 02.png: clip reads 12" in capsys.readouterr().out


def test_checkpoints_of_one_reward_stand_side_by_side(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from safetensors.torch import load_file, save_file

    shutil.copytree("classifier", "other")
    tensors = load_file("other/model.safetensors")
    save_file({**tensors, "classifier.bias": tensors["classifier.bias"] + torch.arange(7.0)}, "other/model.safetensors",
              {"format": "pt"})  # fmt: skip
    both = ("--reward", "before@class-label=classifier", "--reward", "after@class-label=other:2")
    rows = run(*both)
    alone = [[row["class-label"] for row in run("--reward", f"class-label={name}", output=f"{name}.jsonl")]
             for name in ("classifier", "other")]  # fmt: skip
    assert [[row[name] for row in rows] for name in ("before", "after")] == alone
    assert alone[0] != alone[1]
    assert [row["total"] for row in rows] == [row["before"] + 2 * row["after"] for row in rows]
    assert rows[0]["before.reward"] == rows[0]["after.reward"] == "class-label"
    assert rows[0]["before.sha256"] != rows[0]["after.sha256"]
    capsys.readouterr()
    run(*both)
    assert "0 scored now" in capsys.readouterr().out
    assert "unknown reward 'class'" in fails(capsys, "--reward", "x@class=classifier")


def test_strict_stops_at_an_error_and_keeps_the_scores(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("pictures/06.png").write_bytes(b"no picture")
    line = fails(capsys, *CLASSES, "--strict", code=1)
    assert line.startswith("error: --strict: picture 06.png: cannot be read")
    assert not Path("s.jsonl").exists()
    Image.new("RGB", (12, 20)).save("pictures/06.png")
    capsys.readouterr()
    run(*CLASSES, "--strict")
    assert "11 pictures, 0 with an error; 7 scored now" in capsys.readouterr().out


def test_strict_also_minds_the_errors_of_an_interrupted_run(
    home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    Path("pictures/06.png").write_bytes(b"no picture")
    with monkeypatch.context() as patch:
        patch.setattr("dmdr_rewards.score.output.ScoreTable.finish", interrupt)
        with pytest.raises(SystemExit) as stop:
            run(*CLASSES)
    assert stop.value.code == 130
    assert "interrupted; the same command continues from here" in capsys.readouterr().err
    assert "--strict: picture 06.png" in fails(capsys, *CLASSES, "--strict", code=1)
    run(*CLASSES)
    assert "11 pictures, 1 with an error; 0 scored now" in capsys.readouterr().out


def test_nothing_but_errors_is_a_failure(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for file in Path("pictures").iterdir():
        file.write_bytes(b"no picture")
    assert "not one of 11 pictures could be scored; first: cannot be read" in fails(capsys, *CLASSES, code=1)
    assert len(read("s.jsonl")) == 11


def test_a_second_run_adds_new_pictures_only(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = run(*CLASSES)
    before = Path("s.jsonl").read_bytes()
    capsys.readouterr()
    run(*CLASSES)
    assert "11 pictures, 0 with an error; 0 scored now" in capsys.readouterr().out
    assert Path("s.jsonl").read_bytes() == before

    weighed = run("--reward", "class-label=classifier:2")
    assert [row["total"] for row in weighed] == [2 * row["total"] for row in rows]

    Image.new("RGB", (9, 9)).save("pictures/005.png")
    with Path("prompts.jsonl").open("a") as file:
        file.write('{"file_name": "005.png", "label": 1}\n')
    more = run(*CLASSES)
    assert "12 pictures, 0 with an error; 1 scored now" in capsys.readouterr().out
    assert [row["file_name"] for row in more][:2] == ["00.png", "005.png"]
    assert [row for row in more if row["file_name"] != "005.png"] == rows


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--reward", "redness"], "has the columns .*class-label.*; this run has .*redness"),
        ([*CLASSES, "--dtype", "bfloat16"], "was made with dtype float32; this run has bfloat16"),
        ([*CLASSES, "--prompt", "3"], "scores 00.png under label 0, which is not among"),
        (["--reward", "class-label=other"], "was made with class-label.sha256 [0-9a-f]{64}; this run has [0-9a-f]{64}"),
        ([*CLASSES, "--preprocess", "dmdr"], "has the columns"),
    ],
)
def test_an_output_of_another_run_is_refused(
    arguments: list[str], message: str, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree("classifier", "other")
    config = Path("other/model.safetensors").read_bytes()
    Path("other/model.safetensors").write_bytes(config[:-1] + bytes([config[-1] ^ 1]))
    run(*CLASSES)
    before = Path("s.jsonl").read_bytes()
    command = ["pictures", *(QUICK[2:] if "--prompt" in arguments else QUICK), "-o", "s.jsonl", *arguments]
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(command)
    assert stop.value.code == 2
    line = capsys.readouterr().err
    assert re.fullmatch(rf"error: --output: s\.jsonl {message}.*; give another -o, or --overwrite.*\n", line)
    assert Path("s.jsonl").read_bytes() == before


def test_overwrite_scores_anew(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(*CLASSES)
    capsys.readouterr()
    rows = run("--reward", "redness", "--overwrite")
    assert "11 scored now" in capsys.readouterr().out
    assert rows[0]["redness"] == rows[0]["total"]


@pytest.mark.bits
@pytest.mark.usefixtures("python")
def test_a_killed_run_goes_on_to_the_same_bytes(home: Path, shop: Path) -> None:
    slow = ("--reward", "class-label=classifier", "--reward", "redness", "--option", "redness.pause=0.15")
    command = ["-m", "dmdr_rewards.cli", "pictures", *QUICK, "--batch-size", "1", *slow, "-o"]
    journal, log = Path("killed.parquet.partial.jsonl"), home / "log"
    process = forking.start([*command, "killed.parquet"], home, {**os.environ, "PYTHONPATH": str(shop)}, log, log)
    deadline = time.monotonic() + 120
    while not (journal.exists() and journal.read_bytes().count(b"\n") >= 3):
        assert process.is_alive(), log.read_text()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    assert forking.wait([process]) == [-signal.SIGKILL]
    kept = journal.read_bytes().count(b"\n")
    assert 3 <= kept < 11
    assert not Path("killed.parquet").exists()
    with journal.open("ab") as file:
        file.write(b'[{"file_name": "torn')

    main([*command[2:], "killed.parquet"])
    main([*command[2:], "whole.parquet"])
    assert Path("killed.parquet").read_bytes() == Path("whole.parquet").read_bytes()
    assert not journal.exists()


def test_other_sources_and_prompts(home: Path) -> None:
    labels = [row["class-label"] for row in run(*CLASSES, "--overwrite")]
    quick = QUICK[2:]
    Path("pictures/table.csv").write_text("image,label\n02.png,2\n00.png,0\n")
    main(["pictures/table.csv", *quick, *CLASSES, "-o", "t.jsonl"])
    assert [row["class-label"] for row in read("t.jsonl")] == pytest.approx([labels[2], labels[0]], abs=1e-5)
    main(["pictures/0[12].png", "--prompt", "2", *quick, *CLASSES, "-o", "g.jsonl"])
    rows = read("g.jsonl")
    assert [row["file_name"] for row in rows] == ["01.png", "02.png"]
    assert rows[1]["class-label"] == pytest.approx(labels[2], abs=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--reward", "class_label=x"], "--reward: unknown reward 'class_label': did you mean 'class-label'"),
        (["--reward", "class-label=nowhere"], "--reward class-label: checkpoint nowhere: no such folder"),
        (["--reward", "class-label"], "--reward class-label: .*missing a required argument: 'checkpoint'"),
        (["--reward", "=x"], "--reward: '=x' is not NAME=CHECKPOINT"),
        (
            [*CLASSES, *CLASSES],
            "--reward: class-label is given twice, .*: name each, as in old@class-label=",
        ),
        ([*CLASSES, "--option", "redness.gain=2"], "--option: redness is not among the rewards asked for: class-label"),
        ([*CLASSES, "--option", "gain=2"], "--option: 'gain=2' is not NAME.KEY=VALUE"),
        (
            [*CLASSES, "--option", "class-label.margin=1"],
            "--reward class-label: .*unexpected keyword argument 'margin'",
        ),
        ([*CLASSES, "-o", "s.xlsx"], "--output: s.xlsx must end in"),
        ([*CLASSES, "--html", "no/p.html"], "--html: no: no such folder"),
        ([*CLASSES, "--device", "warp"], "--device: warp cannot be used: .*; give cpu or auto"),
        ([*CLASSES, "--batch-size", "0"], "argument --batch-size: '0' is not a whole number of at least 1"),
        ([*CLASSES, "--dtype", "int8"], "argument --dtype: invalid choice: 'int8'"),
        ([*CLASSES, "--prompt", "3"], "argument --prompt: not allowed with argument --prompts"),
        ([], "the following arguments are required: --reward"),
    ],
)
def test_a_mistake_gets_one_line(
    arguments: list[str], message: str, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = fails(capsys, *arguments)
    assert re.match(f"error: {message}", line), line
    assert not list(Path().glob("s.*"))


def test_missing_prompts_and_labels_out_of_range(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("RGB", (9, 9)).save("pictures/new.png")
    assert "--prompts: picture new.png has no class label, which class-label needs" in fails(capsys, *CLASSES)
    assert "--prompts: picture new.png has no prompt, which redness needs" in fails(capsys, "--reward", "redness")
    with Path("prompts.jsonl").open("a") as file:
        file.write('{"file_name": "new.png", "label": 7}\n')
    assert "--prompts: picture new.png has label 7; class-label knows 0 to 6" in fails(capsys, *CLASSES)


def test_the_commands_of_the_manual_run(home: Path) -> None:
    manual = Path(__file__).parents[2] / "docs" / "scoring.md"
    commands = "".join(re.findall(r"```\n(.*?)```", manual.read_text(encoding="utf-8"), re.DOTALL)).splitlines()
    assert len(commands) >= 6
    for command in commands:
        program, *arguments = shlex.split(command)
        assert program == "dmdr-score"
        main(arguments)
    assert len(read("scores.parquet")) == len(read("third.csv")) == 11
    assert "<svg" in Path("scores.html").read_text(encoding="utf-8")
