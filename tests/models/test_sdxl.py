import json
import os
import re
import shutil
import subprocess
import sys

import dmdr_models
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from dmdr_models import registry, tiny
from dmdr_models.drawing.sampling import sample
from dmdr_models.folder.checks import check_weights
from dmdr_models.folder.contents import describe
from dmdr_models.folder.fingerprints import text_fingerprint
from dmdr_models.folder.lora_targets import check_targets
from dmdr_models.folder.state_dicts import load_state_dict, save_state_dict
from dmdr_models.networks.lora import LoRANetwork, layer_names
from torch import nn

PROMPTS = ["a red circle", "Ein blaues Quadrat über " + "vielen Kreisen " * 12, ""]


def latents(batch: int, side: int = 4, seed: int = 0) -> torch.Tensor:
    return torch.randn(batch, 4, side, side, generator=torch.Generator().manual_seed(seed))


def test_facts_of_the_model(sdxl, sdxl_model):
    assert (sdxl.layout.name, sdxl.layout.network_part, sdxl.latent_shape(32, 32)) == ("sdxl", "unet", (4, 4, 4))
    assert (sdxl.size, sdxl.num_classes, sdxl.shift) == ((32, 32), None, 1.0)
    assert sdxl.students.sampling == {"size": 32, "max_tokens": None}
    larger = dmdr_models.load("sdxl", sdxl_model, resolution=72)
    assert (larger.latent_shape(*larger.size), larger.size) == ((4, 9, 9), (72, 72))
    assert "vae" not in larger.__dict__, "opening a family reads no weights"
    assert "parts" not in larger.text.__dict__


@pytest.mark.bits
@pytest.mark.parametrize("zeros", [True, False])
def test_condition_is_the_pipelines(sdxl_model, tmp_path, zeros):
    model = sdxl_model if zeros else tiny.sdxl(tmp_path / "model", force_zeros_for_empty_prompt=False)
    family = dmdr_models.load("sdxl", model)
    pipeline = StableDiffusionXLPipeline.from_pretrained(model)
    with torch.no_grad():
        states, null_states, pooled, null_pooled = pipeline.encode_prompt(PROMPTS)
    found, null = family.condition(PROMPTS), family.null_condition(3)
    assert found.keys() == null.keys()
    for ours, expected in ((found, (states, pooled)), (null, (null_states, null_pooled))):
        torch.testing.assert_close(ours["encoder_hidden_states"], expected[0])
        torch.testing.assert_close(ours["text_embeds"], expected[1])
    assert torch.equal(found["encoder_hidden_states"], states)
    assert (null["text_embeds"].abs().max() == 0) == zeros
    assert states.shape == (3, 77, 32)
    assert not any(value.requires_grad for value in found.values())


def test_the_unconditional_may_be_the_empty_text(sdxl_model):
    family = dmdr_models.load("sdxl", sdxl_model)
    family.use_empty_text()
    null, empty = family.null_condition(2), family.condition(["", ""])
    assert null["text_embeds"].abs().max() > 0
    assert null.keys() == empty.keys()
    torch.testing.assert_close(null, empty)


@pytest.mark.parametrize(("height", "width"), [(32, 32), (40, 24), (8, 64), (1024, 2048)])
def test_sizes_are_the_pipelines(xl_pipeline, sdxl, height, width):
    """The UNet is told the size of the latents that it gets, whatever the family's own size is."""
    seen = []
    xl_pipeline.unet.forward = lambda x, *_, added_cond_kwargs, **__: seen.append(added_cond_kwargs["time_ids"]) or (x,)
    call = {"num_inference_steps": 1, "guidance_scale": 0, "output_type": "latent"}
    xl_pipeline("a", height=height, width=width, **call)
    x = torch.zeros(1, *sdxl.latent_shape(height, width))
    sdxl.predict(xl_pipeline.unet, x, torch.tensor([999]), sdxl.condition(["a"]))
    assert torch.equal(seen[1].float(), seen[0])
    assert seen[1].dtype == torch.int64


