"""The files for programs that read the authors' layouts: a LoRA as kohya's, a whole network as an original checkpoint.

The peers are diffusers' own readers of these layouts, `from_single_file` and the LoRA loader of SDXL's pipeline.
"""

import json
from pathlib import Path

import dmdr_models
import pytest
import torch
from diffusers import SD3Transformer2DModel, UNet2DConditionModel
from dmdr_models import tiny
from dmdr_models.base.errors import ModelsError
from dmdr_models.folder.adapter_files import adapter_ranks
from dmdr_models.networks.applied_loras import fold_loras
from dmdr_models.networks.lora import LoRANetwork, layer_names
from safetensors.torch import load_file, save_file
from torch import nn

KINDS = {
    "sd3": ("sd3", {}),
    "sd35-large": ("sd3", {"qk_norm": "rms_norm"}),
    "sd35-medium": ("sd3", {"qk_norm": "rms_norm", "dual_attention_layers": (0,)}),
    "sdxl": ("sdxl", {"transformer_layers": (1, 2)}),
}


@pytest.fixture(scope="module", params=KINDS)
def kind(request, tmp_path_factory):
    """A folder of each kind of network."""
    name, sizes = KINDS[request.param]
    return name, getattr(tiny, name)(tmp_path_factory.mktemp("model") / request.param, **sizes)


@pytest.fixture(scope="module", params=[name for name, (family, _) in KINDS.items() if family == "sd3"])
def sd3_kind(request, tmp_path_factory):
    return tiny.sd3(tmp_path_factory.mktemp("model") / request.param, **KINDS[request.param][1])


def trained(family, targets=None) -> LoRANetwork:
    """A LoRA as after some training, with an alpha that is not its rank."""
    generator, network = torch.Generator().manual_seed(5), family.load_network()
    lora = LoRANetwork(network, 4, 6, targets or layer_names(network), generator)
    for name, parameter in lora.named_parameters():
        if ".lora_B." in name:
            nn.init.normal_(parameter, std=0.1, generator=generator)
    return lora


def opened(family, model: Path, file: Path) -> nn.Module:
    """The network in an original checkpoint, as diffusers reads it."""
    reader, part = family.network_class, family.layout.network_part
    assert reader in (SD3Transformer2DModel, UNet2DConditionModel)
    return reader.from_single_file(str(file), config=str(model), subfolder=part, local_files_only=True)


def merged_by_hand(state: dict, lora: dict) -> dict:
    """W + alpha / rank · up · down for each layer, found by its name alone, as programs do that know no family."""
    names = {f"lora_unet_{name[len('model.diffusion_model.') :].replace('.', '_')}": name for name in state}
    found = {name.split(".")[0] for name in lora}
    for layer in found:
        down, up, alpha = (lora.pop(f"{layer}.{key}") for key in ("lora_down.weight", "lora_up.weight", "alpha"))
        name = names[f"{layer}_weight"]
        added = up.flatten(1) @ down.flatten(1) * alpha / len(down)
        state[name] = state[name] + added.view_as(state[name])
    assert not lora
    return state


def test_a_whole_student_is_read_back(kind, tmp_path):
    name, folder = kind
    family = dmdr_models.load(name, folder)
    network = tiny.randomise(family.load_network(), seed=9)
    family.students.save_original(network, tmp_path / "student.safetensors")
    assert all(key.startswith("model.diffusion_model.") for key in load_file(tmp_path / "student.safetensors"))
    found, expected = opened(family, folder, tmp_path / "student.safetensors").state_dict(), network.state_dict()
    assert found.keys() == expected.keys()
    assert [key for key in expected if not torch.equal(found[key], expected[key])] == []


def test_a_lora_on_every_layer_is_found_by_its_names(kind, tmp_path):
    name, folder = kind
    family = dmdr_models.load(name, folder)
    lora = trained(family)
    family.students.save_lora(lora, tmp_path)
    family.students.save_original(family.load_network(), tmp_path / "base.safetensors")
    state = merged_by_hand(load_file(tmp_path / "base.safetensors"), load_file(tmp_path / "kohya_lora.safetensors"))
    save_file(state, tmp_path / "merged.safetensors")
    found, expected = opened(family, folder, tmp_path / "merged.safetensors").state_dict(), lora.merged().state_dict()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, atol=1e-5, rtol=1e-5, msg=key)


def test_sd3s_lora_in_kohyas_layout_is_read_back(sd3_kind, tmp_path):
    """Each part of a split layer gets its own A and B again, bit for bit."""
    family = dmdr_models.load("sd3", sd3_kind)
    lora = trained(family)
    family.students.save_lora(lora, tmp_path)
    assert adapter_ranks(tmp_path / "kohya_lora.safetensors") == {4}
    found = family.read_lora(tmp_path / "kohya_lora.safetensors").changes
    expected = family.read_lora(tmp_path / "adapter_model.safetensors").changes
    assert found.keys() == expected.keys()
    for layer, (a, b, scale) in expected.items():
        assert torch.equal(found[layer].a, a), layer
        assert torch.equal(found[layer].b, b), layer
        assert found[layer].scale == scale == 1


