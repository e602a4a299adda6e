"""Quantised networks under adapters, against copies whose weights are the stored numbers in float32."""

import importlib.util
import json
import re
import shutil
from pathlib import Path

import diffusers
import dmdr_models
import numpy as np
import pytest
import torch
from dmdr_models import registry
from dmdr_models.base.reasons import reason
from dmdr_models.folder.contents import describe
from dmdr_models.folder.fingerprints import network_fingerprint
from dmdr_models.folder.quantisation import BYTES_PER_WEIGHT, LIBRARIES
from dmdr_models.generate import main
from dmdr_models.networks.lora import LoRANetwork
from dmdr_models.networks.quantised import quantise
from PIL import Image
from torch import Tensor, nn

KINDS = [kind for kind, library in LIBRARIES.items() if importlib.util.find_spec(library)]
"""torchao is in the environment of the tests; NF4 is tested wherever bitsandbytes is installed, too."""
ERROR = {"nf4": 0.16, "int8": 1 / 250, "fp8": 1 / 27}
"""The largest change of a weight, as a share of the largest weight beside which it is scaled."""


def stored(weight: nn.Parameter) -> Tensor:
    """The numbers that a quantised weight stands for."""
    if hasattr(weight, "qdata"):
        return weight.qdata.float() * weight.scale.float()
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(weight.data, weight.quant_state).float()


def linear_layers(network: nn.Module) -> dict[str, nn.Linear]:
    return {name: layer for name, layer in network.named_modules() if isinstance(layer, nn.Linear)}


@pytest.fixture(params=KINDS)
def kind(request) -> str:
    return request.param


@pytest.fixture
def pair(sd3, kind):
    """A quantised tiny SD3, and the same network in float32 with the numbers that it stores."""
    quantised, plain = sd3.load_network(), sd3.load_network().requires_grad_(False)
    quantise(quantised, kind)
    for name, layer in linear_layers(quantised).items():
        copy = plain.get_submodule(name)
        change = (stored(layer.weight) - copy.weight).abs()
        largest = copy.weight.abs().amax() if kind == "nf4" else copy.weight.abs().amax(dim=1, keepdim=True)
        if kind != "nf4" or layer.in_features % 64 == 0:  # on a CPU, bitsandbytes rounds shorter rows worse
            assert (change <= ERROR[kind] * largest).all()
        assert change.any()
        copy.weight.copy_(stored(layer.weight))
    return quantised, plain


def asked(family, network, **named) -> tuple[Tensor, Tensor]:
    """A prediction, and its input, which has a gradient."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(2, *family.latent_shape(*family.size), generator=generator).requires_grad_()
    condition = {name: value.clone() for name, value in family.condition(["a fox", "a dog"]).items()}
    return family.predict(network, x, torch.tensor([0.3, 0.8]), condition, **named), x


def test_predictions_and_gradients_are_those_of_the_stored_weights(sd3, pair):
    found = []
    for network in pair:
        lora = LoRANetwork(network, 4, 4, sd3.lora_targets, torch.Generator().manual_seed(0))
        with torch.no_grad():
            for name, parameter in lora.named_parameters():
                if ".lora_B." in name:
                    parameter.copy_(torch.linspace(-0.1, 0.1, parameter.numel()).view_as(parameter))
        prediction, x = asked(sd3, lora)
        prediction.square().mean().backward()
        trained = {name: p.grad for name, p in lora.named_parameters() if p.requires_grad}
        found.append({"prediction": prediction, "x": x.grad, **trained})
    quantised, plain = found
    assert quantised.keys() == plain.keys()
    reached = [name for name, tensor in plain.items() if tensor.any()]
    assert len(reached) > 0.9 * len(plain)  # of the last block, the texts' queries have no effect
    for name, expected in plain.items():
        torch.testing.assert_close(quantised[name], expected, atol=1e-5 * expected.abs().max().item(), rtol=1e-4)


def kept(family, network) -> int:
    """The bytes that wait for the backward pass of a prediction, without the network's own weights."""

    def storage(tensor: Tensor) -> torch.UntypedStorage:
        return getattr(tensor, "qdata", tensor).untyped_storage()

    own = {storage(parameter).data_ptr() for parameter in network.parameters()}
    found = {}

    def pack(tensor: Tensor) -> Tensor:
        found[storage(tensor).data_ptr()] = storage(tensor).nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        prediction, _ = asked(family, network)  # its graph keeps the tensors, so that no address is used again
    del prediction
    return sum(size for place, size in found.items() if place not in own)


def test_no_dequantised_weights_wait_for_the_backward_pass(sd3, pair):
    quantised, plain = (kept(sd3, network) for network in pair)
    assert 0 < quantised <= plain


def test_compiled_layers_have_the_same_gradients(kind):
    layers = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64, bias=False))
    quantise(layers, kind)
    found = []
    for network in (layers, torch.compile(layers, backend="aot_eager")):
        x = torch.linspace(-1, 1, 128).view(2, 64).requires_grad_()
        y = network(x)
        y.square().mean().backward()
        found.append((y.detach(), x.grad))
    for eager, compiled in zip(*found, strict=True):
        torch.testing.assert_close(compiled, eager)


def test_at_scale_zero_it_is_the_quantised_network_bit_for_bit(sd3, pair):
    network, _ = pair
    before = asked(sd3, network)[0].detach()
    lora = LoRANetwork(network, 4, 4, sd3.lora_targets, torch.Generator().manual_seed(0))
    for name, parameter in lora.named_parameters():
        if ".lora_B." in name:
            nn.init.normal_(parameter, std=0.3)
    assert torch.equal(asked(sd3, lora, lora_scale=0.0)[0], before)
    assert not torch.equal(asked(sd3, lora)[0], before)


