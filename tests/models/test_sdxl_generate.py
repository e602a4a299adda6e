import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import dmdr_models
import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderTiny,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    LCMScheduler,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from dmdr_core import TimestepGrid
from dmdr_models import tiny
from dmdr_models.drawing.sampling import sample
from dmdr_models.folder.state_dicts import save_state_dict
from dmdr_models.generate import main
from dmdr_models.networks.lora import LoRANetwork
from dmdr_models.sdxl.student_scheduler import student_scheduler
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file, save_file
from same_picture import same_picture


class Attack:
    def __reduce__(self):
        return Path.touch, (Path("attacked"),)


@pytest.fixture(scope="module")
def published(sdxl_model, tmp_path_factory) -> Path:
    """A folder with state dicts in the layout of the public one-step checkpoint: a UNet's plain keys, in float32."""
    folder = tmp_path_factory.mktemp("published")
    state = UNet2DConditionModel.from_pretrained(tiny.sdxl(folder / "other", seed=5), subfolder="unet").state_dict()
    shutil.rmtree(folder / "other")
    torch.save(state, folder / "unet_fp32.bin")
    save_file(state, folder / "unet.safetensors")
    return folder


def generate(*arguments) -> None:
    main([str(argument) for argument in arguments])


def pixels(path) -> np.ndarray:
    return np.asarray(Image.open(path))


def opened(model, file=None, dtype=torch.float32) -> StableDiffusionXLPipeline:
    """The model with a student's state dict in it, by diffusers alone."""
    parts = {}
    if file is not None:
        unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(model, subfolder="unet"))
        unet.load_state_dict(load_file(file) if file.suffix == ".safetensors" else torch.load(file, weights_only=True))
        parts["unet"] = unet.to(dtype)
    pipe = DiffusionPipeline.from_pretrained(model, torch_dtype=dtype, **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def lcm(model, file=None, prompt="a red circle", seed=0, dtype=torch.float32, vae=None, adapter=None, **call):
    """What the published model's own usage draws."""
    pipe = opened(model, file, dtype)
    if vae is not None:
        pipe.vae = AutoencoderTiny.from_pretrained(vae, torch_dtype=dtype)
    if adapter is not None:
        pipe.unet = PeftModel.from_pretrained(pipe.unet, adapter)
    pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)
    call = {"num_inference_steps": 1, "timesteps": [399], "guidance_scale": 0, **call}
    return np.asarray(pipe(prompt, generator=torch.Generator().manual_seed(seed), **call).images[0])


@pytest.mark.parametrize("name", ["unet_fp32.bin", "unet.safetensors"])
def test_the_command_of_the_manual(sdxl_model, published, tmp_path, name):
    expected = lcm(sdxl_model, published / name, height=64, width=64)
    assert (expected != lcm(sdxl_model, height=64, width=64)).mean() > 0.5, "the student matters"
    arguments = ["--family", "sdxl", "--model", sdxl_model, "--unet", published / name, "a red circle"]
    generate(*arguments, "-o", tmp_path / "out.png", "--steps", 1, "--size", 64, "--seed", 0)
    assert same_picture(pixels(tmp_path / "out.png"), expected)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["out.png", "prompts.jsonl"]


def test_options_are_the_pipelines(sdxl_model, published, taesd, tmp_path):
    file, out = published / "unet_fp32.bin", tmp_path / "out.png"
    cases = [
        (["--dtype", "bf16"], {"dtype": torch.bfloat16}),
        (["--dtype", "fp16"], {"dtype": torch.float16}),
        (["--seed", "7"], {"seed": 7}),
        (["--vae", taesd], {"vae": taesd}),
        (["--vae", taesd, "--dtype", "fp16"], {"vae": taesd, "dtype": torch.float16}),
        (["--steps", 4], {"num_inference_steps": 4, "timesteps": TimestepGrid(4).times[:-1].tolist()}),
        (["--steps", 3, "--times", "stock"], {"num_inference_steps": 3, "timesteps": None}),
        (["--guidance", "4.5"], {"guidance_scale": 4.5}),
    ]
    for options, settings in cases:
        generate("--model", sdxl_model, "--weights", file, "a red circle", *options, "-o", out)
        half = "dtype" in settings
        assert same_picture(pixels(out), lcm(sdxl_model, file, **settings), half), options


