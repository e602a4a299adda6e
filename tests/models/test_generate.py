import json
import shutil
import subprocess
import sys
from pathlib import Path

import dmdr_models
import numpy as np
import pytest
import torch
from dmdr_models import tiny
from dmdr_models.drawing.own_sampler import draw
from dmdr_models.drawing.prompts import list_prompts
from dmdr_models.generate import main
from PIL import Image
from same_picture import same_picture


def generate(*arguments) -> None:
    main([str(argument) for argument in arguments])


def pictures(path: Path, columns: int) -> np.ndarray:
    """[row, column, 32, 32, 3] of a grid with the default padding."""
    sheet = np.asarray(Image.open(path))
    rows = sheet.shape[0] // 34
    return np.array([[sheet[2 + 34 * r :, 2 + 34 * c :][:32, :32] for c in range(columns)] for r in range(rows)])


@pytest.fixture
def student(model, tmp_path) -> Path:
    """The model as dmdr-train exports it: two steps of "sde"."""
    folder = shutil.copytree(model, tmp_path / "student")
    content = {"family": "sit", "steps": 2, "method": "sde", "guidance": 1.0, "shift": 3.0, "recipe": "r.yaml"}
    (folder / "dmdr.json").write_text(json.dumps(content))
    return folder


@pytest.mark.bits
def test_as_a_program(model, tmp_path, python):
    """In a process of its own once; the other tests call `main` in this one."""
    command = ["-m", "dmdr_models.generate", "--family", "sit", "--model", str(model)]
    done = python(*command, "--classes", "1,2", "--per-class", "2", "-o", "grid.png", folder=tmp_path)
    assert (done.code, done.stdout) == (0, "grid.png\n"), done.stderr
    generate("--family", "sit", "--model", model, "--classes", "1,2", "--per-class", 2, "-o", tmp_path / "again.png")
    assert (tmp_path / "grid.png").read_bytes() == (tmp_path / "again.png").read_bytes()