def test_one_adapter_for_query_key_and_value(sd3_kind, tmp_path):
    """A LoRA as sd-scripts trains it: added to the weights of the original network, or to those of diffusers'."""
    family = dmdr_models.load("sd3", sd3_kind)
    family.students.save_lora(trained(family), tmp_path)
    generator = torch.Generator().manual_seed(3)
    style = {
        name: torch.tensor(3.0) if name.endswith("alpha") else torch.randn(tensor.shape, generator=generator) / 8
        for name, tensor in load_file(tmp_path / "kohya_lora.safetensors").items()
    }
    save_file(style, tmp_path / "style.safetensors")
    family.students.save_original(family.load_network(), tmp_path / "base.safetensors")
    save_file(merged_by_hand(load_file(tmp_path / "base.safetensors"), style), tmp_path / "merged.safetensors")
    expected = opened(family, sd3_kind, tmp_path / "merged.safetensors").state_dict()
    network = family.load_network()
    plain = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    fold_loras(network, [(family.read_lora(tmp_path / "style.safetensors"), 1.0)])
    for key, value in network.state_dict().items():
        torch.testing.assert_close(value, expected[key], atol=1e-5, rtol=1e-5, msg=key)
        assert not key.endswith("weight") or not torch.equal(value, plain[key]) or ".norm_" in key, key


def test_a_lora_on_some_of_a_split_layer(sd3, tmp_path):
    lora = trained(sd3, ["to_v", "add_q_proj"])
    sd3.students.save_lora(lora, tmp_path)
    state = load_file(tmp_path / "kohya_lora.safetensors")
    up = state["lora_unet_joint_blocks_0_x_block_attn_qkv.lora_up.weight"]
    assert up.shape == (96, 4)
    assert (up[:64] == 0).all()
    expected = lora.adapter_state()["transformer_blocks.0.attn.to_v.lora_B.weight"] * 1.5
    torch.testing.assert_close(up[64:], expected)
    adapted = {layer.rpartition(".")[2] for layer in sd3.read_lora(tmp_path / "kohya_lora.safetensors").changes}
    assert adapted == {"to_v", "add_q_proj"}
    assert (state["lora_unet_joint_blocks_1_context_block_attn_qkv.lora_up.weight"][32:] == 0).all()


def test_the_names(sdxl, sd3, tmp_path):
    """Those that kohya's sd-scripts give the layers of its own networks."""
    for family in (sdxl, sd3):
        family.students.save_lora(trained(family), tmp_path / family.layout.name)
    found = {name: set(load_file(tmp_path / name / "kohya_lora.safetensors")) for name in ("sdxl", "sd3")}
    for layer in (
        "input_blocks_0_0", "input_blocks_1_0_in_layers_2", "input_blocks_2_0_op", "input_blocks_3_0_skip_connection",
        "input_blocks_3_1_transformer_blocks_0_attn1_to_q", "middle_block_0_emb_layers_1", "middle_block_1_proj_in",
        "middle_block_1_transformer_blocks_0_ff_net_0_proj", "middle_block_2_out_layers_3", "output_blocks_1_2_conv",
        "output_blocks_1_1_transformer_blocks_0_attn2_to_out_0", "time_embed_0", "label_emb_0_2", "out_2",
    ):  # fmt: skip
        assert {f"lora_unet_{layer}.{end}" for end in ("lora_down.weight", "lora_up.weight", "alpha")} <= found["sdxl"]
    for layer in (
        "x_embedder_proj", "context_embedder", "t_embedder_mlp_0", "y_embedder_mlp_2", "final_layer_linear",
        "final_layer_adaLN_modulation_1", "joint_blocks_0_x_block_attn_qkv", "joint_blocks_0_x_block_attn_proj",
        "joint_blocks_0_context_block_attn_proj", "joint_blocks_1_context_block_attn_qkv",
        "joint_blocks_1_x_block_mlp_fc1", "joint_blocks_0_context_block_mlp_fc2",
    ):  # fmt: skip
        assert {f"lora_unet_{layer}.{end}" for end in ("lora_down.weight", "lora_up.weight", "alpha")} <= found["sd3"]


def test_sdxls_pipeline_reads_kohyas_layout(sdxl, xl_pipeline, tmp_path):
    lora = trained(sdxl, sdxl.lora_targets)
    sdxl.students.save_lora(lora, tmp_path)
    x = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(2))
    t, condition = torch.tensor([999, 399]), sdxl.condition(["a red circle", "a blue square"])
    with torch.no_grad():
        expected = sdxl.predict(lora, x, t, condition)
        xl_pipeline.load_lora_weights(tmp_path, weight_name="kohya_lora.safetensors")
        torch.testing.assert_close(sdxl.predict(xl_pipeline.unet, x, t, condition), expected, atol=1e-5, rtol=0)


def test_alpha_is_the_rank_in_every_file(sdxl, tmp_path):
    """A program that knows nothing of alpha draws the student at its full strength."""
    lora = trained(sdxl, ["to_q"])
    sdxl.students.save_lora(lora, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["lora_alpha"] == 4
    own = next(value for name, value in lora.adapter_state().items() if ".lora_B." in name) * 6 / 4
    for file in ("adapter_model", "pytorch_lora_weights", "kohya_lora"):
        found = load_file(tmp_path / f"{file}.safetensors")
        assert any(value.shape == own.shape and torch.allclose(value, own) for value in found.values()), file
        assert all(found[name] == 4 for name in found if name.endswith(".alpha"))


def test_a_family_with_no_other_layout_says_so(family, tmp_path):
    assert not family.students.has_original
    with pytest.raises(ModelsError, match=r"^the family sit has no layout but diffusers': use `save`"):
        family.students.save_original(family.load_network(), tmp_path / "student.safetensors")