@pytest.mark.parametrize("times", ["trained", "stock"])
def test_the_teacher(sdxl_model, tmp_path, times):
    """The deterministic sampler, with guidance: the model's own scheduler."""
    arguments = ["--model", sdxl_model, "a red circle", "--method", "euler", "--guidance", 3]
    generate(*arguments, "--steps", 5, "--times", times, "-o", tmp_path / "out.png")
    pipe = opened(sdxl_model)
    assert isinstance(pipe.scheduler, EulerDiscreteScheduler)
    visited = {"num_inference_steps": 5} if times == "stock" else {"timesteps": TimestepGrid(5).times[:-1].tolist()}
    call = {"guidance_scale": 3.0, "generator": torch.Generator().manual_seed(0), **visited}
    assert same_picture(pixels(tmp_path / "out.png"), np.asarray(pipe("a red circle", **call).images[0]))


def test_a_model_with_another_scheduler(sdxl_model, published, tmp_path):
    """Whatever its scheduler does, a student is sampled as it was trained."""
    model = shutil.copytree(sdxl_model, tmp_path / "model")
    scheduler = EulerDiscreteScheduler.from_pretrained(model, subfolder="scheduler")
    EulerDiscreteScheduler.from_config(
        scheduler.config, timestep_spacing="trailing", use_karras_sigmas=True
    ).save_pretrained(model / "scheduler")
    family = dmdr_models.load("sdxl", model)
    file, noise = published / "unet.safetensors", torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    arguments = ["--model", model, "--unet", file, "a red circle", "--method", "euler", "--steps", 3]
    generate(*arguments, "-o", tmp_path / "out.png")
    latents = sample(family, family.load_network(file), family.condition(["a red circle"]), noise, 3)
    expected = family.decode(latents)[0].permute(1, 2, 0).numpy() * 255
    assert np.abs(pixels(tmp_path / "out.png") - expected).max() < 1.5
    own = student_scheduler(family.scheduler_config, stochastic=False)
    own.set_timesteps(timesteps=family.grid(3).times[:-1].tolist())
    first = own.scale_model_input(noise * own.init_noise_sigma, own.timesteps[0])
    torch.testing.assert_close(first, noise, msg="the network sees the noise itself")
    generate(*arguments, "--times", "stock", "-o", tmp_path / "stock.png")
    assert (pixels(tmp_path / "out.png") != pixels(tmp_path / "stock.png")).mean() > 0.5


def test_what_we_export(sdxl, sdxl_model, tmp_path):
    lora = LoRANetwork(sdxl.load_network(), 4, 6, sdxl.lora_targets, torch.Generator().manual_seed(5))
    for layer in lora.layers:
        torch.nn.init.normal_(layer.lora_B["lora"].weight, std=0.1)
    student = tmp_path / "student"
    sdxl.students.save_lora(lora, student)
    out = tmp_path / "out.png"
    generate("--model", sdxl_model, "--adapter", student, "a blue square", "-o", out)
    expected = lcm(sdxl_model, adapter=student, prompt="a blue square")
    assert same_picture(pixels(out), expected)
    merged = lora.merged()
    sdxl.students.save(merged, tmp_path / "full")
    save_state_dict(merged, tmp_path / "full/unet.safetensors")
    save_state_dict(merged, tmp_path / "full/unet_fp32.bin")
    for place in ("full", "full/unet", "full/unet.safetensors", "full/unet_fp32.bin"):
        generate("--model", sdxl_model, "--unet", tmp_path / place, "a blue square", "-o", out)
        assert same_picture(pixels(out), expected), place