def test_help_and_mistakes_answer_without_torch(tmp_path):
    code = """
import sys
import dmdr_models
from dmdr_models.generate import main
for arguments in (["--help"], ["--model", "x"], ["--model", "x", "--classes", "1", "-o", "a.gif", "--family", "sit"]):
    try:
        main(arguments)
    except SystemExit as end:
        print("code", end.code)
print(sorted({"torch", "diffusers", "numpy", "PIL"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert "--per-class" in done.stdout
    assert [line for line in done.stdout.splitlines() if line.startswith("code")] == ["code 0", "code 2", "code 2"]
    assert done.stdout.splitlines()[-1] == "[]"
    assert "-o a.gif ends in .gif: give a name that ends in .png" in done.stderr


def test_the_version(capsys):
    with pytest.raises(SystemExit) as end:
        generate("--version")
    assert end.value.code == 0
    assert capsys.readouterr().out == f"dmdr-generate {dmdr_models.__version__}\n"


def test_rows_are_classes(model, tmp_path):
    arguments = ["--family", "sit", "--model", model, "--classes", "3,1,7", "--per-class", "2", "--seed", 40]
    generate(*arguments, "-o", tmp_path / "a.png", "--separate", tmp_path / "each")
    got = pictures(tmp_path / "a.png", 2)
    assert got.shape == (3, 2, 32, 32, 3)
    names = [f"{index:05d}-{label}.png" for index, label in enumerate([3, 3, 1, 1, 7, 7])]
    assert sorted(file.name for file in (tmp_path / "each").iterdir()) == [*names, "prompts.jsonl"]
    rows = [json.loads(line) for line in (tmp_path / "each" / "prompts.jsonl").read_text().splitlines()]
    assert rows == [{"file_name": name, "label": int(name[6])} for name in names]
    for index, name in enumerate(names):
        assert same_picture(np.asarray(Image.open(tmp_path / "each" / name)), got[index // 2, index % 2])
    assert len({picture.tobytes() for picture in got.reshape(6, -1)}) == 6


@pytest.mark.parametrize("method", ["euler", "sde"])
def test_a_picture_depends_on_its_seed_and_class_alone(model, tmp_path, method):
    arguments = ["--family", "sit", "--model", model, "--steps", 3, "--method", method, "--guidance", 2]
    generate(*arguments, "--classes", "1,2", "--per-class", 3, "--seed", 5, "-o", tmp_path / "many.png")
    generate(*arguments, "--classes", "2", "--per-class", 1, "--seed", 5 + 4, "-o", tmp_path / "one.png")
    generate(*arguments, "--classes", "2", "--per-class", 1, "--seed", 5 + 3, "-o", tmp_path / "other.png")
    many = pictures(tmp_path / "many.png", 3)
    assert same_picture(many[1, 1], pictures(tmp_path / "one.png", 1)[0, 0])
    assert (many[1, 1] != pictures(tmp_path / "other.png", 1)[0, 0]).any()


@pytest.mark.bits
def test_a_picture_is_a_sample_decoded(family):
    from dmdr_models.drawing.sampling import sample

    network = family.load_network()
    got = draw(family, network, [4, 5], seed=7, steps=3, method="heun", guidance=1.5, shift=2.0)
    noise = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(8))
    expected = family.decode(sample(family, network, family.condition([5]), noise, 3, "heun", 1.5, 2.0))
    assert torch.equal(got[1:], expected)


def test_every_option_changes_the_picture(model, tmp_path):
    base = ["--family", "sit", "--model", model, "--classes", "1", "--per-class", 1, "--steps", 4]
    seen = set()
    for extra in ([], ["--steps", 2], ["--method", "heun"], ["--method", "sde"], ["--guidance", 9], ["--shift", 5],
                  ["--seed", 1], ["--dtype", "bf16"]):  # fmt: skip
        generate(*base, *extra, "-o", tmp_path / "a.png")
        seen.add((tmp_path / "a.png").read_bytes())
    assert len(seen) == 8


def test_a_student_brings_its_settings(student, model, tmp_path):
    def drawn(*arguments) -> np.ndarray:
        generate(*arguments, "--classes", "1", "--per-class", 1, "-o", tmp_path / "a.png")
        return np.asarray(Image.open(tmp_path / "a.png"))

    plain = ["--family", "sit", "--model", model]
    as_trained = drawn(*plain, "--steps", 2, "--method", "sde", "--shift", 3)
    assert same_picture(drawn("--model", student), as_trained)
    assert same_picture(drawn("--model", model, "--weights", student), as_trained)
    assert same_picture(drawn("--model", model, "--weights", student / "transformer"), as_trained)
    unshifted, bare = drawn(*plain, "--steps", 2, "--method", "sde"), drawn(*plain)
    assert same_picture(drawn("--model", student, "--shift", 1), unshifted)
    assert same_picture(drawn(*plain, "--weights", model), bare)
    assert not same_picture(unshifted, as_trained)
    assert not same_picture(bare, as_trained)


def test_the_weights_are_the_students(model, student, tmp_path):
    import dmdr_models

    network = dmdr_models.load("sit", model).load_network()
    network.proj_out.bias.data.add_(0.5)
    network.save_pretrained(student / "transformer")
    arguments = ["--classes", "1", "--model", model]
    generate(*arguments, "--weights", student, "-o", tmp_path / "student.png")
    generate(
        *arguments, "--family", "sit", "--steps", 2, "--method", "sde", "--shift", 3, "-o", tmp_path / "teacher.png"
    )
    generate("--classes", "1", "--model", student, "-o", tmp_path / "folder.png")
    student, folder, teacher = (np.asarray(Image.open(tmp_path / f"{n}.png")) for n in ("student", "folder", "teacher"))
    assert same_picture(student, folder)
    assert not same_picture(student, teacher)


@pytest.mark.bits
def test_heun_with_one_step_is_euler(model, tmp_path):
    for method in ("heun", "euler"):
        generate(
            "--family", "sit", "--model", model, "--classes", "1", "--method", method, "-o", tmp_path / f"{method}.png"
        )
    assert (tmp_path / "heun.png").read_bytes() == (tmp_path / "euler.png").read_bytes()


MISTAKES = {
    "label": (["--classes", "1,10"], "--classes 1,10: class label 10 is out of range; valid are 0 to 9"),
    "negative label": (["--classes=-1"], "class label -1 is out of range"),
    "no number": (["--classes", "1,dog"], "--classes '1,dog' is not a list of numbers: give labels such as 207,360"),
    "no folder": (["--model", "none"], "--model none: no model folder none"),
    "other model": (["--model", "swapped"], "--model swapped: swapped/transformer holds a AutoencoderKL, not a SiT"),
    "no weights": (["--weights", "none"], "--weights none: no folder none"),
    "other weights": (["--weights", "five"], "--weights five: five has num_classes 5, the model 10"),
    "no vae": (["--vae", "swapped"], "--vae swapped: swapped holds no config.json"),
    "family": (["--family", "sd9"], "unknown model family 'sd9'; did you mean sd3? Valid are sd3, sdxl, sit"),
    "steps": (["--steps", "0"], "--steps 0 is not a whole number of at least 1: give 1 or more"),
    "half steps": (["--steps", "1.5"], "argument --steps: invalid int value: '1.5'"),
    "per class": (["--per-class", "0"], "--per-class 0 is not a whole number of at least 1"),
    "method": (["--method", "ddim"], "--method ddim is unknown: give one of euler, heun, sde"),
    "guidance": (["--guidance", "nan"], "--guidance nan is not a finite number"),
    "shift": (["--shift", "0"], "--shift 0.0 is not a positive number: give 1 for no shift"),
    "seed": (["--seed", "-3"], "--seed -3 is not in [0, 2^63)"),
    "device": (["--device", "warp"], "--device warp is not available: give cpu"),
    "suffix": (["-o", "a.jpg"], "-o a.jpg ends in .jpg: give a name that ends in .png"),
    "no suffix": (["-o", "a"], "-o a ends in nothing"),
    "no place": (["-o", "none/a.png"], "-o none/a.png: none is no folder that can be written to: create it first"),
    "folder": (["-o", "five.png"], "-o five.png is a folder"),
    "separate": (["--separate", "file"], "--separate file is a file: give a folder"),
    "unknown": (["--stpes", "2"], "unrecognized arguments: --stpes"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_told_in_one_line(name, model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(model / "vae", "swapped/transformer")
    Path("file").touch()
    Path("five.png").mkdir()
    if name == "other weights":
        tiny.sit("five", num_classes=5)
    before = sorted(tmp_path.rglob("*"))
    extra, message = MISTAKES[name]
    with pytest.raises(SystemExit) as end:
        generate("--family", "sit", "--model", model, "--classes", "1", "-o", "grid.png", *extra)
    assert end.value.code == 2
    shown = capsys.readouterr().err
    assert message in shown
    assert shown.startswith("dmdr-generate: ")
    assert shown.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"family": "sit", "steps": 0}', "steps 0 in {path} is not a whole number of at least 1"),
        ('{"family": "sit", "steps": true}', "steps True in {path} is not a whole number"),
        ('{"family": "sit", "method": "dpm"}', "method dpm in {path} is unknown: give one of euler, heun, sde"),
        ('{"family": "sit", "shift": "3"}', "shift 3 in {path} is not a positive number"),
        ('{"family": "sit", "guidance": null}', "guidance None in {path} is not a finite number"),
        ('{"family": "sd9"}', "unknown model family 'sd9'; did you mean sd3? Valid"),
        ('{"family": "sd3"}', "--classes is not for sd3, the family of"),
        ("[]", "{path} is not a JSON object"),
        ("{", "{path} cannot be read"),
    ],
)
def test_a_broken_student_file(student, tmp_path, capsys, content, message):
    path = student / "dmdr.json"
    path.write_text(content)
    with pytest.raises(SystemExit):
        generate("--model", student, "--classes", "1", "-o", tmp_path / "grid.png")
    assert message.format(path=path) in capsys.readouterr().err
    assert not (tmp_path / "grid.png").exists()


def test_a_family_that_contradicts_the_student(student, tmp_path, capsys):
    with pytest.raises(SystemExit):
        generate("--model", student, "--family", "sd3", "--classes", "1", "-o", tmp_path / "grid.png")
    assert "--family sd3 contradicts" in capsys.readouterr().err


def test_the_list_keeps_what_others_wrote(tmp_path, capsys):
    listed = tmp_path / "prompts.jsonl"
    list_prompts({tmp_path / "a.png": {"prompt": "ein Füchslein"}, tmp_path / "b.png": {"prompt": "two"}})
    list_prompts({tmp_path / "b.png": {"prompt": "three"}, tmp_path / "c.png": {"prompt": "four"}})
    rows = [json.loads(line) for line in listed.read_text(encoding="utf-8").splitlines()]
    assert [(row["file_name"], row["prompt"]) for row in rows] == [
        ("a.png", "ein Füchslein"),
        ("b.png", "three"),
        ("c.png", "four"),
    ]
    listed.write_text('{"prompt": "for training"}\n')
    list_prompts({tmp_path / "b.png": {"prompt": "three"}})
    assert listed.read_text() == '{"prompt": "for training"}\n'
    assert "prompts.jsonl stays as it is: it has rows without file_name" in capsys.readouterr().err


def test_a_disk_that_fails(model, tmp_path, monkeypatch, capsys):
    def fails(*_):
        raise OSError("no space left")

    monkeypatch.setattr("dmdr_models.base.atomic_files.os.replace", fails)
    with pytest.raises(SystemExit) as end:
        generate("--family", "sit", "--model", model, "--classes", "1", "-o", tmp_path / "grid.png")
    assert end.value.code == 2
    assert "cannot be written: no space left" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
