"""Folders of another process or another decoder are refused before weights are read; the others draw as diffusers."""

import json
import shutil
from pathlib import Path

import dmdr_models
import pytest
import torch
from diffusers import AutoencoderKL, DDPMScheduler, EDMDPMSolverMultistepScheduler, EDMEulerScheduler
from dmdr_models import registry
from dmdr_models.folder.contents import check_vae, describe
from dmdr_models.generate import main
from dmdr_models.sdxl.accepted import ONLY

SCHEDULER, VAE = "scheduler/scheduler_config.json", "vae/config.json"
REFUSED = {
    "sdxl": [
        (SCHEDULER, {"_class_name": "EDMEulerScheduler"}, "is of the class EDMEulerScheduler, which has no betas"),
        (SCHEDULER, {"_class_name": "EDMDPMSolverMultistepScheduler"}, "EDMDPMSolverMultistepScheduler, which has no"),
        (SCHEDULER, {"_class_name": "FlowMatchEulerDiscreteScheduler"}, "FlowMatchEulerDiscreteScheduler, which has"),
        (SCHEDULER, {"_class_name": None}, "is of the class None, which has no betas"),
        (SCHEDULER, {"prediction_type": "v_prediction"}, "has the prediction_type v_prediction, only epsilon is known"),
        (SCHEDULER, {"prediction_type": "sample"}, "has the prediction_type sample, only epsilon is known"),
        (SCHEDULER, {"prediction_type": "flow_prediction"}, "has the prediction_type flow_prediction, only epsilon"),
        (SCHEDULER, {"rescale_betas_zero_snr": True}, "has the rescale_betas_zero_snr True, only False is known"),
        (SCHEDULER, {"use_flow_sigmas": True}, "has the use_flow_sigmas True, only False is known"),
        (SCHEDULER, {"variance_type": "learned_range"}, "has the variance_type learned_range, only fixed_small is"),
        (SCHEDULER, {"beta_schedule": "sigmoid"}, "has the beta_schedule sigmoid, only linear, scaled_linear, squared"),
        (SCHEDULER, {"beta_end": 1.0}, "has the beta 1.0, which is not between 0 and 1"),
        (SCHEDULER, {"beta_start": "low"}, "has the beta low, which is not between 0 and 1"),
        (SCHEDULER, {"trained_betas": [0.1, 0.2]}, "trained_betas that are not a list of num_train_timesteps 1000"),
        (SCHEDULER, {"trained_betas": [0.1] * 999 + [1]}, "has the beta 1, which is not between 0 and 1"),
        (SCHEDULER, {"num_train_timesteps": 0}, "has the num_train_timesteps 0, which is no count of timesteps"),
        (VAE, {"shift_factor": 0.1}, "the VAE has the shift_factor 0.1, which StableDiffusionXLPipeline ignores"),
        (VAE, {"latents_mean": [0.0] * 4}, "the VAE has one of latents_mean and latents_std, not both"),
        (VAE, {"latents_mean": [0.0] * 3, "latents_std": [1.0] * 3}, "has latents_mean that are not a list with a"),
    ],
    "sd3": [
        (SCHEDULER, {"_class_name": "EulerDiscreteScheduler"}, "holds a EulerDiscreteScheduler, not a FlowMatch"),
        (SCHEDULER, {"_class_name": "FlowMatchHeunDiscreteScheduler"}, "holds a FlowMatchHeunDiscreteScheduler, not a"),
        (SCHEDULER, {"num_train_timesteps": 500}, "has the num_train_timesteps 500, only 1000 is known"),
        (VAE, {"latents_mean": [0.0] * 16}, "the VAE has latents_mean, which StableDiffusion3Pipeline ignores"),
        (VAE, {"latents_std": [1.0] * 16}, "the VAE has latents_std, which StableDiffusion3Pipeline ignores"),
        (VAE, {"shift_factor": None}, "the VAE has no shift_factor, which StableDiffusion3Pipeline needs"),
    ],
}  # fmt: skip


@pytest.fixture
def without_weights(request, tmp_path):
    """A copy of a family's folder whose weights are headers alone, so that a check cannot read a weight."""

    def copy(family: str) -> Path:
        folder = Path(shutil.copytree(request.getfixturevalue(f"{family}_model"), tmp_path / family))
        for file in folder.rglob("*.safetensors"):
            content = file.read_bytes()
            file.write_bytes(content[: 8 + int.from_bytes(content[:8], "little")])
        return folder

    return copy


def change(file: Path, changes: dict) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize("family", REFUSED)
def test_another_process_or_decoder_is_refused(without_weights, family, capsys):
    folder, layout = without_weights(family), registry.find(family)
    capsys.readouterr()
    for file, changes, message in REFUSED[family]:
        before = (folder / file).read_text()
        change(folder / file, changes)
        with pytest.raises(ValueError, match=message):
            describe(layout, folder)
        with pytest.raises(ValueError, match=message):
            dmdr_models.load(family, folder).vae_config  # noqa: B018
        with pytest.raises(SystemExit, match="2"):
            main(["--model", str(folder), "a fox", "-o", str(folder / "out.png")])
        said = capsys.readouterr().err
        assert said.startswith(f"dmdr-generate: --model {folder}: ")
        assert message in said
        assert said.count("\n") == 1
        if file == VAE:
            with pytest.raises(ValueError, match=message):
                check_vae(layout, folder / "vae")
            describe(layout, folder, own_vae=True)
        (folder / file).write_text(before)
    dmdr_models.load(family, folder)