def test_another_source_of_texts(sdxl):
    """A cache of embeddings may take the place of the text encoders."""
    asked = []

    def cache(prompts):
        asked.append(list(prompts))
        return {"text_embeds": torch.ones(len(prompts), 16)}

    assert sdxl.text(["a"]).keys() == {"encoder_hidden_states", "text_embeds"}
    sdxl.text = cache
    assert sdxl.condition(["a", "b"]).keys() == {"text_embeds"}
    assert torch.equal(sdxl.null_condition(3)["text_embeds"], torch.zeros(3, 16))
    sdxl.null_condition(2)
    assert asked == [["a", "b"], [""]], "the empty prompt is asked for once"
    with pytest.raises(ValueError, match="prompts must be a list of texts, got"):
        sdxl.condition("a red circle")


@pytest.mark.bits
def test_prediction_by_hand(sdxl):
    network = sdxl.load_network()
    x, condition, t = latents(3), sdxl.condition(PROMPTS), torch.tensor([999, 399, 0])
    with torch.no_grad():
        expected = network(
            x,
            t,
            encoder_hidden_states=condition["encoder_hidden_states"],
            added_cond_kwargs={
                "text_embeds": condition["text_embeds"],
                "time_ids": torch.tensor([[32, 32, 0, 0, 32, 32]] * 3),
            },
        ).sample
        assert torch.equal(sdxl.predict(network, x, t, condition), expected)
        words = sdxl.predict(network, x[[0, 0]], t[[0, 0]], sdxl.condition(["a red circle", "a blue square"]))
    assert (words[0] - words[1]).abs().max() > 1e-2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("adapted", [False, True])
def test_a_network_is_asked_in_its_own_dtype(sdxl_model, sdxl, adapted, dtype, monkeypatch):
    family = dmdr_models.load("sdxl", sdxl_model, dtype=dtype)
    network = bare = family.load_network()
    assert {p.dtype for p in bare.parameters()} == {dtype}
    assert {p.dtype for p in family.load_network(dtype=torch.float32).parameters()} == {torch.float32}
    if adapted:
        network = LoRANetwork(bare, 2, 2, family.lora_targets, shared=True)
        network.float()
    seen = {}
    bare.register_forward_pre_hook(lambda _, args, named: seen.update(x=args[0], t=args[1], **named), with_kwargs=True)
    x, condition = latents(2), {name: value.float() for name, value in family.condition(["a", "b"]).items()}
    for each in (family, sdxl):
        monkeypatch.setattr(each, "factor", 2049)  # neither half precision can hold 4 x 2049
    prediction = family.predict(network, x, torch.tensor([399, 998]), condition)
    assert prediction.dtype == torch.float32
    added = seen["added_cond_kwargs"]
    assert {seen["x"].dtype, seen["encoder_hidden_states"].dtype, added["text_embeds"].dtype} == {dtype}
    assert (seen["t"].tolist(), added["time_ids"][0].tolist()) == ([399, 998], [8196, 8196, 0, 0, 8196, 8196])
    expected = sdxl.predict(sdxl.load_network(), x, torch.tensor([399, 998]), condition)
    torch.testing.assert_close(prediction, expected, atol=0.05, rtol=0.05)
    assert family.decode(x).dtype == torch.float32


def test_the_process_is_the_schedulers(sdxl, sdxl_model, tmp_path):
    euler = EulerDiscreteScheduler.from_pretrained(sdxl_model, subfolder="scheduler")
    assert torch.equal(sdxl.process.alphas_cumprod, euler.alphas_cumprod)
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    torch.testing.assert_close(sdxl.process.alphas_cumprod.double(), (1 - betas).cumprod(0), atol=1e-6, rtol=1e-4)
    other = shutil.copytree(sdxl_model, tmp_path / "other")
    DDIMScheduler(num_train_timesteps=500, beta_schedule="linear").save_pretrained(other / "scheduler")
    process = dmdr_models.load("sdxl", other).process
    assert torch.equal(process.alphas_cumprod, DDPMScheduler(500).alphas_cumprod)
    assert sdxl.to("cpu").process.alphas_cumprod.device == torch.device("cpu")


