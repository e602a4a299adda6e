"""The examples of the README and the manual run as they are written, on tiny weights."""

import json
import re
import runpy
import shlex
import shutil
import sys
from pathlib import Path

import numpy as np
import torch
from dmdr_models.folder.safetensors_header import read_metadata
from dmdr_models.folder.state_dicts import save_state_dict
from dmdr_models.generate import main
from dmdr_models.sit.transformer import SIZES
from PIL import Image
from safetensors.torch import load_file, save_file
from same_picture import same_picture

ROOT = Path(__file__).parents[2]


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", path.read_text(), flags=re.DOTALL)


def commands(path: Path) -> list[list[str]]:
    joined = "".join(blocks(path, "bash")).replace("\\\n", " ").replace("--device cuda", "")
    return [shlex.split(line) for line in joined.splitlines()]


def run(command: list[str], monkeypatch) -> None:
    if command[0] == "dmdr-generate":
        main(command[1:])
    else:
        assert command[0] == "python"
        monkeypatch.setattr(sys, "argv", command[1:])
        runpy.run_path(str(ROOT / command[1]), run_name="__main__")


def test_readme(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for block in blocks(ROOT / "packages/dmdr-models/README.md", "python"):
        exec(block, names)
    assert names["images"].shape == (2, 3, 32, 32)
    assert names["picture"].shape == names["cat"].shape == (1, 3, 32, 32)
    assert torch.equal(names["teacher"], names["fake"]), "a new LoRA has no effect yet"
    for command in commands(ROOT / "packages/dmdr-models/README.md"):
        run(command, monkeypatch)
    assert Path("grid.png").exists()
    assert Path("circle.png").exists()
    assert Path("cat.png").exists()


def test_manual(published, model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(SIZES, "tiny", {"width": 16, "depth": 1, "num_heads": 2})
    size = {"sample_size": 4, "channels": 4, "rows": 1001}
    torch.save(published.state(16, 1, 2, 2, **size, projectors=True), "last.pt")
    torch.save(published.state(16, 1, 2, 2, **size, outputs=8), "SiT-XL-2-256.pt")
    shutil.copytree(model / "vae", "sd-vae-ft-ema")
    manual = ROOT / "docs/sit.md"
    done = []
    for command in commands(manual):
        if "student" in command and not Path("student").exists():
            shutil.copytree("sit-xl/transformer", "student/transformer")
            settings = {"family": "sit", "steps": 1, "method": "sde", "guidance": 1.0, "shift": 1.0}
            Path("student/dmdr.json").write_text(json.dumps(settings))
        run(command, monkeypatch)
        done.append(command[0])
    assert done == ["python"] * 2 + ["dmdr-generate"] * 3
    assert all(Path(name).exists() for name in ("teacher.png", "student.png", "two-steps.png"))
    assert json.loads(Path("sit-xl-original/transformer/config.json").read_text())["num_classes"] == 1000
    for block in blocks(manual, "python"):
        exec(block, {})


def test_manual_of_sd3(sd3, sd3_model, adapter, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(sd3_model, "sd35-large")
    for folder in ("student", "sd35l-dmdr-4step-srpo-dfnclip-hpsv21-lora"):
        sd3.students.save_lora(adapter, Path(folder))
    settings = {"family": "sd3", "steps": 4, "method": "euler", "shift": 5.0, "size": 32, "max_tokens": 128}
    Path("student/dmdr.json").write_text(json.dumps(settings))
    Path("prompts.txt").write_text("a fox\na lighthouse\n")
    of_the_network = load_file("student/pytorch_lora_weights.safetensors")
    save_file(of_the_network | {"text_encoder.a.lora_A.weight": torch.zeros(1, 1)}, "style.safetensors", {"note": "x"})
    sd3.students.save(adapter.merged(), Path("student-full"))
    manual = ROOT / "docs/sd3.md"
    for command in commands(manual):
        run(["64" if word == "1024" else word for word in command], monkeypatch)
    made = ("teacher.png", "fox.png", "sheet.png", "published.png")
    assert all(Path(name).exists() for name in made)
    names: dict = {}
    for block in blocks(manual, "python"):
        exec(block, names)
    assert names["image"].size == (32, 32)
    assert names["images"].shape == (2, 3, 32, 32)
    assert load_file("network.safetensors").keys() == of_the_network.keys()
    assert read_metadata(Path("network.safetensors")) == {"note": "x"}
    assert Path("my-student/adapter_config.json").exists()
    names["pipe"].load_lora_weights("my-student", adapter_name="mine")


def test_manual_of_sdxl(sdxl, sdxl_model, taesd, tmp_path, monkeypatch):
    from dmdr_models.networks.lora import LoRANetwork

    monkeypatch.chdir(tmp_path)
    shutil.copytree(sdxl_model, "sdxl-base")
    shutil.copytree(taesd, "taesdxl")
    network = sdxl.load_network()
    save_state_dict(network, "unet_sdxl_base_1.0_1step_res1024_fp32.bin")
    sdxl.students.save(network, Path("student"))
    settings = {"family": "sdxl", "steps": 4, "method": "sde", "shift": 1.0, "size": 32, "max_tokens": None}
    Path("student/dmdr.json").write_text(json.dumps(settings))
    sdxl.students.save_lora(LoRANetwork(network, 2, 2, sdxl.lora_targets), Path("student-lora"))
    Path("prompts.txt").write_text("a fox\na lighthouse\n")
    manual = ROOT / "docs/sdxl.md"
    for command in commands(manual):
        run(["64" if word == "1024" else word for word in command], monkeypatch)
    assert all(Path(f"{name}.png").exists() for name in ("teacher", "cat", "fox", "sheet"))
    names: dict = {}
    for index, block in enumerate(blocks(manual, "python")):
        exec(block.replace("=1024", "=64"), names)
        if index == 0:
            assert same_picture(np.asarray(names["image"]), np.asarray(Image.open("cat.png")))
    assert names["images"].shape == (2, 3, 32, 32)
    assert {path.name for path in Path("my-student").iterdir()} == {
        "unet",
        "unet.safetensors",
        "unet_fp16.bin",
        "scheduler",
    }
