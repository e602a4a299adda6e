"""LoRAs of others: PEFT's, diffusers' and kohya's layouts, drawn as diffusers and PEFT draw them, and folded."""

import json
import re
import shutil
from pathlib import Path

import diffusers
import dmdr_models
import numpy as np
import pytest
import torch
from dmdr_models.generate import main
from dmdr_models.networks.applied_loras import fold_loras
from dmdr_models.networks.lora import LoRANetwork
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from safetensors.torch import load_file, save_file
from same_picture import same_picture

SD3, SDXL = diffusers.StableDiffusion3Pipeline, diffusers.StableDiffusionXLPipeline
PIPELINES = {"sd3": SD3, "sdxl": SDXL}
NETWORKS = {"sd3": "transformer", "sdxl": "unet"}


@pytest.fixture(params=["sd3", "sdxl"])
def family(request) -> str:
    return request.param


@pytest.fixture
def models(sd3_model, sdxl_model) -> dict[str, Path]:
    return {"sd3": sd3_model, "sdxl": sdxl_model}


def trained(family, rank: int = 3, alpha: float = 6, seed: int = 0) -> LoRANetwork:
    generator = torch.Generator().manual_seed(seed)
    lora = LoRANetwork(family.load_network(), rank, alpha, family.lora_targets, generator)
    for name, parameter in lora.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=0.2, generator=generator)
    return lora


def opened(family: str, folder: Path):
    pipeline = PIPELINES[family].from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def by_stock(family: str, pipeline) -> np.ndarray:
    call = {"max_sequence_length": 128} if family == "sd3" else {}
    generator = torch.Generator().manual_seed(0)
    return np.asarray(pipeline("a fox", num_inference_steps=2, guidance_scale=0, generator=generator, **call).images[0])


def drawn(folder: Path, out: Path, *adapters: object) -> np.ndarray:
    given = [option for adapter in adapters for option in ("--adapter", str(adapter))]
    method = ["--steps", "2", "--times", "stock", "--method", "euler"]
    main(["--model", str(folder), "a fox", *method, *given, "-o", str(out)])
    return np.asarray(Image.open(out))


RESNETS = {
    "conv1": "in_layers_2", "conv2": "out_layers_3", "time_emb_proj": "emb_layers_1",
    "conv_shortcut": "skip_connection",
}  # fmt: skip
OUTER = {
    "time_embedding.linear_1": "time_embed_0", "time_embedding.linear_2": "time_embed_2",
    "add_embedding.linear_1": "label_emb_0_0", "add_embedding.linear_2": "label_emb_0_2",
    "mid_block.resnets.0": "middle_block_0", "mid_block.attentions.0": "middle_block_1",
    "mid_block.resnets.1": "middle_block_2",
    "down_blocks.0.downsamplers.0.conv": "input_blocks_2_0_op",
    "up_blocks.0.upsamplers.0.conv": "output_blocks_1_2_conv",
}  # fmt: skip


def kohyas_name(layer: str) -> str:
    """The name of a layer of the tiny UNet, which has one resnet per block, in the files of kohya's trainer.

    The trainer knows the original network of SDXL, in which all blocks are counted through.
    """
    if match := re.fullmatch(r"(down|up)_blocks\.(\d)\.(resnets|attentions)\.(\d)\.(.*)", layer):
        side, block, kind, index, inner = match.groups()
        number = 2 * int(block) + int(index) + (side == "down")
        outer = f"{'input' if side == 'down' else 'output'}_blocks_{number}_{int(kind == 'attentions')}"
    else:
        known = next(name for name in OUTER if layer == name or layer.startswith(f"{name}."))
        outer, inner = OUTER[known], layer.removeprefix(known).removeprefix(".")
    inner = RESNETS.get(inner, inner.replace(".", "_"))
    return f"lora_unet_{outer}_{inner}".rstrip("_")


def save_kohya(lora: LoRANetwork, file: Path, alphas: dict[str, float] | None = None) -> None:
    state = {}
    for name, tensor in lora.adapter_state().items():
        layer, _, kind = name.removesuffix(".weight").rpartition(".")
        side = {"lora_A": "lora_down", "lora_B": "lora_up"}[kind]
        state[f"{kohyas_name(layer)}.{side}.weight"] = tensor.contiguous().clone()
        state[f"{kohyas_name(layer)}.alpha"] = torch.tensor((alphas or {}).get(layer, float(lora.alpha)))
    save_file(state, file)


