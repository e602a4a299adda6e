import json
import shutil
import subprocess
import sys
from functools import partial

import dmdr_models
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
from dmdr_core import StepGrid
from dmdr_models import registry, tiny
from dmdr_models.base.picture_size import as_size
from dmdr_models.drawing.sampling import sample
from dmdr_models.families import visit_device
from dmdr_models.folder.contents import describe
from dmdr_models.folder.fingerprints import text_fingerprint
from dmdr_models.networks.lora import LoRANetwork
from torch import nn

PROMPTS = ["a red circle", "Ein blaues Quadrat über " + "vielen Kreisen " * 12, ""]


def latents(batch: int, side: int = 4, seed: int = 0) -> torch.Tensor:
    return torch.randn(batch, 16, side, side, generator=torch.Generator().manual_seed(seed))


def test_facts_of_the_model(sd3, sd3_model):
    assert (sd3.layout.name, sd3.size, sd3.num_classes) == ("sd3", (32, 32), None)
    assert sd3.latent_shape(32, 32) == (16, 4, 4)
    assert sd3.latent_shape(64, 96) == (16, 8, 12)
    with pytest.raises(ValueError, match="resolution 40 is not a multiple of 16"):
        sd3.latent_shape(64, 40)
    assert (sd3.shift, sd3.process.t_end, sd3.max_tokens) == (3.0, 0.001, 128)
    larger = dmdr_models.load("sd3", sd3_model, resolution=64)
    assert (larger.latent_shape(*larger.size), larger.size) == ((16, 8, 8), (64, 64))
    wide = dmdr_models.load("sd3", sd3_model, resolution=(32, 96))
    assert (wide.latent_shape(*wide.size), wide.students.sampling["size"]) == ((16, 4, 12), [32, 96])
    assert "vae" not in larger.__dict__, "opening a family reads no weights"
    assert "parts" not in larger.text.__dict__


@pytest.mark.bits
@pytest.mark.parametrize("max_tokens", [128, 20])
def test_condition_is_the_pipelines(sd3_model, pipeline, max_tokens):
    family = dmdr_models.load("sd3", sd3_model, max_tokens=max_tokens)
    with torch.no_grad():
        states, _, pooled, _ = pipeline.encode_prompt(
            PROMPTS, None, None, do_classifier_free_guidance=False, max_sequence_length=max_tokens
        )
    found = family.condition(PROMPTS)
    assert torch.equal(found["encoder_hidden_states"], states)
    assert torch.equal(found["pooled_projections"], pooled)
    assert states.shape == (3, 77 + max_tokens, 48)
    assert not any(value.requires_grad for value in found.values())
    empty = family.null_condition(2)
    for name, value in found.items():
        torch.testing.assert_close(empty[name], value[[2, 2]])


def test_another_source_of_texts(sd3):
    before = sd3.null_condition(1)["pooled_projections"]
    asked = []

    def cache(prompts):
        asked.append(list(prompts))
        return {"pooled_projections": torch.ones(len(prompts), 32)}

    sd3.text = cache
    assert torch.equal(sd3.condition(["a", "b"])["pooled_projections"], torch.ones(2, 32))
    assert torch.equal(sd3.null_condition(3)["pooled_projections"], torch.ones(3, 32))
    assert sd3.null_condition(2)["pooled_projections"].shape == (2, 32)
    assert asked == [["a", "b"], [""]], "the empty prompt is asked for once"
    assert not torch.equal(before, torch.ones(1, 32))
    assert sd3.to("cpu") is sd3
    with pytest.raises(ValueError, match="offload_text: the texts come from elsewhere"):
        sd3.save_memory(offload_text=True)


@pytest.mark.parametrize("wrong", ["a red circle", [], [1], [None], ["a", 2]])
def test_what_is_no_prompt(sd3, wrong):
    with pytest.raises(ValueError, match="prompts must be a list of texts, got"):
        sd3.condition(wrong)