def test_conversions_at_every_timestep(sdxl):
    """Noise to x0 and back, in float32, against float64 arithmetic."""
    t = torch.arange(1000)
    x0, noise = latents(1000, 2), latents(1000, 2, seed=1)
    alpha = sdxl.process.alphas_cumprod.double().reshape(-1, 1, 1, 1)
    x_t = alpha.sqrt() * x0.double() + (1 - alpha).sqrt() * noise.double()
    torch.testing.assert_close(sdxl.process.add_noise(x0, noise, t).double(), x_t, atol=1e-6, rtol=1e-6)
    got = sdxl.process.to_x0(x_t.float(), noise, t)
    assert got.dtype == torch.float32
    exact = (x_t.float().double() - (1 - alpha).sqrt() * noise.double()) / alpha.sqrt()
    error = (got.double() - exact).abs() * alpha.sqrt()  # what float32 cannot hold of x_t is 1 / √ᾱ larger in x0
    assert error.max() < 5e-7
    there = sdxl.process.step(x_t.float(), noise, t.flip(0), t)
    assert there.isfinite().all()
    back = (x_t.float() - alpha.sqrt().float() * got) / (1 - alpha).sqrt().float()
    torch.testing.assert_close(back, noise, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", [DDPMScheduler, DDIMScheduler, EulerDiscreteScheduler])
def test_conversions_are_the_schedulers(sdxl, kind):
    scheduler = kind.from_config(sdxl.scheduler_config, clip_sample=False)
    x_t, prediction = latents(2), latents(2, seed=1)
    if kind is DDIMScheduler:
        scheduler.set_timesteps(1000)
    for t in (999, 750, 399, 250, 1, 0):
        scaled, at = x_t, torch.tensor(t)
        if kind is EulerDiscreteScheduler:
            scheduler.set_timesteps(timesteps=[t])
            scaled, at = x_t / sdxl.process.alphas_cumprod[t].sqrt(), scheduler.timesteps[0]
        result = scheduler.step(prediction, at, scaled)
        ours = sdxl.process.to_x0(x_t, prediction, t)
        torch.testing.assert_close(ours, result.pred_original_sample, atol=1e-5, rtol=1e-5)


def test_the_grid(sdxl, sdxl_model, tmp_path):
    assert sdxl.grid(1).times.tolist() == [399, 0]
    assert sdxl.grid(4).times.tolist() == [999, 749, 500, 250, 0]
    with pytest.raises(ValueError, match="shift 3: SDXL's times know no shift; use 1"):
        sdxl.grid(4, 3.0)
    coarse = shutil.copytree(sdxl_model, tmp_path / "coarse")
    DDIMScheduler(num_train_timesteps=500).save_pretrained(coarse / "scheduler")
    assert dmdr_models.load("sdxl", coarse).grid(1).times.tolist() == [199, 0]


def asked(pipeline, timesteps=None, steps=1, noise=None, seed=0, guidance=0.0):
    """Latents of a stock call, and the timesteps at which it asked its UNet."""
    seen = []
    hook = pipeline.unet.register_forward_pre_hook(lambda _, args: seen.append(int(args[1])))
    result = pipeline(
        "a red circle",
        num_inference_steps=steps,
        timesteps=timesteps,
        guidance_scale=guidance,
        latents=noise,
        generator=torch.Generator().manual_seed(seed),
        output_type="latent",
    )
    hook.remove()
    return result.images, seen


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_renoising_is_lcm(sdxl, xl_pipeline, steps):
    """Few-step sampling is that of diffusers' LCMScheduler, with the noise of its generator between the steps."""
    noise, times = latents(1), sdxl.grid(steps).times[:-1].tolist()
    xl_pipeline.scheduler = LCMScheduler.from_config(xl_pipeline.scheduler.config)
    expected, seen = asked(xl_pipeline, times, steps, noise, seed=8)
    assert seen == times
    network, condition = sdxl.load_network(), sdxl.condition(["a red circle"])
    got = sample(sdxl, network, condition, noise, steps, "sde", generator=torch.Generator().manual_seed(8))
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    if steps == 1:
        assert torch.equal(sample(sdxl, network, condition, noise, 1, "euler"), got)


@pytest.mark.parametrize(("steps", "guidance"), [(1, 0.0), (4, 0.0), (4, 3.0), (50, 3.0)])
def test_deterministic_steps_are_stock_samplers(sdxl, xl_pipeline, steps, guidance):
    """Euler's in the scaled space of σ, which are DDIM's, at the same times."""
    noise, times = latents(1), sdxl.grid(steps).times[:-1].tolist()
    got = sample(sdxl, sdxl.load_network(), sdxl.condition(["a red circle"]), noise, steps, guidance=guidance or 1.0)
    expected, seen = asked(xl_pipeline, times, steps, noise, guidance=guidance)
    assert seen == times
    torch.testing.assert_close(got, expected, atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("steps", [2, 4, 50])
def test_the_deterministic_step_is_ddims(sdxl, steps):
    ddim = DDIMScheduler.from_config(sdxl.scheduler_config, clip_sample=False)
    ddim.set_timesteps(steps)
    x_t, prediction = latents(2), latents(2, seed=1)
    for t in (999, 600, 1000 // steps):
        expected = ddim.step(prediction, t, x_t).prev_sample
        got = sdxl.process.step(x_t, prediction, t, t - 1000 // steps)
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


CONFIG = {
    "sample_size": 128,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (320, 640, 1280),
    "transformer_layers_per_block": [1, 2, 10],
    "attention_head_dim": [5, 10, 20],
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}


def kinds_of_layers(network: nn.Module) -> set[str]:
    """Names of linear and convolution layers, without their numbers."""
    found = (name for name, module in network.named_modules() if isinstance(module, nn.Linear | nn.Conv2d))
    return {re.sub(r"\.\d+\.", ".N.", re.sub(r"\.\d+\.", ".N.", name)) for name in found}


@pytest.fixture(scope="module")
def full_size() -> UNet2DConditionModel:
    """SDXL-Base's UNet, without weights."""
    with torch.device("meta"):
        return UNet2DConditionModel(**CONFIG)


def test_the_full_size(sdxl, full_size):
    assert sum(p.numel() for p in full_size.parameters()) == 2_567_463_684
    check_targets(sdxl.lora_targets, layer_names(full_size))
    layers = [name for name, module in full_size.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    left = [name for name in layers if not name.endswith(tuple(f".{target}" for target in sdxl.lora_targets))]
    embeddings = [f"{name}_embedding.linear_{i}" for name in ("time", "add") for i in (1, 2)]
    assert left == ["conv_in", *embeddings, "conv_out"]
    assert len(layers) - len(left) == 788
    assert kinds_of_layers(sdxl.load_network()) == kinds_of_layers(full_size), "the tiny one has all of its layers"


@pytest.mark.bits
def test_lora_on_every_layer(sdxl):
    # Frozen from the start: torch may multiply with weights that are to be trained in another way.
    network = sdxl.load_network().requires_grad_(False)
    x, t, condition = latents(2), torch.tensor([399, 20]), sdxl.condition(["a", "b"])
    with torch.no_grad():
        bare = sdxl.predict(network, x, t, condition)
    lora = LoRANetwork(network, 4, 8, sdxl.lora_targets)
    convolutions = [layer for layer in lora.layers if isinstance(layer.get_base_layer(), nn.Conv2d)]
    assert len(convolutions) > 10
    for layer in lora.layers:
        nn.init.normal_(layer.lora_B["lora"].weight, std=0.1)
    with torch.no_grad():
        assert torch.equal(sdxl.predict(lora, x, t, condition, lora_scale=0.0), bare)
        twice = sdxl.predict(lora, x, t, condition, lora_scale=2.0)
        for layer in lora.layers:
            layer.lora_B["lora"].weight.data.mul_(2)
        assert torch.equal(sdxl.predict(lora, x, t, condition, lora_scale=1.0), twice)
        assert (twice - bare).abs().max() > 0.05
        merged = lora.merged()
        torch.testing.assert_close(sdxl.predict(merged, x, t, condition), twice, atol=1e-4, rtol=1e-4)
    assert merged.state_dict().keys() == sdxl.load_network().state_dict().keys()


def test_checkpointing_changes_no_gradient(sdxl):
    x, t, condition = latents(2), torch.tensor([399, 20]), sdxl.condition(["a", "b"])

    def gradients(checkpointing: bool) -> list[torch.Tensor]:
        network = sdxl.load_network().requires_grad_(True)
        if checkpointing:
            network.enable_gradient_checkpointing()
        sdxl.predict(network, x, t, condition).square().mean().backward()
        return [p.grad for p in network.parameters()]

    for ours, expected in zip(gradients(True), gradients(False), strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-6, rtol=1e-4)


# -- pictures


def test_pictures_are_decoded_like_the_pipelines(sdxl, xl_pipeline):
    x = latents(2)
    with torch.no_grad():
        raw = xl_pipeline.vae.decode(x / 0.13025).sample
        torch.testing.assert_close(sdxl.decode(x), xl_pipeline.image_processor.postprocess(raw, output_type="pt"))
        images = torch.rand(2, 3, 32, 32)
        mean = xl_pipeline.vae.encode(images * 2 - 1).latent_dist.mean
        torch.testing.assert_close(sdxl.encode(images), mean * 0.13025)


def test_the_tiny_decoder(sdxl_model, xl_pipeline, taesd):
    from diffusers import AutoencoderTiny

    family = dmdr_models.load("sdxl", sdxl_model, vae=taesd)
    xl_pipeline.vae = AutoencoderTiny.from_pretrained(taesd)
    assert isinstance(family.vae, AutoencoderTiny)
    x = latents(2).requires_grad_()
    raw = xl_pipeline.vae.decode(x).sample
    expected = xl_pipeline.image_processor.postprocess(raw.detach(), output_type="pt")
    found = family.decode(x)
    torch.testing.assert_close(found, expected)
    assert found.shape == (2, 3, 32, 32)
    (gradient,) = torch.autograd.grad(found[0].square().sum(), x)
    assert gradient[0].abs().max() > 0
    assert gradient[1].abs().max() == 0
    pictures = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(family.encode(pictures), xl_pipeline.vae.encode(pictures * 2 - 1).latents)
    # The published configs are older than diffusers' own name for this.
    config = json.loads((taesd / "config.json").read_text())
    assert config["decoder_block_out_channels"] == config.pop("block_out_channels")
    old = shutil.copytree(taesd, taesd.parent / "old", dirs_exist_ok=True)
    (old / "config.json").write_text(json.dumps(config))
    torch.testing.assert_close(dmdr_models.load("sdxl", sdxl_model, vae=old).decode(x), expected)


def test_memory_switches_of_the_tiny_decoder(sdxl_model, taesd):
    def decoded(**switches):
        family = dmdr_models.load("sdxl", sdxl_model, vae=taesd, resolution=64)
        family.save_memory(**switches)
        batches = []
        family.vae.decoder.layers[0].register_forward_pre_hook(lambda _, inputs: batches.append(inputs[0].shape[0]))
        x = latents(2, side=8).requires_grad_()
        images = family.decode(x)
        (gradient,) = torch.autograd.grad(images.square().sum(), x)
        return images.detach(), gradient, batches, family.encode(images).detach()

    images, gradient, batches, coded = decoded()
    assert batches == [2]
    for switches, runs in {("vae_checkpointing",): [2, 2], ("vae_slicing",): [1, 1]}.items():
        again, its_gradient, batches, its_code = decoded(**dict.fromkeys(switches, True))
        torch.testing.assert_close(again, images)
        torch.testing.assert_close(its_gradient, gradient, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(its_code, coded)
        assert batches == runs, switches
    again, its_gradient, batches, _ = decoded(vae_tiling=True)
    assert len(batches) == 9
    assert (again - images).abs().mean() < 0.1
    assert (its_gradient.abs().amax(dim=1) > 0).all(), "gradient reaches every latent"


@pytest.mark.parametrize("upcast", [True, False])
def test_a_vae_that_overflows_is_not_opened_in_float16(sdxl_model, taesd, tmp_path, upcast):
    model = shutil.copytree(sdxl_model, tmp_path / "model")
    vae = AutoencoderKL.from_pretrained(model / "vae")
    vae.register_to_config(force_upcast=upcast)
    vae.save_pretrained(model / "vae")
    family = dmdr_models.load("sdxl", model, dtype=torch.float16)
    assert family.vae.dtype == (torch.float32 if upcast else torch.float16)
    assert dmdr_models.load("sdxl", model, vae=taesd, dtype=torch.float16).vae.dtype == torch.float16
    assert dmdr_models.load("sdxl", model, dtype=torch.bfloat16).vae.dtype == torch.bfloat16


# -- files


@pytest.mark.bits
@pytest.mark.parametrize("suffix", [".safetensors", ".bin", ".pt", ".pth"])
def test_a_file_with_a_state_dict(sdxl, sdxl_model, tmp_path, suffix):
    network = sdxl.load_network()
    network.conv_out.bias.data.fill_(0.5)
    file = tmp_path / f"unet{suffix}"
    save_state_dict(network, file)
    assert os.listdir(tmp_path) == [file.name]
    state = load_state_dict(file)
    assert state.keys() == network.state_dict().keys()
    loaded = sdxl.load_network(file)
    assert not loaded.training
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), network.parameters(), strict=True))
    half = dmdr_models.load("sdxl", sdxl_model, dtype=torch.bfloat16).load_network(file)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    check_weights(registry.find("sdxl"), file, describe(registry.find("sdxl"), sdxl_model).layers)
    stock = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(sdxl_model, subfolder="unet")).eval()
    assert str(stock.load_state_dict(state)) == "<All keys matched successfully>"
    x, t, condition = latents(1), torch.tensor([399]), sdxl.condition(["a"])
    assert torch.allclose(sdxl.predict(loaded, x, t, condition), sdxl.predict(stock, x, t, condition), atol=1e-5)


def test_a_folder_with_a_network(sdxl, tmp_path):
    network = sdxl.load_network()
    network.conv_out.bias.data.fill_(0.5)
    sdxl.students.save(network, tmp_path / "student")
    for place in ("student", "student/unet"):
        loaded = sdxl.load_network(tmp_path / place)
        assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), network.parameters(), strict=True))
        check_weights(registry.find("sdxl"), tmp_path / place)