def test_a_student_brings_its_settings(sdxl_model, published, tmp_path):
    def drawn(student, *options) -> np.ndarray:
        generate("--model", sdxl_model, "--unet", student, "a", *options, "-o", tmp_path / "a.png")
        return pixels(tmp_path / "a.png")

    student = shutil.copytree(published, tmp_path / "student")
    asked = drawn(published / "unet_fp32.bin", "--steps", 3, "--method", "euler", "--size", "32x48")
    settings = {"steps": 3, "method": "euler", "guidance": 1.0, "shift": 1.0, "size": [32, 48], "max_tokens": None}
    (student / "dmdr.json").write_text(json.dumps({"family": "sdxl", **settings}))
    assert same_picture(drawn(student / "unet.safetensors"), asked)
    plain = drawn(published / "unet_fp32.bin")
    assert same_picture(drawn(student / "unet.safetensors", "--steps", 1, "--method", "sde", "--size", 32), plain)
    # Without the file, a scheduler tells what it can.
    (student / "dmdr.json").unlink()
    EulerDiscreteScheduler().save_pretrained(student / "scheduler")
    assert same_picture(drawn(student / "unet.safetensors", "--steps", 3, "--size", "32x48"), asked)
    assert asked.shape == (32, 48, 3)
    LCMScheduler().save_pretrained(student / "scheduler")
    assert same_picture(drawn(student / "unet.safetensors"), plain)


def test_several_prompts(sdxl_model, published, tmp_path):
    prompts = ["a red circle", "a blue square", "ein grünes Dreieck"]
    arguments = ["--model", sdxl_model, "--unet", published / "unet.safetensors", "--seed", 4, "--steps", 2]
    (tmp_path / "list.txt").write_text("\n".join(prompts), encoding="utf-8")
    generate(*arguments, "--prompts", tmp_path / "list.txt", "--grid", "-o", tmp_path / "sheet.png")
    generate(*arguments, *prompts, "-o", tmp_path / "out.png")
    sheet = pixels(tmp_path / "sheet.png")
    assert sheet.shape == (math.ceil(math.sqrt(3)) * 34 + 2,) * 2 + (3,)
    for index in range(3):
        row, column = divmod(index, 2)
        alone = pixels(tmp_path / f"out-{index:05d}.png")
        assert same_picture(sheet[2 + 34 * row :, 2 + 34 * column :][:32, :32], alone)
    times = TimestepGrid(2).times[:-1].tolist()
    expected = lcm(sdxl_model, published / "unet.safetensors", prompts[2], seed=6, timesteps=times)
    assert same_picture(alone, expected)