def test_bytes_per_weight(kind):
    layer = nn.Sequential(nn.Linear(256, 256, bias=False))
    quantise(layer, kind)
    weight = layer[0].weight
    if kind == "nf4":
        state = weight.quant_state
        found = weight.nbytes + state.absmax.nbytes + state.state2.absmax.nbytes
    else:
        found = weight.qdata.nbytes
    assert found / 256**2 == BYTES_PER_WEIGHT[kind]


def test_init_output_gaussian_needs_plain_weights(sd3, pair):
    network, _ = pair
    with pytest.raises(ValueError, match="quantised weights, which init output_gaussian cannot use; use gaussian"):
        LoRANetwork(network, 4, 4, sd3.lora_targets, torch.Generator().manual_seed(0), init="output_gaussian")


@pytest.fixture
def folder(sd3_model, tmp_path) -> Path:
    """The tiny SD3 with a transformer that diffusers quantised and wrote."""
    from torchao.quantization import Int8WeightOnlyConfig

    folder = shutil.copytree(sd3_model, tmp_path / "int8", ignore=shutil.ignore_patterns("transformer"))
    settings = {"quantization_config": diffusers.TorchAoConfig(Int8WeightOnlyConfig())}
    network = diffusers.SD3Transformer2DModel.from_pretrained(sd3_model, subfolder="transformer", **settings)
    network.save_pretrained(folder / "transformer")
    return folder


def test_a_quantised_folder_is_read(sd3, sd3_model, folder):
    layout = registry.find("sd3")
    found, plain = describe(layout, folder, quantised=True), describe(layout, sd3_model)
    assert (found.quantised, plain.quantised) == ("torchao", None)
    assert set(found.layers) == set(plain.layers)
    assert network_fingerprint(layout, folder) != network_fingerprint(layout, sd3_model)
    quantised = sd3.load_network().to(torch.bfloat16)
    quantise(quantised, "int8")
    family = dmdr_models.load("sd3", folder, dtype=torch.bfloat16)
    assert torch.equal(asked(family, family.load_network())[0], asked(family, quantised)[0])
    assert kept(family, family.load_network()) == kept(family, quantised)
    whole = dmdr_models.load("sd3", folder)
    torch.testing.assert_close(asked(whole, whole.load_network())[0], asked(family, quantised)[0], atol=0.05, rtol=0.05)


def test_a_student_is_drawn_on_a_quantised_folder(sd3, folder, adapter, tmp_path):
    sd3.students.save_lora(adapter, tmp_path / "student")
    common = ["--model", str(folder), "a fox", "--steps", "1", "--times", "stock", "-o"]
    main([*common, str(tmp_path / "teacher.png")])
    main([*common, str(tmp_path / "student.png"), "--adapter", str(tmp_path / "student")])
    teacher, student = (np.asarray(Image.open(tmp_path / f"{name}.png")) for name in ("teacher", "student"))
    assert (teacher != student).any()


def declare(part: Path, method: str) -> None:
    config = json.loads((part / "config.json").read_text())
    (part / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": method}}))


@pytest.mark.parametrize(
    ("method", "line"),
    [
        ("gguf", r"quantised \(gguf\), which is not supported: give the folder of the weights before quantisation"),
        ("torchao", r"quantised \(torchao\), and torchao is not installed: pip install dmdr-models\[torchao\], or"),
        ("bitsandbytes", r"quantised \(bitsandbytes\), and bitsandbytes is not installed: pip install dmdr-models\[b"),
    ],
)
def test_a_folder_that_cannot_be_read_is_refused(sd3_model, tmp_path, monkeypatch, capsys, method, line):
    folder = shutil.copytree(sd3_model, tmp_path / "model")
    declare(folder / "transformer", method)
    monkeypatch.setattr("dmdr_models.folder.quantisation.importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=line):
        describe(registry.find("sd3"), folder, quantised=True)
    with pytest.raises(ValueError, match=line):
        dmdr_models.load("sd3", folder)
    with pytest.raises(SystemExit) as end:
        main(["--model", str(folder), "a fox", "-o", str(tmp_path / "a.png")])
    assert end.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("error", [RuntimeError("No GPU found. A GPU is needed."), KeyError("group_size")])
def test_what_a_library_says_of_quantised_weights_is_one_line(sd3_model, tmp_path, monkeypatch, error):
    folder = shutil.copytree(sd3_model, tmp_path / "model")
    declare(folder / "transformer", "torchao")
    monkeypatch.setattr("dmdr_models.folder.quantisation.importlib.util.find_spec", lambda name: name)
    family = dmdr_models.load("sd3", folder)

    def refuse(*place: str, **options: object) -> None:
        raise error

    monkeypatch.setattr(diffusers.SD3Transformer2DModel, "from_pretrained", refuse)
    said = re.escape(f"has quantised weights (torchao) that cannot be read here: {reason(error)}; give the folder")
    with pytest.raises(ValueError, match=said):
        family.load_network()


def test_other_parts_and_other_weights_stay_plain(sd3, sd3_model, tmp_path):
    folder = shutil.copytree(sd3_model, tmp_path / "model")
    declare(folder / "text_encoder_3", "torchao")
    with pytest.raises(ValueError, match=r"quantised \(torchao\), which is not supported here"):
        describe(registry.find("sd3"), folder, quantised=True)
    declare(folder / "transformer", "torchao")
    with pytest.raises(ValueError, match=r"quantised \(torchao\), which is not supported here"):
        sd3.load_network(folder)
