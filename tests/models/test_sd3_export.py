import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
from dmdr_core import StepGrid
from peft import PeftModel
from PIL import Image
from safetensors import safe_open


@pytest.fixture
def folder(sd3, adapter, tmp_path) -> Path:
    """A student as a LoRA."""
    sd3.students.save_lora(adapter, tmp_path / "student")
    sd3.students.save_scheduler(tmp_path / "student", shift=5.0)
    return tmp_path / "student"


@pytest.fixture
def asked(sd3):
    """What to ask a network, and how."""
    x = torch.randn(2, 16, 4, 4, generator=torch.Generator().manual_seed(2))
    condition = sd3.condition(["a red circle", "a blue square"])

    @torch.no_grad()
    def ask(network, **named):
        return sd3.predict(network, x, torch.tensor([0.9, 0.3]), condition, **named)

    return ask


def test_every_loader_gives_the_same_network(sd3, sd3_model, pipeline, adapter, folder, asked):
    expected = asked(adapter)
    assert (expected - asked(adapter, lora_scale=0.0)).abs().max() > 0.1
    through_peft = PeftModel.from_pretrained(sd3.load_network(), folder)
    torch.testing.assert_close(asked(through_peft), expected, atol=1e-6, rtol=0)
    pipeline.load_lora_weights(folder)
    torch.testing.assert_close(asked(pipeline.transformer), expected, atol=1e-6, rtol=0)
    transformer = sd3.load_network()
    transformer.load_lora_adapter(folder, weight_name="pytorch_lora_weights.safetensors")
    torch.testing.assert_close(asked(transformer), expected, atol=1e-6, rtol=0)
    merged = adapter.merged()
    sd3.students.save(merged, folder)
    torch.testing.assert_close(asked(sd3.load_network(folder)), expected, atol=1e-5, rtol=1e-5)


def test_an_adapter_that_shares_its_network(sd3, folder, tmp_path, asked):
    """The generator of a shared backbone, with the fake score beside it, is exported alone."""
    from dmdr_models.networks.lora import LoRANetwork

    network = sd3.load_network()
    generator = LoRANetwork(network, 4, 8, sd3.lora_targets, name="generator", shared=True)
    fake = LoRANetwork(network, 2, 2, ["to_q"], name="fake", shared=True)
    for one in (generator, fake):
        for name, parameter in one.named_parameters():
            if ".lora_B." in name:
                torch.nn.init.normal_(parameter, std=0.3)
    expected = asked(generator)
    asked(fake)
    sd3.students.save_lora(generator, tmp_path / "shared")
    loaded = PeftModel.from_pretrained(sd3.load_network(), tmp_path / "shared")
    torch.testing.assert_close(asked(loaded), expected, atol=1e-6, rtol=0)


def test_what_the_files_say(folder, sd3):
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 4, 4)
    assert config["target_modules"] == sorted(sd3.lora_targets)
    assert config["base_model_name_or_path"] == "sd3", "a local path says nothing elsewhere"
    with safe_open(folder / "pytorch_lora_weights.safetensors", "pt") as file:
        metadata = json.loads(file.metadata()["lora_adapter_metadata"])
        assert (metadata["transformer.r"], metadata["transformer.lora_alpha"]) == (4, 4)
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(folder, subfolder="scheduler")
    assert (scheduler.shift, scheduler.config.stochastic_sampling) == (5.0, False)
    sd3.students.save_scheduler(folder, shift=2.0, stochastic=True)
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(folder, subfolder="scheduler")
    assert (scheduler.shift, scheduler.config.stochastic_sampling) == (2.0, True)


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize(("dtype", "option"), [("float32", None), ("bfloat16", "bf16"), ("float16", "fp16")])
def test_the_usage_says_where_and_in_what(sd3, lora, device, dtype, option):
    sampling = {"steps": 3, "method": "sde", "shift": 5.0, "size": 64, "max_tokens": 40}
    command, _, code = sd3.students.usage(Path("student"), sampling, lora, device, dtype).partition("\n")
    assert (f'.to("{device}")' in code, f"torch_dtype=torch.{dtype})" in code) == (True, True)
    assert re.findall(r"--device (\w+)", command) == ([] if device == "cpu" else [device])
    assert re.findall(r"--dtype (\w+)", command) == ([] if option is None else [option])


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
@pytest.mark.parametrize("stochastic", [False, True], ids=["ode", "sde"])
def test_the_usage_runs(sd3, sd3_model, adapter, folder, tmp_path, monkeypatch, draw_as_told, lora, stochastic):
    """The code of a model card, as it is written: stock diffusers alone, at the trained times."""
    if not lora:
        sd3.students.save(adapter.merged(), folder)
    monkeypatch.chdir(tmp_path)
    sampling = {"steps": 3, "method": "sde" if stochastic else "euler", "shift": 5.0, "size": 64, "max_tokens": 40}
    sd3.students.save_scheduler(folder, 5.0, stochastic)
    text = sd3.students.usage(Path("student"), sampling, lora)
    (code,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert "dmdr" not in code
    times, loaded = [], []
    forward = StableDiffusion3Pipeline.__call__

    def watched(pipeline, *args, **named):
        loaded.append(pipeline)
        pipeline.transformer.register_forward_pre_hook(
            lambda _, args, named: times.append(named["timestep"][0].item() / 1000), with_kwargs=True
        )
        return forward(pipeline, *args, **named)

    monkeypatch.setattr(StableDiffusion3Pipeline, "__call__", watched)
    exec(code, {})
    expected = StepGrid(3, shift=5.0, t_end=0.001).times[:-1]
    torch.testing.assert_close(torch.tensor(times), expected, atol=1e-6, rtol=0)
    assert loaded[0].scheduler.config.stochastic_sampling == stochastic
    picture = np.asarray(Image.open("fox.png"))
    assert picture.shape == (64, 64, 3)

    ours = draw_as_told(text, "sd3", sampling)
    assert np.abs(ours.astype(int) - picture).max() <= 1
    assert (ours == picture).mean() > 0.99