@pytest.mark.bits
def test_prediction_by_hand(sd3):
    network = sd3.load_network()
    x, condition = latents(3), sd3.condition(PROMPTS)
    times = torch.tensor([1.0, 0.93757, 0.0014])
    with torch.no_grad():
        expected = network(x, timestep=torch.tensor([1000.0, 938.0, 1.0]), **condition).sample
        assert torch.equal(sd3.predict(network, x, times, condition), expected)


@pytest.mark.parametrize("adapted", [False, True])
def test_a_network_is_asked_in_its_own_dtype(sd3_model, adapted):
    family = dmdr_models.load("sd3", sd3_model, dtype=torch.bfloat16)
    network = bare = family.load_network()
    assert {p.dtype for p in bare.parameters()} == {torch.bfloat16}
    if adapted:
        network = LoRANetwork(bare, 2, 2, family.lora_targets, shared=True)
        network.float()
        assert {p.dtype for p in network.parameters()} == {torch.float32}
    seen = {}
    bare.register_forward_pre_hook(lambda _, args, named: seen.update(x=args[0], **named), with_kwargs=True)
    x, condition = latents(2), {name: value.float() for name, value in family.condition(["a", "b"]).items()}
    prediction = family.predict(network, x, torch.tensor([0.626, 0.626]), condition)
    assert prediction.dtype == torch.float32
    for name in ("x", "encoder_hidden_states", "pooled_projections"):
        assert seen[name].dtype == torch.bfloat16, name
    assert seen["timestep"].tolist() == [626, 626], "which bf16 would round to 628"
    exact = dmdr_models.load("sd3", sd3_model)
    expected = exact.predict(exact.load_network(), x, torch.tensor([0.626, 0.626]), condition)
    torch.testing.assert_close(prediction, expected, atol=0.15, rtol=0.1)
    assert family.decode(x).dtype == torch.float32


@pytest.mark.parametrize(
    "config",
    [{}, {"qk_norm": "rms_norm"}, {"qk_norm": "rms_norm", "dual_attention_layers": (0,)}],
    ids=["SD3-M", "SD3.5-L", "SD3.5-M"],
)
@pytest.mark.bits
def test_lora_on_every_kind(config, tmp_path):
    family = dmdr_models.load("sd3", tiny.sd3(tmp_path / "model", **config))
    # Frozen from the start: torch may multiply with weights that are to be trained in another way.
    network = family.load_network().requires_grad_(False)
    x, t, condition = latents(2), torch.tensor([0.9, 0.3]), family.condition(["a", "b"])
    with torch.no_grad():
        bare = family.predict(network, x, t, condition)
    lora = LoRANetwork(network, 4, 8, family.lora_targets)
    names = {name.partition(".lora_A")[0] for name in lora.adapter_state()}
    first = {"add_k_proj", "add_q_proj", "add_v_proj", "to_add_out", "to_k", "to_q", "to_v", "to_out.0"}
    expected = {f"transformer_blocks.0.attn.{name}" for name in first}
    expected |= {
        f"transformer_blocks.1.attn.{name}" for name in first - {"to_add_out"}
    }  # the last block drops the text
    has_more = any(".attn2.to_q" in name for name, _ in network.named_modules())
    assert has_more == ("dual_attention_layers" in config), "of which nothing is adapted"
    assert {name.partition(".lora_B")[0] for name in names} == expected
    for layer in lora.layers:
        nn.init.normal_(layer.lora_B["lora"].weight, std=0.3)
    with torch.no_grad():
        assert torch.equal(family.predict(lora, x, t, condition, lora_scale=0.0), bare)
        twice = family.predict(lora, x, t, condition, lora_scale=2.0)
        for layer in lora.layers:
            layer.lora_B["lora"].weight.data.mul_(2)
        assert torch.equal(family.predict(lora, x, t, condition, lora_scale=1.0), twice)
    assert (twice - bare).abs().max() > 0.05


