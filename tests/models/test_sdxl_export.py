import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import EulerDiscreteScheduler, LCMScheduler, StableDiffusionXLPipeline
from dmdr_core import TimestepGrid
from dmdr_models.folder.state_dicts import save_state_dict
from dmdr_models.networks.lora import LoRANetwork
from peft import PeftModel
from PIL import Image
from safetensors import safe_open
from torch import nn


@pytest.fixture
def lora(sdxl) -> LoRANetwork:
    """A LoRA on every kind of layer as after some training, with an alpha that is not its rank."""
    generator = torch.Generator().manual_seed(5)
    lora = LoRANetwork(sdxl.load_network(), rank=4, alpha=6, targets=sdxl.lora_targets, generator=generator)
    for name, parameter in lora.named_parameters():
        if ".lora_B." in name:
            nn.init.normal_(parameter, std=0.1, generator=generator)
    return lora


@pytest.fixture
def folder(sdxl, lora, tmp_path) -> Path:
    """A student as a LoRA."""
    sdxl.students.save_lora(lora, tmp_path / "student")
    return tmp_path / "student"


def test_every_loader_gives_the_same_network(sdxl, xl_pipeline, lora, folder):
    x = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(2))
    t, condition = torch.tensor([999, 399]), sdxl.condition(["a red circle", "a blue square"])

    @torch.no_grad()
    def asked(network, **named):
        return sdxl.predict(network, x, t, condition, **named)

    expected = asked(lora)
    assert (expected - asked(lora, lora_scale=0.0)).abs().max() > 0.05
    through_peft = PeftModel.from_pretrained(sdxl.load_network(), folder)
    torch.testing.assert_close(asked(through_peft), expected, atol=1e-6, rtol=0)
    xl_pipeline.load_lora_weights(folder)
    torch.testing.assert_close(asked(xl_pipeline.unet), expected, atol=1e-6, rtol=0)
    merged = lora.merged()
    sdxl.students.save(merged, folder)
    save_state_dict(merged, folder / "unet.safetensors")
    for place in (folder, folder / "unet.safetensors"):
        torch.testing.assert_close(asked(sdxl.load_network(place)), expected, atol=1e-5, rtol=1e-5)


def test_what_the_files_say(folder, sdxl):
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 4, 4)
    assert config["target_modules"] == sorted(sdxl.lora_targets)
    assert config["base_model_name_or_path"] == "sdxl", "a local path says nothing elsewhere"
    with safe_open(folder / "pytorch_lora_weights.safetensors", "pt") as file:
        metadata = json.loads(file.metadata()["lora_adapter_metadata"])
        assert (metadata["unet.r"], metadata["unet.lora_alpha"]) == (4, 4)
    for stochastic, kind in ((True, LCMScheduler), (False, EulerDiscreteScheduler)):
        sdxl.students.save_scheduler(folder, shift=1.0, stochastic=stochastic)
        scheduler = kind.from_pretrained(folder, subfolder="scheduler")
        config = json.loads((folder / "scheduler/scheduler_config.json").read_text())
        assert config["_class_name"] == kind.__name__
        assert torch.equal(scheduler.alphas_cumprod, sdxl.process.alphas_cumprod)


@pytest.mark.parametrize(("lora_kept", "stochastic", "steps"), [(True, True, 1), (False, True, 4), (False, False, 4)])
def test_the_usage_runs(sdxl, lora, folder, tmp_path, monkeypatch, draw_as_told, lora_kept, stochastic, steps):
    """The code of a model card, as it is written: stock diffusers alone, at the trained times."""
    if not lora_kept:
        sdxl.students.save(lora.merged(), folder)
    monkeypatch.chdir(tmp_path)
    method = "sde" if stochastic else "euler"
    sampling = {"steps": steps, "method": method, "shift": 1.0, "size": 64, "max_tokens": None}
    sdxl.students.save_scheduler(folder, shift=1.0, stochastic=stochastic)
    text = sdxl.students.usage(Path("student"), sampling, lora_kept)
    (code,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert "dmdr" not in code
    times = []
    forward = StableDiffusionXLPipeline.__call__

    def watched(pipeline, *args, **named):
        pipeline.unet.register_forward_pre_hook(lambda _, args: times.append(int(args[1])))
        return forward(pipeline, *args, **named)

    monkeypatch.setattr(StableDiffusionXLPipeline, "__call__", watched)
    exec(code, {})
    assert times == TimestepGrid(steps).times[:-1].tolist()
    picture = np.asarray(Image.open("fox.png"))
    assert picture.shape == (64, 64, 3)

    ours = draw_as_told(text, "sdxl", sampling)
    assert np.abs(ours.astype(int) - picture).max() <= 1
    assert (ours == picture).mean() > 0.99