MISTAKES = {
    "no prompt": ([], "prompts are not given, or given twice: give texts, or else --prompts FILE"),
    "no folder": (["a", "--model", "none"], "--model none: no model folder none"),
    "half": (["a", "--model", "half"], "--model half: half holds no text_encoder_2/config.json"),
    "v": (["a", "--model", "v"], "--model v: scheduler/scheduler_config.json has the prediction_type v_prediction"),
    "other family": (["a", "--family", "sd3"], "holds no transformer/config.json"),
    "shift": (["a", "--shift", "3"], "--shift is not for sdxl, the family of"),
    "tokens": (["a", "--max-tokens", "9"], "--max-tokens is not for sdxl"),
    "classes": (["a", "--classes", "1"], "--classes is not for sdxl"),
    "method": (["a", "--method", "heun"], "--method heun is unknown: give one of euler, sde"),
    "no steps": (["a", "--steps", "0"], "--steps 0 is not a whole number of at least 1"),
    "steps": (["a", "--steps", "51", "--method", "sde"], "--steps 51 is more than sde takes: give at most 50"),
    "more steps": (["a", "--steps", "501", "--method", "euler"], "--steps 501 is more than euler takes: give at most"),
    "size": (["a", "--size", "36"], "--size 36: resolution 36 is not a multiple of 8 (VAE times patch): give 32"),
    "no size": (["a", "--size", "0"], "--size 0 is not a whole number of at least 1"),
    "dtype": (["a", "--dtype", "fp8"], "invalid choice: 'fp8'"),
    "no unet": (["a", "--unet", "none.bin"], "--weights none.bin: no model folder none.bin, nor such a file"),
    "kind": (["a", "--unet", "unet.ckpt"], "--weights unet.ckpt: unet.ckpt is no state dict: give a file that ends in"),
    "attack": (
        ["a", "--unet", "attack.bin"],
        "--weights attack.bin: attack.bin is damaged, or holds more than tensors",
    ),
    "damaged": (["a", "--unet", "damaged.safetensors"], "damaged.safetensors is no safetensors file"),
    "cut": (["a", "--unet", "cut.bin"], "--weights cut.bin: cut.bin cannot be read, it may be damaged"),
    "lacks": (["a", "--unet", "lacks.bin"], "--weights lacks.bin: lacks.bin lacks conv_out.bias"),
    "unknown": (["a", "--unet", "unknown.safetensors"], "unknown.safetensors holds the unknown extra"),
    "shape": (["a", "--unet", "wide.bin"], "wide.bin holds conv_in.weight (32, 4, 3, 3), the network (16, 4, 3, 3)"),
    "vae": (["a", "--unet", "half/vae"], "--weights half/vae: half/vae holds a AutoencoderKL, not a UNet2DCondition"),
    "no vae": (["a", "--vae", "none"], "--vae none: no model folder none"),
    "not a vae": (["a", "--vae", "half/unet"], "holds a UNet2DConditionModel, not a AutoencoderKL or AutoencoderTiny"),
}
LATE = {"attack", "cut", "lacks", "shape"}


@pytest.fixture(scope="module")
def workshop(sdxl_model, published, tmp_path_factory) -> Path:
    """A folder with what users get wrong."""
    folder = tmp_path_factory.mktemp("workshop")
    for name in ("half", "v"):
        shutil.copytree(sdxl_model, folder / name)
    shutil.rmtree(folder / "half/text_encoder_2")
    config = folder / "v/scheduler/scheduler_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"prediction_type": "v_prediction"}))
    state = torch.load(published / "unet_fp32.bin", weights_only=True)
    torch.save({"conv_in.weight": Attack()}, folder / "attack.bin")
    torch.save({name: tensor for name, tensor in state.items() if name != "conv_out.bias"}, folder / "lacks.bin")
    save_file({**state, "extra.weight": torch.zeros(2, 2)}, folder / "unknown.safetensors")
    wide = UNet2DConditionModel.from_pretrained(tiny.sdxl(folder / "model", width=32), subfolder="unet").state_dict()
    torch.save(wide, folder / "wide.bin")
    shutil.rmtree(folder / "model")
    (folder / "cut.bin").write_bytes((published / "unet_fp32.bin").read_bytes()[:5000])
    for name in ("unet.ckpt", "damaged.safetensors"):
        (folder / name).write_bytes(b"\xff" * 40)
    return folder


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_told_in_one_line(name, sdxl_model, workshop, monkeypatch, capsys):
    monkeypatch.chdir(workshop)
    before = sorted(workshop.rglob("*"))
    extra, message = MISTAKES[name]
    monkeypatch.setattr("diffusers.StableDiffusionXLPipeline.from_pretrained", None)
    if name not in LATE:
        monkeypatch.setattr("torch.load", None)
    with pytest.raises(SystemExit) as end:
        generate("--family", "sdxl", "--model", sdxl_model, "-o", "out.png", *extra)
    assert end.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("dmdr-generate: ")]
    assert len(lines) == 1
    assert message in lines[0]
    assert sorted(workshop.rglob("*")) == before


def test_help_imports_no_torch():
    code = "import sys; from dmdr_models.generate import _parser; _parser(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