def visited(pipeline, **call) -> list[float]:
    """The times at which a stock call asks its transformer, and its latents."""
    times = []
    hook = pipeline.transformer.register_forward_pre_hook(
        lambda _, args, named: times.append(named["timestep"][0].item() / 1000), with_kwargs=True
    )
    pipeline("a", guidance_scale=0, output_type="latent", **call)
    hook.remove()
    return times


@pytest.mark.parametrize(("steps", "shift"), [(1, 5.0), (2, 1.0), (4, 3.0), (4, 5.0), (8, 5.0)])
def test_a_stock_pipeline_visits_the_trained_times(pipeline, sd3, steps, shift):
    sigmas = torch.linspace(1, 0.001, steps + 1)[:-1].tolist()
    expected = StepGrid(steps, shift, sd3.process.t_end).times[:-1]
    given = FlowMatchEulerDiscreteScheduler.from_config(pipeline.scheduler.config, shift=shift)
    pipeline.scheduler = given
    torch.testing.assert_close(torch.tensor(visited(pipeline, sigmas=sigmas)), expected, atol=1e-6, rtol=0)
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipeline.scheduler.config, shift=3.0)
    pipeline.scheduler.set_shift(shift)
    torch.testing.assert_close(torch.tensor(visited(pipeline, sigmas=sigmas)), expected, atol=1e-6, rtol=0)


def test_what_stock_calls_visit_otherwise(pipeline):
    """The numbers of the public models' usage: neither the times of the training, nor the shift that is asked for."""
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=5.0)
    plain = visited(pipeline, num_inference_steps=4)
    assert [1000 * time for time in plain] == pytest.approx([1000, 909.7, 717.4, 24.4], abs=0.1)
    trained = visited(pipeline, sigmas=torch.linspace(1, 0.001, 5)[:-1].tolist())
    assert [round(1000 * time) for time in trained] == [1000, 938, 834, 626]
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    unchanged = visited(pipeline, num_inference_steps=4)
    pipeline.scheduler._internal_dict["shift"] = 5.0
    assert visited(pipeline, num_inference_steps=4) == unchanged


class Rounding(FlowMatchEulerDiscreteScheduler):
    """A stock scheduler that rounds the timesteps for its network, as those of the public training are."""

    end = 0.0

    def set_timesteps(self, num_inference_steps=None, device=None, sigmas=None):
        super().set_timesteps(num_inference_steps, device, sigmas)
        self.timesteps = self.timesteps.round()
        self.sigmas[-1] = self.end


class Ours(Rounding):
    """It also ends at 0.001."""

    end = 0.001


@pytest.mark.parametrize("method", ["euler", "sde"])
def test_latents_are_a_stock_pipelines(pipeline, sd3, method):
    network, noise = sd3.load_network(), latents(1)
    condition = sd3.condition(["a red circle"])
    got = sample(sd3, network, condition, noise, 4, method, shift=5.0, generator=torch.Generator().manual_seed(8))
    call = {"latents": noise, "guidance_scale": 0, "output_type": "latent", "max_sequence_length": 128}
    call["sigmas"] = torch.linspace(1, 0.001, 5)[:-1].tolist()
    found = {}
    for kind in (Ours, Rounding):
        pipeline.scheduler = kind(shift=5.0, stochastic_sampling=method == "sde")
        draws = torch.Generator().manual_seed(8)
        pipeline.scheduler.step = partial(pipeline.scheduler.step, generator=draws)
        found[kind] = pipeline("a red circle", **call).images
    # In "sde", the pipeline renoises an x0 of t = 0, we one of t = 0.001.
    torch.testing.assert_close(got, found[Ours], atol=1e-5 if method == "euler" else 1e-2, rtol=0)
    # And it goes on to 0 in the end: 0.001 of a velocity.
    torch.testing.assert_close(got, found[Rounding], atol=1e-2, rtol=0)
    assert (got - noise).abs().mean() > 0.1