class Attack:
    def __reduce__(self):
        return os.mkdir, ("attacked",)


def test_files_that_are_refused(sdxl, sdxl_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    network = sdxl.load_network()
    state = network.state_dict()
    first = next(iter(state))
    torch.save({"conv_in.weight": Attack()}, "attack.bin")
    torch.save([1, 2], "list.bin")
    torch.save({"state_dict": state}, "nested.pt")
    torch.save({name: value for name, value in state.items() if "conv_norm_out" not in name}, "short.bin")
    torch.save({**state, "ema.weight": state[first]}, "long.bin")
    torch.save({**state, first: state[first][:1]}, "shape.bin")
    save_state_dict(nn.Linear(2, 2), "other.safetensors")
    for name in ("broken.safetensors", "broken.bin", "state.ckpt"):
        (tmp_path / name).write_bytes(b"\xff" * 40)
    (tmp_path / "empty.bin").write_bytes(b"")
    expected = {
        "attack.bin": "attack.bin is damaged, or holds more than tensors and could run code: it is not read",
        "list.bin": "list.bin holds something else than tensors by their names",
        "nested.pt": "nested.pt holds something else than tensors by their names",
        "short.bin": "short.bin lacks conv_norm_out.weight and 1 more",
        "long.bin": "long.bin holds the unknown ema.weight",
        "shape.bin": "shape.bin holds conv_in.weight (1, 4, 3, 3), the network (16, 4, 3, 3)",
        "other.safetensors": "other.safetensors lacks conv_in.weight and ",
        "broken.safetensors": "broken.safetensors cannot be read, it may be damaged: ",
        "broken.bin": "broken.bin is damaged, or holds more than tensors",
        "empty.bin": "empty.bin cannot be read, it may be damaged: EOFError",
        "state.ckpt": "state.ckpt is no state dict: give a file that ends in .safetensors, .bin, .pt, .pth",
    }
    for name, message in expected.items():
        with pytest.raises(ValueError, match="^" + re.escape(message)) as error:
            sdxl.load_network(name)
        assert "\n" not in str(error.value)
    assert not (tmp_path / "attacked").exists()
    with pytest.raises(FileNotFoundError, match=r"no folder none\.bin, nor such a file"):
        sdxl.load_network("none.bin")
    with pytest.raises(ValueError, match=r"let it end in \.safetensors"):
        save_state_dict(network, "unet.ckpt")
    known = describe(registry.find("sdxl"), sdxl_model).layers
    early = {
        "state.ckpt": "is no state dict",
        "broken.safetensors": "is no safetensors file",
        "other.safetensors": "other.safetensors names no layer as diffusers does: give a network that diffusers saved",
    }
    for name, message in early.items():
        with pytest.raises(ValueError, match=message):
            check_weights(registry.find("sdxl"), name, known)
    with pytest.raises(FileNotFoundError, match=r"no model folder none\.bin, nor such a file"):
        check_weights(registry.find("sdxl"), "none.bin", known)
    with pytest.raises(ValueError, match="holds a AutoencoderKL, not a UNet2DConditionModel"):
        check_weights(registry.find("sdxl"), sdxl_model / "vae")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"resolution": 36}, r"resolution 36 is not a multiple of 8 \(VAE times patch\): give 32"),
        ({"resolution": 4}, "resolution 4 is not a multiple of 8 .*: give 8"),
        ({"resolution": 0}, "resolution 0 is not a multiple of 8 .*: give 8"),
        ({"max_tokens": 77}, "max_tokens: the family sdxl has no such option; leave it out"),
    ],
)
def test_impossible_options(sdxl_model, options, message):
    with pytest.raises(ValueError, match=message):
        dmdr_models.load("sdxl", sdxl_model, **options)
    if "resolution" in options:
        with pytest.raises(ValueError, match=message):
            describe(registry.find("sdxl"), sdxl_model, sizes=[(options["resolution"],) * 2])