def test_each_layout_is_drawn_as_its_library_draws_it(family, models, tmp_path):
    opening = dmdr_models.load(family, models[family])
    opening.students.save_lora(trained(opening), tmp_path / "both")
    (tmp_path / "file").mkdir()
    file = shutil.copy(tmp_path / "both/pytorch_lora_weights.safetensors", tmp_path / "file/style.safetensors")
    peft, stock = opened(family, models[family]), opened(family, models[family])
    setattr(peft, NETWORKS[family], PeftModel.from_pretrained(getattr(peft, NETWORKS[family]), tmp_path / "both"))
    stock.load_lora_weights(tmp_path / "both", weight_name="pytorch_lora_weights.safetensors")
    expected = by_stock(family, stock)
    assert same_picture(by_stock(family, peft), expected)
    assert (expected != drawn(models[family], tmp_path / "a.png")).mean() > 0.5
    for place in (tmp_path / "both", tmp_path / "file", file, tmp_path / "both/adapter_model.safetensors"):
        assert same_picture(drawn(models[family], tmp_path / "a.png", place), expected), place


def test_several_at_a_strength(family, models, tmp_path):
    opening = dmdr_models.load(family, models[family])
    for seed in (0, 1):
        opening.students.save_lora(trained(opening, rank=2 + seed, seed=seed), tmp_path / f"{seed}")
    stock = opened(family, models[family])
    for seed in (0, 1):
        file = "pytorch_lora_weights.safetensors"
        stock.load_lora_weights(tmp_path / f"{seed}", weight_name=file, adapter_name=f"a{seed}")
    stock.set_adapters(["a0", "a1"], [0.5, -0.25])
    found = drawn(models[family], tmp_path / "a.png", f"{tmp_path / '0'}=0.5", f"{tmp_path / '1'}=-0.25")
    assert same_picture(found, by_stock(family, stock))


def test_kohyas_layout(models, sdxl, tmp_path):
    lora = trained(sdxl)
    save_kohya(lora, tmp_path / "style.safetensors")
    sdxl.students.save_lora(lora, tmp_path / "peft")
    found = drawn(models["sdxl"], tmp_path / "a.png", tmp_path / "style.safetensors")
    assert same_picture(found, drawn(models["sdxl"], tmp_path / "b.png", tmp_path / "peft"))


def test_every_layer_keeps_its_own_alpha(sdxl, tmp_path):
    lora = trained(sdxl)
    state = lora.adapter_state()
    layers = [name.removesuffix(".lora_A.weight") for name in state if ".lora_A." in name]
    alphas = {layer: 1.0 + index for index, layer in enumerate(layers)}
    save_kohya(lora, tmp_path / "style.safetensors", alphas)
    found = sdxl.read_lora(tmp_path / "style.safetensors").changes
    assert {layer: change.scale for layer, change in found.items()} == {k: v / 3 for k, v in alphas.items()}
    for layer, (a, b, _) in found.items():
        assert torch.equal(a, state[f"{layer}.lora_A.weight"])
        assert torch.equal(b, state[f"{layer}.lora_B.weight"])


def test_pefts_patterns(sd3, tmp_path):
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["to_q", "to_k"], rank_pattern={"to_k": 2})
    config.alpha_pattern, config.use_rslora = {"transformer_blocks.0.attn.to_q": 3}, True
    network = get_peft_model(sd3.load_network(), config)
    network.save_pretrained(tmp_path / "lora")
    found = sd3.read_lora(tmp_path / "lora").changes
    assert found.keys() == {f"transformer_blocks.{i}.attn.to_{kind}" for i in (0, 1) for kind in "qk"}
    for layer, change in found.items():
        theirs = network.base_model.model.get_submodule(layer)
        assert change.scale == pytest.approx(theirs.scaling["default"])
        assert change.rank == theirs.r["default"]


