import subprocess
import sys
from pathlib import Path
from typing import Any

import dmdr_rewards
import numpy as np
import pytest
import torch
from dmdr_rewards.cli import main
from dmdr_rewards.networks import checkpoint_files
from dmdr_rewards.score.verify import probe_picture
from PIL import Image


def fails(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line and "Loading weights" not in line]
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    return lines[0]


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert all(
        word in printed for word in ("IMAGES", "--reward [COLUMN@]NAME", "list", "info NAME", "verify NAME CHECKPOINT")
    )


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"dmdr-score {dmdr_rewards.__version__}\n"


def test_list_has_a_line_per_reward(capsys: pytest.CaptureFixture[str]) -> None:
    main(["list"])
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split() == ["name", "prompt", "licence", "score"]
    assert [line.split()[0] for line in lines] == dmdr_rewards.available()
    for line, name in zip(lines, dmdr_rewards.available(), strict=True):
        info = dmdr_rewards.describe(name)
        assert all(cell in line for cell in (info.prompt, info.licence, info.description))


@pytest.mark.parametrize("name", dmdr_rewards.available())
def test_info_says_all_that_is_known(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    main(["info", name])
    lines = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()]
    printed = {name: value for name, *value in lines for value in value or [""]}
    info = dmdr_rewards.describe(name)
    assert printed["name"] == name
    for field in (
        "licence",
        "source",
        "checkpoint",
        "preprocess",
        "differentiable",
        "range",
        "prompt",
        *(["fetch"] if info.fetch else []),
    ):
        assert printed[field] == str(getattr(info, field))


def test_verify_counts_hashes_and_scores(vit_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["verify", "class-label", str(vit_folder), "--tensors"])
    *tensors, reward, count, parameters, digest, official, preprocess, probe = capsys.readouterr().out.splitlines()
    expected = checkpoint_files.load(vit_folder / "model.safetensors")
    assert tensors == [f"{name}  float32  {list(expected[name].shape)}" for name in sorted(expected)]
    assert reward.split() == ["reward", "class-label"]
    assert count.split() == ["tensors", f"{len(expected):,}"]
    assert parameters.split() == ["parameters", f"{sum(map(torch.numel, expected.values())):,}"]
    assert digest.split() == ["sha256", checkpoint_files.sha256(vit_folder)]
    assert official.split(maxsplit=1) == ["official", "not compared, the official hash is not known here"]
    loaded = dmdr_rewards.create("class-label", vit_folder)
    assert preprocess.split(maxsplit=1) == ["preprocess", loaded.info.preprocess]
    assert probe.split()[2] == f"{loaded.score([probe_picture()], [0]).item():.6g}"


def test_the_probe_picture_does_not_change() -> None:
    picture = probe_picture()
    assert (picture.shape, picture.dtype) == ((192, 256, 3), np.uint8)
    assert picture.sum(axis=(0, 1)).tolist() == [6266880, 6242560, 6348754]


def test_a_warning_is_a_line(vit_folder: Path, tmp_path: Path, python: Any) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).symlink_to(vit_folder / name)
    Image.new("RGB", (16, 16)).save(tmp_path / "black.png")
    command = ["-m", "dmdr_rewards.cli", "black.png", "--prompt=3", "--reward=class-label=."]
    done = python(*command, "-o", "scores.csv", "--workers=0", folder=tmp_path, launcher="python").check()
    [line] = [line for line in done.stderr.splitlines() if line.startswith("warning: ")]
    assert line.endswith("preprocessor_config.json is missing: pictures enter this classifier in [0, 1], as they are")


def test_verify_takes_options(vit_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "unexpected keyword argument 'margin'" in fails(
        capsys, "verify", "class-label", str(vit_folder), "--option", "margin=1"
    )


def test_verify_refuses_bad_files(vit_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "did you mean 'class-label'" in fails(capsys, "verify", "class-labl", str(vit_folder))
    assert f"CHECKPOINT: checkpoint {tmp_path / 'no'}: no such" in fails(
        capsys, "verify", "class-label", str(tmp_path / "no")
    )
    from safetensors.torch import save_file

    for file in vit_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = checkpoint_files.load(tmp_path / "model.safetensors")
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    bias = tensors.pop("classifier.bias")
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    assert "missing: classifier.bias" in fails(capsys, "verify", "class-label", str(tmp_path))
    save_file({**tensors, "classifier.bias": bias * float("nan")}, tmp_path / "model.safetensors", {"format": "pt"})
    assert "its score of a picture is nan" in fails(capsys, "verify", "class-label", str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"cut")
    assert "CHECKPOINT: checkpoint" in fails(capsys, "verify", "class-label", str(tmp_path))


def test_commands_check_what_was_typed(capsys: pytest.CaptureFixture[str]) -> None:
    assert "NAME: unknown reward 'hpsv2': did you mean" in fails(capsys, "info", "hpsv2")
    assert "required: CHECKPOINT; see dmdr-score verify --help" in fails(capsys, "verify", "hpsv2.1")
    assert "unrecognized arguments: x" in fails(capsys, "list", "x")
    assert "IMAGES" in fails(capsys)


@pytest.mark.parametrize(
    ("arguments", "heavy"),
    [
        (["--help"], {"torch", "numpy", "PIL"}),
        (["--version"], {"torch", "numpy", "PIL"}),
        (["list"], {"torch", "numpy", "PIL"}),
        (["info", "hpsv2.1"], {"torch", "numpy", "PIL"}),
        (["nowhere", "--reward", "class-label=x", "-o", "s.csv"], {"torch", "numpy", "transformers", "open_clip"}),
    ],
)
def test_the_program_answers_at_once(arguments: list[str], heavy: set[str]) -> None:
    program = (
        "import sys; from dmdr_rewards.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit: pass\n"
        f"loaded = {heavy} & set(sys.modules)\n"
        "assert not loaded, loaded"
    )
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