def test_wrong_folders(sdxl_model, sd3_model, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no unet/config\.json"):
        dmdr_models.load("sdxl", sd3_model)
    with pytest.raises(ValueError, match="holds a VAE with 16 channels, the network takes 4"):
        dmdr_models.load("sdxl", sdxl_model, vae=tiny.taesd(tmp_path / "taesd3", latent_channels=16))
    with pytest.raises(ValueError, match="not a AutoencoderKL or AutoencoderTiny"):
        dmdr_models.load("sdxl", sdxl_model, vae=sdxl_model / "unet")
    other = shutil.copytree(sdxl_model, tmp_path / "other")
    config = json.loads((other / "scheduler/scheduler_config.json").read_text())
    (other / "scheduler/scheduler_config.json").write_text(json.dumps(config | {"prediction_type": "v_prediction"}))
    for refused in (lambda: dmdr_models.load("sdxl", other), lambda: describe(registry.find("sdxl"), other)):
        with pytest.raises(ValueError, match="has the prediction_type v_prediction, only epsilon is known"):
            refused()
    unet = json.loads((sdxl_model / "unet/config.json").read_text())
    UNet2DConditionModel.from_config({**unet, "cross_attention_dim": 8}).save_pretrained(tmp_path / "narrow")
    with pytest.raises(ValueError, match="has cross_attention_dim 8, the model 32"):
        dmdr_models.load("sdxl", sdxl_model).load_network(tmp_path / "narrow")
    shutil.rmtree(other / "text_encoder")
    with pytest.raises(FileNotFoundError, match=r"holds no text_encoder/config\.json"):
        describe(registry.find("sdxl"), other)


def test_description(sdxl_model, taesd, tmp_path):
    found = describe(registry.find("sdxl"), sdxl_model)
    assert found.num_classes is None
    assert {"down_blocks.0.downsamplers.0.conv", "time_embedding.linear_1", "conv_in"} < set(found.layers)
    bare = shutil.copytree(sdxl_model, tmp_path / "bare", ignore=shutil.ignore_patterns("vae", "text_encoder*"))
    assert describe(registry.find("sdxl"), bare, own_vae=True, own_text=True) == found
    assert dmdr_models.load("sdxl", bare, vae=taesd).size == (32, 32)


def test_fingerprint_of_the_text_encoders(sdxl_model, sd3_model, tmp_path):
    first = text_fingerprint(registry.find("sdxl"), sdxl_model, None)
    copy = shutil.copytree(sdxl_model, tmp_path / "copy")
    shutil.rmtree(copy / "unet")
    assert text_fingerprint(registry.find("sdxl"), copy, None) == first, "of the texts alone"
    other = tiny.sdxl(tmp_path / "other", seed=1)
    assert text_fingerprint(registry.find("sdxl"), other, None) != first


def test_describing_imports_no_torch(sdxl_model):
    code = f"""
import sys
from dmdr_models import registry
from dmdr_models.folder.checks import check_weights
from dmdr_models.folder.contents import describe
check_weights(registry.find("sdxl"), {str(sdxl_model)!r}, describe(registry.find("sdxl"), {str(sdxl_model)!r}).layers)
assert not {{"torch", "diffusers"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_tiny_models_are_reproducible(sdxl_model, taesd, tmp_path):
    before = torch.get_rng_state()
    again, decoder = tiny.sdxl(tmp_path / "again"), tiny.taesd(tmp_path / "taesd")
    assert torch.equal(torch.get_rng_state(), before)
    for new, old in ((again, sdxl_model), (decoder, taesd)):
        for file in new.rglob("*.*"):
            assert file.read_bytes() == (old / file.relative_to(new)).read_bytes(), file