def test_folding_is_adding_the_products(family, models, tmp_path):
    opening = dmdr_models.load(family, models[family])
    lora = trained(opening)
    opening.students.save_lora(lora, tmp_path / "lora")
    network, plain = opening.load_network(), opening.load_network().state_dict()
    names = set(network.state_dict())
    fold_loras(network, [(opening.read_lora(tmp_path / "lora"), 0.5)])
    assert set(network.state_dict()) == names, "the network looks as before"
    state = lora.adapter_state()
    for name, tensor in network.state_dict().items():
        layer = name.removesuffix(".weight")
        expected = plain[name]
        if f"{layer}.lora_A.weight" in state:
            a, b = state[f"{layer}.lora_A.weight"], state[f"{layer}.lora_B.weight"]
            expected = expected + 0.5 * 6 / 3 * torch.einsum("or,r...->o...", b.flatten(1), a)
            assert not torch.equal(expected, plain[name])
        torch.testing.assert_close(tensor, expected, rtol=1e-5, atol=1e-6)
    assert LoRANetwork(network, 2, 2, opening.lora_targets), "and can be adapted"


def changed(change):
    def spoil(folder: Path) -> Path:
        file = folder / "style.safetensors"
        state = change(load_file(file))
        save_file(state, file)
        return file

    return spoil


def named(**names: str):
    return changed(lambda state: {**state, **{new: torch.zeros(3, 3) for new in names.values()}})


MISTAKES = {
    "text encoder": (
        named(a="lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight",
              b="lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_up.weight"),
        "also adapts text encoders, with 2 tensors such as lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_",
    ),
    "text encoder in diffusers' layout": (
        named(a="text_encoder_2.text_model.encoder.layers.0.mlp.fc1.lora_A.weight"),
        "save the file without the tensors whose names begin with text_encoder or lora_te",
    ),
    "alpha": (changed(lambda state: {name: tensor.repeat(2) if name.endswith("alpha") else tensor
                                     for name, tensor in state.items()}), ".alpha of shape (2,), which is no single"),
    "dora": (named(a="lora_unet_middle_block_0_in_layers_2.dora_scale"), "middle_block_0_in_layers_2.dora_scale"),
    "lone": (named(a="lora_unet_conv_in.lora_down.weight"), "layout that diffusers cannot convert: "),
    "loha": (named(a="lora_unet_conv_in.hada_w1_a"), "lora_unet_conv_in.hada_w1_a"),
    "unknown layer": (
        named(a="lora_unet_input_blocks_7_0_x.lora_down.weight", b="lora_unet_input_blocks_7_0_x.lora_up.weight"),
        "adapts down_blocks.3.resnets.0.x, which the network does not have",
    ),
    "shape": (
        changed(lambda state: {name: tensor[:, :5].contiguous() if "lora_down" in name else tensor
                               for name, tensor in state.items()}),
        "with shape (",
    ),
    "damaged": (lambda folder: (folder / "style.safetensors").write_bytes(b"x" * 99), "is not an adapter"),
    "a network": (changed(lambda state: {"conv_in.weight": torch.zeros(1)}), "adapts no layer"),
}  # fmt: skip


@pytest.mark.parametrize("fault", MISTAKES)
def test_what_is_refused(models, sdxl, tmp_path, capsys, fault):
    change, line = MISTAKES[fault]
    save_kohya(trained(sdxl), tmp_path / "style.safetensors")
    change(tmp_path)
    with pytest.raises(SystemExit) as end:
        drawn(models["sdxl"], tmp_path / "a.png", f"{tmp_path / 'style.safetensors'}=0.5")
    assert end.value.code == 2
    [shown] = [text for text in capsys.readouterr().err.splitlines() if text.startswith("dmdr-generate: ")]
    assert shown.startswith(f"dmdr-generate: --adapter {tmp_path / 'style.safetensors'}: ")
    assert line in shown


