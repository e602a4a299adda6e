import json
import math
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
from dmdr_models import tiny
from dmdr_models.generate import main
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from same_picture import same_picture

SIGMAS = torch.linspace(1, 0.001, 5)[:-1].tolist()


@pytest.fixture(scope="module")
def published(sd3_model, tmp_path_factory) -> Path:
    """A LoRA in the layout of the public checkpoints, written by PEFT alone."""
    folder = tmp_path_factory.mktemp("published") / "lora"
    transformer = StableDiffusion3Pipeline.from_pretrained(sd3_model).transformer
    targets = ["attn.add_k_proj", "attn.add_q_proj", "attn.add_v_proj", "attn.to_add_out", "attn.to_k", "attn.to_out.0"]
    model = get_peft_model(
        transformer, LoraConfig(r=4, lora_alpha=8, target_modules=[*targets, "attn.to_q", "attn.to_v"])
    )
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.25, generator=generator)
    model.save_pretrained(folder)
    assert {file.name for file in folder.iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
    return folder


def generate(*arguments) -> None:
    main([str(argument) for argument in arguments])


def pixels(path) -> np.ndarray:
    return np.asarray(Image.open(path))


def stock(model, adapter=None, prompt="a red circle", seed=0, dtype=torch.float32, shift=5.0, stochastic=False, **call):
    """What a user of diffusers and PEFT draws."""
    pipeline = StableDiffusion3Pipeline.from_pretrained(model, torch_dtype=dtype)
    pipeline.set_progress_bar_config(disable=True)
    if adapter is not None:
        pipeline.transformer = PeftModel.from_pretrained(pipeline.transformer, adapter)
    config = pipeline.scheduler.config
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler.from_config(
        config, shift=shift, stochastic_sampling=stochastic
    )
    generator = torch.Generator().manual_seed(seed)
    if stochastic:
        pipeline.scheduler.step = partial(pipeline.scheduler.step, generator=generator)
    if "num_inference_steps" not in call:
        call = {"sigmas": SIGMAS, **call}
    call = {"guidance_scale": 0, "max_sequence_length": 128, "generator": generator, **call}
    return np.asarray(pipeline(prompt, **call).images[0])


def test_the_command_of_the_manual(sd3_model, published, tmp_path):
    expected = stock(sd3_model, published, height=64, width=64)
    assert (expected != stock(sd3_model, height=64, width=64)).mean() > 0.5, "the adapter matters"
    arguments = ["--model", sd3_model, "--adapter", published, "a red circle", "-o", tmp_path / "out.png"]
    generate(*arguments, "--steps", 4, "--shift", 5, "--size", 64, "--seed", 0, "--device", "cpu")
    assert same_picture(pixels(tmp_path / "out.png"), expected)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["out.png", "prompts.jsonl"]


@pytest.mark.parametrize(
    ("options", "settings"),
    [
        (["--dtype", "bf16"], {"dtype": torch.bfloat16}),
        (["--method", "sde"], {"stochastic": True}),
        (["--times", "stock", "--steps", "3"], {"num_inference_steps": 3}),
        (["--guidance", "4.5"], {"guidance_scale": 4.5}),
        (["--steps", "2", "--max-tokens", "9"], {"sigmas": [1.0, 0.5005], "max_sequence_length": 9}),
        (["--seed", "7"], {"seed": 7}),
    ],
    ids=["bf16", "sde", "stock times", "guidance", "steps", "seed"],
)
def test_options_are_the_pipelines(sd3_model, published, tmp_path, options, settings):
    arguments = ["--model", sd3_model, "--adapter", published, "a red circle", "--shift", 5]
    generate(*arguments, *options, "-o", tmp_path / "out.png")
    assert same_picture(pixels(tmp_path / "out.png"), stock(sd3_model, published, **settings), half="bf16" in options)


def test_what_we_export(sd3, sd3_model, adapter, tmp_path):
    sd3.students.save_lora(adapter, tmp_path / "student")
    expected = stock(sd3_model, tmp_path / "student", prompt="a blue square")
    settings = {"family": "sd3", "steps": 4, "method": "euler", "shift": 5.0, "size": 32, "max_tokens": 128}
    (tmp_path / "student/dmdr.json").write_text(json.dumps({**settings, "guidance": 0.0, "recipe": "x"}))
    generate("--model", sd3_model, "--adapter", tmp_path / "student", "a blue square", "-o", tmp_path / "a.png")
    assert same_picture(pixels(tmp_path / "a.png"), expected)
    sd3.students.save(adapter.merged(), tmp_path / "full")
    shutil.move(tmp_path / "student/dmdr.json", tmp_path / "full")
    generate("--model", sd3_model, "--weights", tmp_path / "full", "a blue square", "-o", tmp_path / "b.png")
    assert np.abs(pixels(tmp_path / "b.png").astype(int) - expected).max() <= 1


def test_a_student_brings_its_settings(sd3_model, published, tmp_path):
    def drawn(folder, *options) -> np.ndarray:
        generate("--model", sd3_model, "--adapter", folder, "a", *options, "-o", tmp_path / "a.png")
        return pixels(tmp_path / "a.png")

    asked = drawn(published, "--steps", 2, "--method", "sde", "--shift", 2, "--size", 48, "--max-tokens", 16)
    student = shutil.copytree(published, tmp_path / "student")
    settings = {"steps": 2, "method": "sde", "shift": 2, "size": 48, "max_tokens": 16}
    (student / "dmdr.json").write_text(json.dumps({"family": "sd3", **settings}))
    assert same_picture(drawn(student), asked)
    shifted = drawn(published, "--steps", 2, "--shift", 7, "--size", 48, "--max-tokens", 16)
    assert same_picture(drawn(student, "--method", "euler", "--shift", 7), shifted)
    # Without the file, a scheduler tells what it can.
    (student / "dmdr.json").unlink()
    FlowMatchEulerDiscreteScheduler(shift=2.0, stochastic_sampling=True).save_pretrained(student / "scheduler")
    assert same_picture(drawn(student, "--steps", 2, "--size", 48, "--max-tokens", 16), asked)
    own_shift = drawn(student, "--shift", 3, "--method", "euler")
    assert same_picture(own_shift, drawn(published)), "and else the model's own shift is 3"


def test_several_prompts(sd3_model, tmp_path, capsys):
    prompts = ["a red circle", "a blue square", "ein grünes Dreieck"]
    arguments = ["--model", sd3_model, "--steps", 2, "--seed", 4]
    generate(*arguments, *prompts, "-o", tmp_path / "out.png")
    names = [f"out-{index:05d}.png" for index in range(3)]
    assert capsys.readouterr().out.split() == [str(tmp_path / name) for name in names]
    assert sorted(file.name for file in tmp_path.iterdir()) == [*names, "prompts.jsonl"]
    rows = [json.loads(line) for line in (tmp_path / "prompts.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [(row["file_name"], row["prompt"]) for row in rows] == list(zip(names, prompts, strict=True))
    generate(*arguments, prompts[2], "--seed", 6, "-o", tmp_path / "alone.png")
    assert same_picture(pixels(tmp_path / "alone.png"), pixels(tmp_path / names[2]))
    expected = stock(sd3_model, None, prompts[2], seed=6, shift=3.0, sigmas=[1.0, 0.5005])
    assert same_picture(pixels(tmp_path / "alone.png"), expected)

    (tmp_path / "list.txt").write_text("\n".join(["", *prompts, "  ", ""]), encoding="utf-8")
    generate(*arguments, "--prompts", tmp_path / "list.txt", "--grid", "-o", tmp_path / "sheet.png")
    sheet = pixels(tmp_path / "sheet.png")
    side = math.ceil(math.sqrt(3)) * 34 + 2
    assert sheet.shape == (side, side, 3)
    for index, name in enumerate(names):
        row, column = divmod(index, 2)
        assert same_picture(sheet[2 + 34 * row :, 2 + 34 * column :][:32, :32], pixels(tmp_path / name))


def test_another_decoder(sd3_model, published, tmp_path):
    other = tiny.sd3(tmp_path / "other", seed=1)
    for name, options in {"own": [], "other": ["--vae", other / "vae"]}.items():
        generate("--model", sd3_model, "a", *options, "-o", tmp_path / f"{name}.png")
    assert (pixels(tmp_path / "own.png") != pixels(tmp_path / "other.png")).any()


MISTAKES = {
    "no prompt": ([], "prompts are not given, or given twice: give texts, or else --prompts FILE"),
    "both": (["a", "--prompts", "list.txt"], "prompts are not given, or given twice"),
    "no list": (["--prompts", "none.txt"], "--prompts none.txt cannot be read: No such file or directory; give a text"),
    "empty list": (["--prompts", "empty.txt"], "--prompts empty.txt holds no prompt: write one per line"),
    "latin": (
        ["--prompts", "latin.txt"],
        "--prompts: line 1 of latin.txt is not UTF-8 (invalid start byte); save it as",
    ),
    "no model": (["a", "--model", "none"], "--model none holds no network of a known family"),
    "no folder": (["a", "--model", "none", "--family", "sd3"], "--model none: no model folder none"),
    "half": (["a", "--model", "half"], "--model half: half holds no text_encoder_2/config.json"),
    "other family": (["a", "--family", "sit"], "a PROMPT is not for sit, the family of"),
    "classes": (["a", "--classes", "1"], "--classes is not for sd3, the family of"),
    "per class": (["a", "--per-class", "1"], "--per-class is not for sd3"),
    "method": (["a", "--method", "heun"], "--method heun is unknown: give one of euler, sde"),
    "times": (["a", "--times", "other"], "--times other is unknown: give one of trained, stock"),
    "steps": (["a", "--steps", "0"], "--steps 0 is not a whole number of at least 1"),
    "shift": (["a", "--shift", "-1"], "--shift -1.0 is not a positive number"),
    "guidance": (["a", "--guidance", "inf"], "--guidance inf is not a finite number: give 0 for no guidance"),
    "size": (["a", "--size", "40"], "--size 40: resolution 40 is not a multiple of 16 (VAE times patch): give 32"),
    "too large": (["a", "--size", "256"], "--size 256: resolution 256 is not in 16 to 128"),
    "wide": (
        ["a", "--size", "32x72"],
        "--size 32x72: resolution 72 is not a multiple of 16 (VAE times patch): give 64",
    ),
    "half a size": (["a", "--size", "32x"], "argument --size: '32x' is no size: give a side such as 1024, or HEIGHTx"),
    "flat": (["a", "--size", "0x32"], "--size 0x32 is not a whole number of at least 1"),
    "no size": (["a", "--size", "0"], "--size 0 is not a whole number of at least 1"),
    "tokens": (["a", "--max-tokens", "600"], "--max-tokens 600 is more than the pipeline takes: give at most 512"),
    "seed": (["a", "--seed", "-1"], "--seed -1 is not in [0, 2^63)"),
    "device": (["a", "--device", "warp"], "--device warp is not available: give cpu"),
    "no adapter": (["a", "--adapter", "none"], "--adapter none: no folder none"),
    "no config": (["a", "--adapter", "half"], "--adapter half: half holds no adapter_config.json"),
    "pickle": (["a", "--adapter", "pickle"], "--adapter pickle: pickle holds no adapter_model.safetensors"),
    "broken": (["a", "--adapter", "broken"], "--adapter broken: broken is not an adapter: "),
    "other kind": (["a", "--adapter", "ia3"], "--adapter ia3: ia3 holds a IA3 adapter, not a LORA"),
    "other network": (
        ["a", "--adapter", "deep"],
        "--adapter deep: deep adapts transformer_blocks.1.attn.to_add_out, which the network does not have",
    ),
    "other width": (
        ["a", "--adapter", "wide"],
        "wide adapts transformer_blocks.0.attn.add_k_proj with shape (64, 64), the network's has (32, 32)",
    ),
    "no vae": (["a", "--vae", "half"], "--vae half: half holds no config.json"),
    "weights": (["a", "--weights", "none"], "--weights none: no model folder none"),
    "suffix": (["a", "-o", "a.jpg"], "-o a.jpg ends in .jpg: give a name that ends in .png"),
    "place": (["a", "-o", "none/a.png"], "-o none/a.png: none is no folder that can be written to"),
}


@pytest.fixture(scope="module")
def workshop(sd3_model, published, tmp_path_factory) -> Path:
    """A folder with what users get wrong."""
    from dmdr_models import load
    from dmdr_models.networks.lora import LoRANetwork

    folder = tmp_path_factory.mktemp("workshop")
    (folder / "list.txt").write_text("a\n")
    (folder / "empty.txt").write_text(" \n\n")
    (folder / "latin.txt").write_bytes("grün".encode("latin-1"))
    shutil.copytree(sd3_model, folder / "half")
    shutil.rmtree(folder / "half/text_encoder_2")
    for name in ("pickle", "broken", "ia3"):
        shutil.copytree(published, folder / name)
    (folder / "pickle/adapter_model.safetensors").rename(folder / "pickle/adapter_model.bin")
    (folder / "broken/adapter_model.safetensors").write_bytes(b"\xff" * 40)
    (folder / "ia3/adapter_config.json").write_text('{"peft_type": "IA3"}')
    for name, config in {"deep": {"depth": 4}, "wide": {"width": 64}}.items():
        other = load("sd3", tiny.sd3(folder / "model", **config))
        other.students.save_lora(LoRANetwork(other.load_network(), 4, 4, other.lora_targets), folder / name)
        shutil.rmtree(folder / "model")
    return folder


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_told_in_one_line(name, sd3_model, workshop, monkeypatch, capsys):
    monkeypatch.chdir(workshop)
    before = sorted(workshop.rglob("*"))
    extra, message = MISTAKES[name]
    if name != "device":  # before weights are loaded
        monkeypatch.setattr("diffusers.StableDiffusion3Pipeline.from_pretrained", None)
    with pytest.raises(SystemExit) as end:
        generate("--model", sd3_model, "-o", "out.png", *extra)
    assert end.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("dmdr-generate: ")]
    assert len(lines) == 1
    assert message in lines[0]
    assert sorted(workshop.rglob("*")) == before


NESTED = "[" * 200_000
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("student/dmdr.json", "student/dmdr.json cannot be read: the brackets of student/dmdr.json are nested"),
        ("student/scheduler/scheduler_config.json", "student/scheduler/scheduler_config.json cannot be read: the"),
        ("student/adapter_config.json", "--adapter student: student is not an adapter: the brackets of"),
        ("student/adapter_model.safetensors", "--adapter student: student is not an adapter: the brackets of"),
        ("model/transformer/config.json", "--model model: model/transformer/config.json is not a model's config: the"),
        ("model/scheduler/scheduler_config.json", "scheduler_config.json is not a model's config: the brackets of"),
        ("model/model_index.json", "--model model: model/model_index.json is not a pipeline's config: the brackets"),
        (f"model/transformer/{WEIGHTS}.index.json", f"{WEIGHTS}.index.json is not an index of weights: "),
        (f"model/transformer/{WEIGHTS}", f"--model model: the brackets of model/transformer/{WEIGHTS} are nest"),
    ],
)
def test_brackets_that_nest_too_deeply(sd3_model, published, tmp_path, monkeypatch, capsys, file, message):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(sd3_model, "model")
    shutil.copytree(published, "student")
    Path("student/scheduler").mkdir()
    header = NESTED.encode()
    content = len(header).to_bytes(8, "little") + header if file.endswith(".safetensors") else header
    Path(file).write_bytes(content)
    with pytest.raises(SystemExit) as end:
        generate("--family", "sd3", "--model", "model", "--adapter", "student", "a", "-o", "a.png")
    assert end.value.code == 2
    shown = capsys.readouterr().err
    assert message in shown
    assert shown.count("\n") == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"steps": 2.5}', "steps 2.5 in {path} is not a whole number of at least 1"),
        ('{"size": 33}', "size 33 in {path}: resolution 33 is not a multiple of 16"),
        ('{"size": [32, 33]}', "size 32x33 in {path}: resolution 33 is not a multiple of 16"),
        ('{"size": [32, "48"]}', "size 32x48 in {path} is not a whole number of at least 1"),
        ('{"size": [32, 48, 64]}', "size [32, 48, 64] in {path} is not a whole number of at least 1"),
        ('{"max_tokens": 0}', "max_tokens 0 in {path} is not a whole number of at least 1"),
        ('{"shift": "5"}', "shift 5 in {path} is not a positive number"),
        ('{"family": "sit"}', "a PROMPT is not for sit"),
        ("[]", "{path} is not a JSON object; export the student again"),
    ],
)
def test_a_broken_student_file(sd3_model, published, tmp_path, capsys, content, message):
    student = shutil.copytree(published, tmp_path / "student")
    path = student / "dmdr.json"
    path.write_text(content)
    with pytest.raises(SystemExit):
        generate("--model", sd3_model, "--adapter", student, "a", "-o", tmp_path / "a.png")
    assert message.format(path=path) in capsys.readouterr().err
    assert not (tmp_path / "a.png").exists()
