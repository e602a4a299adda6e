"""A LoRA for each step: which rows have which, where gradients go, and a student that is saved and drawn."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from dmdr_models.generate import main
from dmdr_models.networks.lora import LoRANetwork
from dmdr_models.networks.step_loras import StepLoRAs
from PIL import Image

STEPS = 2


def make(family, shared: bool = False) -> StepLoRAs:
    """Two LoRAs as after some training, which differ."""
    generator, network = torch.Generator().manual_seed(5), family.load_network()
    loras = [
        LoRANetwork(network, 2, 3, family.lora_targets, generator, f"step_{step}", shared=True) for step in range(STEPS)
    ]
    made = StepLoRAs(loras, family.timestep(family.grid(STEPS).times[:-1]), shared).eval()
    for name, parameter in made.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=0.3, generator=generator)
    return made


@pytest.fixture(params=["sd3", "sdxl"])
def family(request, sd3, sdxl):
    return {"sd3": sd3, "sdxl": sdxl}[request.param]


def ask(family, network, rows, **named):
    """Predictions at the grid's times: rows 0 and 2 are at the first step, 1 at the second."""
    x = torch.randn(3, *family.latent_shape(*family.size), generator=torch.Generator().manual_seed(2))
    t = family.grid(STEPS).times[[0, 1, 0]]
    condition = family.condition(["a red circle", "a blue square", "a green cross"])
    return family.predict(network, x[rows], t[rows], {name: each[rows] for name, each in condition.items()}, **named)


def test_a_row_has_the_lora_of_its_step(family):
    shared = family.layout.name == "sd3"
    network = make(family, shared)
    together = ask(family, network, [0, 1, 2])
    for row, step in enumerate((0, 1, 0)):
        expected = ask(family, network.steps[step], [row])
        torch.testing.assert_close(together[[row]], expected, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(ask(family, network, [row]), expected, atol=1e-5, rtol=1e-4)
    assert (ask(family, network.steps[0], [1]) - together[[1]]).abs().max() > 1e-3, "the LoRAs differ"
    trained = {name: p for name, p in network.named_parameters() if p.requires_grad}
    assert trained.keys() == {n for lora in network.steps for n, p in lora.named_parameters() if p.requires_grad}
    assert (len(trained) == len(list(network.parameters()))) == shared


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_a_row_adds_to_the_gradient_of_its_own_step_alone(sd3, checkpointing):
    network = make(sd3, shared=True)
    if checkpointing:
        network.base.enable_gradient_checkpointing()
        network.base.train()

    def gradients(loss):
        found = torch.autograd.grad(loss, list(network.parameters()), allow_unused=True)
        return {name: g for (name, _), g in zip(network.named_parameters(), found, strict=True) if g is not None}

    for row, own in ((0, "step_0"), (1, "step_1")):
        found = gradients(ask(sd3, network, [0, 1, 2])[row].square().sum())
        assert {name.split(".")[-2] for name, g in found.items() if g.abs().max() > 0} == {own}
        alone = gradients(ask(sd3, network.steps[row], [row]).square().sum())
        assert alone
        for name, expected in alone.items():
            torch.testing.assert_close(found[name], expected, atol=1e-4, rtol=1e-3)


def save(family, folder: Path, network: StepLoRAs, method: str) -> dict:
    for step, lora in enumerate(network.steps):
        family.students.save_lora(lora, folder / f"step-{step}")
    family.students.save_scheduler(folder, family.shift, stochastic=method == "sde")
    sampling = {
        "family": family.layout.name,
        "steps": STEPS,
        "method": method,
        "shift": family.shift,
        **family.students.sampling,
    }
    return sampling | {"lora_per_step": True}


@pytest.mark.parametrize("method", ["euler", "sde"])
def test_the_card_and_dmdr_generate_draw_one_picture(sd3, sdxl, tmp_path, monkeypatch, method):
    """The code of a model card is stock diffusers; without its switch the picture would be another."""
    family, folder = {"euler": sdxl, "sde": sd3}[method], tmp_path / "student"
    sampling = save(family, folder, make(family), method)
    (folder / "dmdr.json").write_text(json.dumps(sampling))
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(
        r"```python\n(.*?)```", family.students.usage(Path("student"), sampling, lora=True), flags=re.DOTALL
    )
    assert "import dmdr" not in code
    assert "from dmdr" not in code
    pictures = {}
    for name, text in (("card", code), ("first alone", code.replace("(step + 1) % 2", "0"))):
        exec(text, {})
        pictures[name] = np.asarray(Image.open("fox.png")).astype(int)
    main(["--model", family.path, "--adapter", "student", "a photo of a fox in the snow", "-o", "own.png"])
    own = np.asarray(Image.open("own.png")).astype(int)
    assert np.abs(own - pictures["card"]).max() <= 1
    assert np.abs(own - pictures["first alone"]).max() > 1


def test_other_steps_are_refused(sd3, sd3_model, tmp_path, capsys):
    save(sd3, tmp_path / "student", make(sd3), "euler")
    with pytest.raises(SystemExit) as end:
        main(["--model", str(sd3_model), "--adapter", str(tmp_path / "student"), "--steps", "4", "a", "-o", "a.png"])
    assert end.value.code == 2
    message = r"--steps 4 does not go with --adapter .*, which has LoRAs for 2 steps: give 2"
    assert re.search(message, capsys.readouterr().err)