def test_each_refused_entry_is_tried():
    tried = {name for file, changes, _ in REFUSED["sdxl"] if file == SCHEDULER for name in changes}
    assert set(ONLY) <= tried


def test_a_playground(without_weights):
    """The folder of Playground v2.5 as it is published: an EDM process, and statistics of latents."""
    folder = without_weights("sdxl")
    change(
        folder / VAE,
        {"latents_mean": [-1.6574, 1.886, -1.383, 2.5155], "latents_std": [8.4927, 5.9022, 6.5498, 5.2299]},
    )
    for kind in (EDMEulerScheduler, EDMDPMSolverMultistepScheduler):
        kind(sigma_data=0.5).save_pretrained(folder / "scheduler")
        with pytest.raises(ValueError, match=f"is of the class {kind.__name__}, which has no betas: SDXL needs one"):
            describe(registry.find("sdxl"), folder)


def test_a_config_that_leaves_the_process_open_is_refused(without_weights):
    """diffusers' classes have other defaults each, so that the process would hang on the class that reads it."""
    folder = without_weights("sdxl")
    config = json.loads((folder / SCHEDULER).read_text())
    (folder / SCHEDULER).write_text(json.dumps({k: v for k, v in config.items() if k != "num_train_timesteps"}))
    assert len(dmdr_models.load("sdxl", folder).process.alphas_cumprod) == 1000, "the default of all classes"
    for name in ("beta_start", "beta_end", "beta_schedule"):
        (folder / SCHEDULER).write_text(json.dumps({key: value for key, value in config.items() if key != name}))
        with pytest.raises(ValueError, match=f"lacks {name}: save it again"):
            dmdr_models.load("sdxl", folder)


def test_betas_of_its_own(without_weights):
    folder = without_weights("sdxl")
    betas = torch.linspace(0.001, 0.02, 1000).tolist()
    change(folder / SCHEDULER, {"trained_betas": betas})
    expected = DDPMScheduler(trained_betas=betas).alphas_cumprod
    assert torch.equal(dmdr_models.load("sdxl", folder).process.alphas_cumprod, expected)


def test_statistics_of_latents_are_the_pipelines(sdxl_model, xl_pipeline, tmp_path):
    """SDXL's pipeline knows a mean and a deviation for each channel; decode and encode do, too."""
    mean, std = [0.3, -0.2, 0.1, 0.4], [0.7, 1.3, 0.9, 2.0]
    AutoencoderKL.from_pretrained(sdxl_model, subfolder="vae").save_pretrained(tmp_path / "vae")
    change(tmp_path / VAE, {"latents_mean": mean, "latents_std": std})
    family = dmdr_models.load("sdxl", sdxl_model, vae=tmp_path / "vae")
    xl_pipeline.vae = AutoencoderKL.from_pretrained(tmp_path / "vae")

    def drawn(kind):
        generator = torch.Generator().manual_seed(0)
        call = {"num_inference_steps": 1, "guidance_scale": 0, "height": 32, "width": 32}
        return xl_pipeline("a fox", output_type=kind, generator=generator, **call).images

    latents, picture = drawn("latent"), drawn("pt")
    torch.testing.assert_close(family.decode(latents), picture, atol=1e-5, rtol=0)
    assert (dmdr_models.load("sdxl", sdxl_model).decode(latents) - picture).abs().max() > 1e-3
    coded = family.vae.encode(picture * 2 - 1).latent_dist.mean
    expected = (coded - torch.tensor(mean).view(1, 4, 1, 1)) * family.vae.config.scaling_factor
    torch.testing.assert_close(family.encode(picture), expected / torch.tensor(std).view(1, 4, 1, 1))


def test_a_name_on_the_hub_is_checked_before_its_weights(without_weights, monkeypatch, capsys):
    """Of such a model nothing is known before it is opened; a folder without weights stands for it here."""
    folder = without_weights("sdxl")
    monkeypatch.setattr("dmdr_models.drawing.stock_pipeline.describe", lambda *args, **named: None)
    monkeypatch.setattr("diffusers.StableDiffusionXLPipeline.from_pretrained", lambda *args, **named: 1 / 0)
    for file, changes, message in (REFUSED["sdxl"][0], REFUSED["sdxl"][-1]):
        before = (folder / file).read_text()
        change(folder / file, changes)
        capsys.readouterr()
        with pytest.raises(SystemExit, match="2"):
            main(["--model", str(folder), "a fox", "-o", str(folder / "out.png")])
        assert message in capsys.readouterr().err
        (folder / file).write_text(before)