def test_guided_latents_are_a_stock_pipelines(pipeline, sd3):
    noise = latents(1)
    got = sample(sd3, sd3.load_network(), sd3.condition(["a red circle"]), noise, 3, guidance=4.0, shift=3.0)
    pipeline.scheduler = Ours(shift=3.0)
    sigmas = torch.linspace(1, 0.001, 4)[:-1].tolist()
    call = {"sigmas": sigmas, "latents": noise, "output_type": "latent", "max_sequence_length": 128}
    expected = pipeline("a red circle", guidance_scale=4.0, **call).images
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


def test_pictures_are_decoded_like_the_pipelines(pipeline, sd3):
    x = latents(2)
    with torch.no_grad():
        raw = pipeline.vae.decode(x / pipeline.vae.config.scaling_factor + pipeline.vae.config.shift_factor).sample
        expected = pipeline.image_processor.postprocess(raw, output_type="pt")
        torch.testing.assert_close(sd3.decode(x), expected, atol=1e-6, rtol=1e-5)
        images = torch.rand(2, 3, 32, 32)
        mean = pipeline.vae.encode(images * 2 - 1).latent_dist.mean
        torch.testing.assert_close(sd3.encode(images), (mean - 0.0609) * 1.5305)


def decoded(model, **switches) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """Pictures, the gradient at their latents, and the batches that the decoder's middle was run on."""
    family = dmdr_models.load("sd3", model, resolution=64)
    family.save_memory(**switches)
    batches: list[int] = []
    family.vae.decoder.mid_block.register_forward_pre_hook(lambda _, inputs: batches.append(len(inputs[0])))
    x = latents(2, side=8).requires_grad_()
    images = family.decode(x)
    (gradient,) = torch.autograd.grad(images.square().sum(), x)
    return images.detach(), gradient, batches


def test_memory_switches(sd3_model, monkeypatch):
    from diffusers import AutoencoderKL

    images, gradient, batches = decoded(sd3_model)
    assert batches == [2]
    expected = {("vae_checkpointing",): [2, 2], ("vae_slicing",): [1, 1], ("vae_checkpointing", "vae_slicing"): [1] * 4}
    for switches, runs in expected.items():
        again, its_gradient, batches = decoded(sd3_model, **dict.fromkeys(switches, True))
        torch.testing.assert_close(again, images, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(its_gradient, gradient, atol=1e-4, rtol=1e-3)
        assert batches == runs, switches
    tiles = []
    whole = AutoencoderKL.tiled_decode
    monkeypatch.setattr(AutoencoderKL, "tiled_decode", lambda *a, **n: tiles.append(a[1].shape) or whole(*a, **n))
    again, its_gradient, _ = decoded(sd3_model, vae_tiling=True)
    assert tiles == [(2, 16, 8, 8)], "a picture of the asked size is tiled"
    assert again.shape == images.shape
    assert not torch.equal(again, images)
    assert (its_gradient.abs().amax(dim=1) > 0).all(), "gradient reaches every latent"


def test_offloaded_encoders_visit_the_device(sd3, monkeypatch):
    sd3.save_memory(offload_text=True)
    expected = sd3.condition(["a"])
    copies = []
    monkeypatch.setattr(visit_device, "on_device", lambda tensor, device: copies.append(device) or tensor.to(device))
    weights = [tensor for encoder, _ in sd3.text.parts for tensor in (*encoder.parameters(), *encoder.buffers())]
    homes = [tensor.data_ptr() for tensor in weights]
    sd3.text.to("meta")
    assert all(tensor.device.type == "cpu" for tensor in weights), "they stay where they are"
    sd3.text.device = torch.device("cpu", 0)
    assert torch.equal(sd3.condition(["a"])["pooled_projections"], expected["pooled_projections"])
    assert copies == [torch.device("cpu", 0)] * len(weights), "each weight is copied once"
    assert [tensor.data_ptr() for tensor in weights] == homes


def test_networks(sd3, sd3_model, tmp_path):
    network = sd3.load_network()
    assert not network.training
    network.proj_out.bias.data.fill_(0.5)
    sd3.students.save(network, tmp_path / "student")
    for place in ("student", "student/transformer"):
        loaded = sd3.load_network(tmp_path / place)
        assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), network.parameters(), strict=True))
    stock = StableDiffusion3Pipeline.from_pretrained(sd3_model, transformer=loaded)
    assert stock.transformer.proj_out.bias[0] == 0.5
    with pytest.raises(ValueError, match="holds a SiTTransformer, not a SD3Transformer2DModel"):
        sd3.load_network(tiny.sit(tmp_path / "sit"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"resolution": 40}, "resolution 40 is not a multiple of 16 \\(VAE times patch\\): give 32"),
        ({"resolution": 144}, "resolution 144 is not in 16 to 128, which the model's position table holds: give 128"),
        ({"resolution": 0}, "resolution 0 is not in 16 to 128, .*: give 16"),
        ({"resolution": (41, 32)}, "resolution 41 is not a multiple of 16 \\(VAE times patch\\): give 48"),
        ({"resolution": (32, 144)}, "resolution 144 is not in 16 to 128"),
        ({"max_tokens": 0}, "max_tokens 0 is not in 1 to 512"),
        ({"max_tokens": 513}, "max_tokens 513 is not in 1 to 512"),
    ],
)
def test_impossible_options(sd3_model, options, message):
    with pytest.raises(ValueError, match=message):
        dmdr_models.load("sd3", sd3_model, **options)
    if "resolution" in options:
        with pytest.raises(ValueError, match=message):
            describe(registry.find("sd3"), sd3_model, sizes=[as_size(options["resolution"])])


