"""Whatever the flags of a model's own scheduler, a student is drawn at its trained times."""

import inspect
import json
import re
import shutil
from pathlib import Path

import diffusers
import dmdr_models
import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler, LCMScheduler
from dmdr_core import StepGrid, TimestepGrid
from dmdr_models.generate import main
from dmdr_models.sd3.student_scheduler import RESET
from dmdr_models.sd3.student_scheduler import student_scheduler as sd3_scheduler
from dmdr_models.sdxl.accepted import ONLY, PROCESS, SCHEDULERS
from dmdr_models.sdxl.student_scheduler import EULER, LCM, student_scheduler
from PIL import Image
from same_picture import same_picture

PLAIN_CALLS = {
    "algorithm_type", "clip_sample", "clip_sample_range", "disable_corrector", "dynamic_thresholding_ratio",
    "euler_at_final", "final_sigmas_type", "flow_shift", "interpolation_type", "lambda_min_clipped",
    "lower_order_final", "original_inference_steps", "predict_x0", "sample_max_value", "set_alpha_to_one",
    "shift_terminal", "sigma_max", "sigma_min", "skip_prk_steps", "solver_order", "solver_p", "solver_type",
    "steps_offset", "thresholding", "time_shift_type", "timestep_scaling", "timestep_spacing", "timestep_type",
    "use_beta_sigmas", "use_dynamic_shifting", "use_exponential_sigmas", "use_karras_sigmas", "use_lu_lambdas",
}  # fmt: skip
"""The flags of an SDXL folder's scheduler that only say how a plain call samples; no student takes one."""


def flags_of(kind: type) -> set[str]:
    return set(inspect.signature(kind).parameters)


def test_every_flag_of_a_students_scheduler_is_set():
    """A flag that a new diffusers adds fails here by its name: decide what a student needs it to be."""
    assert flags_of(FlowMatchEulerDiscreteScheduler) ^ {"shift", "stochastic_sampling", *RESET} == set()
    assert flags_of(LCMScheduler) ^ {*PROCESS, *LCM} == set()
    assert flags_of(EulerDiscreteScheduler) ^ {*PROCESS, *EULER} == set()


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_flag_of_a_folders_scheduler_is_kept_refused_or_without_effect(name):
    kind = getattr(diffusers, name)
    if name == "DPMSolverSDEScheduler" and "args" in flags_of(kind):  # diffusers' stand-in where torchsde is missing
        assert flags_of(kind) == {"args", "kwargs"}
        return
    known = {*PROCESS, *ONLY, *PLAIN_CALLS}
    assert flags_of(kind) - known - {"noise_sampler_seed"} == set()


MOVED = {
    "use_dynamic_shifting": True, "base_shift": 0.1, "max_shift": 3.0, "base_image_seq_len": 1,
    "max_image_seq_len": 9, "invert_sigmas": True, "shift_terminal": 0.3, "use_karras_sigmas": True,
    "use_exponential_sigmas": True, "use_beta_sigmas": True, "time_shift_type": "linear",
}  # fmt: skip


@pytest.mark.parametrize("flag", MOVED)
def test_no_flag_moves_the_times_of_sd3(sd3_model, tmp_path, flag):
    folder = shutil.copytree(sd3_model, tmp_path / "sd3")
    FlowMatchEulerDiscreteScheduler(shift=3.0, **{flag: MOVED[flag]}).save_pretrained(folder / "scheduler")
    students = dmdr_models.load("sd3", folder).students
    students.save_scheduler(tmp_path, shift=5.0)
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(tmp_path, subfolder="scheduler")
    scheduler.set_timesteps(sigmas=torch.linspace(1, 0.001, 5)[:-1].tolist())
    torch.testing.assert_close(scheduler.timesteps / 1000, StepGrid(4, shift=5.0, t_end=0.001).times[:-1])
    assert scheduler.sigmas[-1] == 0
    assert set(MOVED) == {*RESET} - {"num_train_timesteps"}, "a folder that counts otherwise is refused"


def test_a_students_scheduler_takes_the_process_alone():
    """The numbers of a folder's own scheduler, in an order that no class has as its default."""
    process = {"num_train_timesteps": 500, "beta_start": 0.002, "beta_end": 0.03, "beta_schedule": "squaredcos_cap_v2"}
    moved = {
        "use_karras_sigmas": True, "timestep_spacing": "trailing", "steps_offset": 7, "final_sigmas_type": "sigma_min",
        "interpolation_type": "log_linear", "set_alpha_to_one": False, "clip_sample": True, "thresholding": True,
        "timestep_scaling": 0.01, "original_inference_steps": 2, "sigma_min": 1.0, "sigma_max": 2.0,
        "_use_default_values": ["beta_start", "beta_end"],
    }  # fmt: skip
    alphas = DDPMScheduler(**process).alphas_cumprod
    for stochastic, flags in ((True, LCM), (False, EULER)):
        scheduler = student_scheduler({**process, **moved}, stochastic)
        assert torch.equal(scheduler.alphas_cumprod, alphas)
        assert {name: scheduler.config[name] for name in flags} == flags
        scheduler.set_timesteps(timesteps=TimestepGrid(4, 500).times[:-1].tolist())
        assert scheduler.timesteps.tolist() == TimestepGrid(4, 500).times[:-1].tolist()
    betas = torch.linspace(0.001, 0.02, 500).tolist()
    own = student_scheduler({**process, "trained_betas": betas}, stochastic=True)
    assert torch.equal(own.betas, torch.tensor(betas))
    assert sd3_scheduler(2.0, stochastic=True).config.stochastic_sampling


FLAGS = {
    "sd3": {"use_dynamic_shifting": True, "invert_sigmas": True, "shift_terminal": 0.3, "use_karras_sigmas": True},
    "sdxl": {"timestep_spacing": "trailing", "use_karras_sigmas": True, "final_sigmas_type": "sigma_min"},
}


@pytest.mark.parametrize("method", ["euler", "sde"])
@pytest.mark.parametrize("family", FLAGS)
def test_the_command_and_the_card_draw_alike_on_any_scheduler(
    request, tmp_path, monkeypatch, draw_as_told, family, method
):
    """The picture of a student on a model with flags is the picture on the model without."""
    monkeypatch.chdir(tmp_path)
    plain = request.getfixturevalue(f"{family}_model")
    shutil.copytree(plain, "model")
    config = Path("model/scheduler/scheduler_config.json")
    config.write_text(json.dumps({**json.loads(config.read_text()), **FLAGS[family]}))
    opened = dmdr_models.load(family, "model")
    opened.students.save(opened.load_network(), Path("student"))
    shift = 5.0 if family == "sd3" else 1.0
    opened.students.save_scheduler(Path("student"), shift, method == "sde")
    sampling = {"steps": 3, "method": method, "shift": shift, "size": 32} | ({"max_tokens": 8} if shift > 1 else {})
    text = opened.students.usage(Path("student"), sampling)
    (code,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    exec(code, {})
    ours = draw_as_told(text, family, sampling)
    main([*f"--model {plain} --weights student -o plain.png".split(), "a photo of a fox in the snow"])
    assert same_picture(np.asarray(Image.open("plain.png")), ours)
    assert same_picture(np.asarray(Image.open("fox.png")), ours)