@pytest.mark.parametrize(
    ("entries", "line"),
    [
        ({"lora_alpha": None}, "has a lora_alpha or an alpha_pattern that cannot be read: "),
        ({"lora_alpha": "six"}, "has a lora_alpha or an alpha_pattern that cannot be read: "),
        ({"lora_alpha": float("inf")}, "with numbers that are not finite: give another LoRA"),
        ({"alpha_pattern": ["to_q"]}, "has a lora_alpha or an alpha_pattern that cannot be read: "),
        ({"alpha_pattern": {"(": 4}}, "has a lora_alpha or an alpha_pattern that cannot be read: missing \\)"),
    ],
)
def test_an_alpha_that_is_no_number_is_refused(sd3, tmp_path, entries, line):
    sd3.students.save_lora(trained(sd3), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, **entries}))
    with pytest.raises(ValueError, match=line):
        sd3.read_lora(tmp_path)


QKV = "lora_unet_joint_blocks_0_x_block_attn_qkv"


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({f"{QKV}.lora_up.weight": None}, f"holds {QKV}.alpha, which has no place in the transformer"),
        ({f"{QKV}.lora_up.weight": torch.zeros(96, 5)}, rf"{QKV} has lora_down of shape .* and lora_up of \(96, 5\)"),
        ({f"{QKV}.lora_up.weight": torch.zeros(97, 9)}, rf"{QKV} has lora_down of shape .* and lora_up of \(97, 9\)"),
        ({f"{QKV}.alpha": torch.zeros(2)}, rf"{QKV}.alpha of shape \(2,\), which is no single number"),
        ({f"{QKV}.lora_down.weight": torch.zeros(0, 32)}, rf"{QKV}.lora_down.weight of shape \(0, 32\), which is no m"),
        ({f"{QKV}.lora_down.weight": torch.tensor(1.0)}, rf"{QKV}.lora_down.weight of shape \(\), which is no matrix"),
        ({f"{QKV}.dora_scale": torch.zeros(2, 1)}, f"holds {QKV}.dora_scale, which has no place"),
        ({"lora_unet_joint_blocks_7_x_block_attn_proj.alpha": torch.zeros(1)}, "holds lora_unet_joint_blocks_7_x_"),
        (
            {f"{QKV}.alpha": torch.tensor(float("nan"))},
            r"attn.to_. with numbers that are not finite: give another LoRA",
        ),
    ],
)
def test_what_is_refused_of_sd3_in_kohyas_layout(sd3, tmp_path, change, line):
    sd3.students.save_lora(trained(sd3), tmp_path)
    state = load_file(tmp_path / "kohya_lora.safetensors") | change
    save_file({name: tensor for name, tensor in state.items() if tensor is not None}, tmp_path / "style.safetensors")
    with pytest.raises(ValueError, match=line):
        sd3.read_lora(tmp_path / "style.safetensors")


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["a=x"], "--adapter a=x: 'x' is not a finite number: give PLACE=0.8"),
        (["a=nan"], "--adapter a=nan: 'nan' is not a finite number"),
        (["none=0.5"], "--adapter none: no folder none, nor such a file"),
        (["two"], "two holds a.safetensors and b.safetensors: give the file instead of the folder"),
        (["pickle"], "pickle.bin is a pickle, which is not read"),
        (["dora"], "dora is a DoRA, which is not supported: give a LoRA"),
        (["pissa"], "pissa was started by pissa_niter_4, which changes the base"),
        (["s1", "s2"], "--adapter s1 and --adapter s2 both hold a dmdr.json"),
    ],
)
def test_mistakes_on_the_command_line(models, tmp_path, monkeypatch, capsys, options, line):
    monkeypatch.chdir(tmp_path)
    for name in ("two/a.safetensors", "two/b.safetensors", "pickle/pickle.bin"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).touch()
    for name, config in {"dora": {"use_dora": True}, "pissa": {"init_lora_weights": "pissa_niter_4"}}.items():
        Path(name).mkdir()
        Path(name, "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", **config}))
        Path(name, "adapter_model.safetensors").touch()
    for name in ("s1", "s2"):
        Path(name).mkdir()
        Path(name, "dmdr.json").write_text("{}")
    with pytest.raises(SystemExit) as end:
        drawn(models["sd3"], tmp_path / "a.png", *options)
    assert end.value.code == 2
    shown = capsys.readouterr().err
    assert line in shown
    assert shown.count("\n") == 1