def test_options_that_are_not_for_sit(model):
    assert dmdr_models.load("sit", model, resolution=32).size == (32, 32)
    with pytest.raises(ValueError, match="resolution 64: this sit model draws 32 pixels only; leave it out"):
        dmdr_models.load("sit", model, resolution=64)
    with pytest.raises(ValueError, match="max_tokens: the family sit has no such option; leave it out"):
        dmdr_models.load("sit", model, max_tokens=128)
    with pytest.raises(ValueError, match="offload_text: there are no text encoders to offload"):
        dmdr_models.load("sit", model).save_memory(offload_text=True)


def test_wrong_folders(sd3_model, model, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="holds a SiTTransformer, not a SD3Transformer2DModel"):
        dmdr_models.load("sd3", model)
    half = shutil.copytree(sd3_model, tmp_path / "half")
    shutil.rmtree(half / "text_encoder_3")
    family = dmdr_models.load("sd3", half)
    with pytest.raises(FileNotFoundError, match=r"half holds no text_encoder_3/config\.json"):
        family.condition(["a"])
    with pytest.raises(FileNotFoundError, match=r"half holds no text_encoder_3: download it, or for a model without"):
        describe(registry.find("sd3"), half)
    assert describe(registry.find("sd3"), half, own_text=True)
    shutil.copytree(half / "text_encoder_2", half / "text_encoder_3")
    with pytest.raises(ValueError, match="text_encoder_3 holds a CLIPTextModelWithProjection, not a T5EncoderModel"):
        describe(registry.find("sd3"), half)
    shutil.rmtree(half / "scheduler")
    with pytest.raises(FileNotFoundError, match=r"half holds no scheduler/scheduler_config\.json"):
        dmdr_models.load("sd3", half)
    with pytest.raises(FileNotFoundError, match=r"half holds no scheduler/scheduler_config\.json"):
        describe(registry.find("sd3"), half, own_text=True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match="no folder here, nor a model on the hub"):
        dmdr_models.load("sd3", "owner/none")


def test_description(sd3, sd3_model):
    found = describe(registry.find("sd3"), sd3_model)
    network = sd3.load_network()
    kinds = (nn.Linear, nn.Conv2d)
    assert set(found.layers) == {name for name, module in network.named_modules() if isinstance(module, kinds)}
    assert found.num_classes is None
    assert describe(registry.find("sd3"), "stabilityai/stable-diffusion-3.5-large") is None


def test_fingerprint_of_the_texts(sd3_model, tmp_path):
    first = text_fingerprint(registry.find("sd3"), sd3_model, 128)
    copy = shutil.copytree(sd3_model, tmp_path / "copy")
    assert text_fingerprint(registry.find("sd3"), copy, 128) == first
    found = {
        first,
        text_fingerprint(registry.find("sd3"), copy, 64),
        text_fingerprint(registry.find("sd3"), tiny.sd3(tmp_path / "other", seed=1), 128),
    }
    shutil.rmtree(copy / "transformer")
    assert text_fingerprint(registry.find("sd3"), copy, 128) == first, "of the texts alone"
    config = json.loads((copy / "tokenizer_3/tokenizer_config.json").read_text())
    (copy / "tokenizer_3/tokenizer_config.json").write_text(json.dumps({**config, "model_max_length": 7}))
    found |= {
        text_fingerprint(registry.find("sd3"), copy, 128),
        text_fingerprint(registry.find("sd3"), "owner/name", 128),
        text_fingerprint(registry.find("sd3"), "owner/other", 128),
    }
    assert len(found) == 6


def test_a_large_file_is_sampled(sd3_model, tmp_path, monkeypatch):
    from dmdr_models.folder import fingerprints as module

    monkeypatch.setattr(module._sample, "__defaults__", (8, 64))
    first = text_fingerprint(registry.find("sd3"), sd3_model, 128)
    copy = shutil.copytree(sd3_model, tmp_path / "copy")
    file = copy / "text_encoder/model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert text_fingerprint(registry.find("sd3"), copy, 128) != first


def test_descriptions_need_no_torch(sd3_model):
    code = f"""
import sys
from dmdr_models import registry
from dmdr_models.folder.contents import describe
from dmdr_models.folder.fingerprints import text_fingerprint
describe(registry.find("sd3"), {str(sd3_model)!r}), text_fingerprint(registry.find("sd3"), {str(sd3_model)!r}, 128)
print(sorted({{"torch", "diffusers", "transformers"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr


def test_tiny_is_reproducible(sd3_model, tmp_path):
    before = torch.get_rng_state()
    again = tiny.sd3(tmp_path / "again")
    assert torch.equal(torch.get_rng_state(), before)
    for file in again.rglob("*.*"):
        assert file.read_bytes() == (sd3_model / file.relative_to(again)).read_bytes(), file


def test_tiny_texts_differ(pipeline):
    """Words reach the picture through every encoder, also at the end of a caption."""
    ids = pipeline.tokenizer("Red é", padding="max_length", max_length=77).input_ids
    tokens = pipeline.tokenizer.convert_ids_to_tokens(ids)
    assert tokens[:7] == ["<|startoftext|>", "r", "e", "d</w>", "Ã", "©</w>", "<|endoftext|>"]
    assert set(tokens[7:]) == {"<|endoftext|>"}
    other = pipeline.tokenizer_2("red", padding="max_length", max_length=77).input_ids
    assert pipeline.tokenizer_2.convert_ids_to_tokens(other)[5:] == ["!"] * 72
    letters = pipeline.tokenizer_3("Red, é").input_ids
    assert pipeline.tokenizer_3.convert_ids_to_tokens(letters) == ["▁", "R", "e", "d", ",", "▁", "<unk>", "</s>"]
    call = {"num_inference_steps": 2, "guidance_scale": 0, "output_type": "latent", "latents": latents(1)}
    one, other = (pipeline(f"a red circle above a {word} square", **call).images for word in ("blue", "green"))
    assert (one - other).abs().max() > 1e-2
