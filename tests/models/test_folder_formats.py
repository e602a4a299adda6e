"""Model folders as people have them: variants, shards, a missing T5; and what is refused, in one line."""

import json
import re
import shutil
from pathlib import Path

import diffusers
import dmdr_models
import numpy as np
import pytest
import torch
from dmdr_models import registry, unpack
from dmdr_models.folder.checks import check_weights
from dmdr_models.folder.contents import describe
from dmdr_models.folder.fingerprints import network_fingerprint, text_fingerprint
from dmdr_models.folder.weight_files import weight_files
from dmdr_models.generate import main
from PIL import Image
from safetensors.torch import save_file
from same_picture import same_picture

PIPELINES = {"sd3": "StableDiffusion3Pipeline", "sdxl": "StableDiffusionXLPipeline"}
NETWORKS = {"sd3": "transformer", "sdxl": "unet"}
FORMATS = {
    "variant": {"variant": "fp16"},
    "shards": {"max_shard_size": "60KB"},
    "shards of a variant": {"variant": "fp16", "max_shard_size": "60KB"},
}


@pytest.fixture(params=["sd3", "sdxl"])
def family(request) -> str:
    return request.param


@pytest.fixture
def model(family, sd3_model, sdxl_model) -> Path:
    return {"sd3": sd3_model, "sdxl": sdxl_model}[family]


def opened(family: str, folder: Path, **options):
    pipeline = getattr(diffusers, PIPELINES[family]).from_pretrained(folder, **options)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def drawn(folder: Path, out: Path, *options: str) -> np.ndarray:
    main(["--model", str(folder), "a fox", "--steps", "2", "--times", "stock", *options, "-o", str(out)])
    return np.asarray(Image.open(out))


def by_stock(family: str, pipeline) -> np.ndarray:
    call = {"max_sequence_length": 128} if family == "sd3" else {}
    generator = torch.Generator().manual_seed(0)
    return np.asarray(pipeline("a fox", num_inference_steps=2, guidance_scale=0, generator=generator, **call).images[0])


@pytest.mark.parametrize("form", FORMATS)
def test_each_format_is_drawn_as_the_pipeline_draws_it(family, model, tmp_path, form):
    pipeline = opened(family, model).to(dtype=torch.float16)
    pipeline.save_pretrained(tmp_path / "model", **FORMATS[form])
    names = [file.name for file in (tmp_path / "model" / NETWORKS[family]).glob("*.safetensors")]
    assert all("fp16" in name for name in names) == ("variant" in form)
    assert (len(names) > 1) == ("shards" in form)
    stock = opened(family, tmp_path / "model", torch_dtype=torch.float32, variant=FORMATS[form].get("variant"))
    assert same_picture(drawn(tmp_path / "model", tmp_path / "a.png"), by_stock(family, stock))


def test_plain_weights_come_before_a_variants(family, model, tmp_path):
    layout, both = registry.find(family), shutil.copytree(model, tmp_path / "both")
    network = opened(family, model).components[NETWORKS[family]]
    plain = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
    config = (both / NETWORKS[family] / "config.json").read_text()
    network.save_pretrained(both / NETWORKS[family], variant="fp16")
    (both / NETWORKS[family] / "config.json").write_text(config)
    loaded = dmdr_models.load(family, both).load_network()
    assert all(torch.equal(tensor, plain[name]) for name, tensor in loaded.state_dict().items())
    assert network_fingerprint(layout, both) == network_fingerprint(layout, model), "the variant is not read"
    assert describe(layout, both) == describe(layout, model)
    for file in weight_files(both / NETWORKS[family]).files:
        file.unlink()
    loaded = dmdr_models.load(family, both).load_network()
    assert not any(tensor.any() for tensor in loaded.parameters())
    assert network_fingerprint(layout, both) != network_fingerprint(layout, model)


@pytest.fixture
def without_t5(sd3_model, tmp_path) -> Path:
    opened("sd3", sd3_model, text_encoder_3=None, tokenizer_3=None).save_pretrained(tmp_path / "small")
    assert not (tmp_path / "small/text_encoder_3").exists()
    return tmp_path / "small"


@pytest.mark.parametrize("said", ["null", "missing"])
def test_sd3_without_t5(sd3_model, without_t5, tmp_path, said):
    if said == "missing":
        index = json.loads((without_t5 / "model_index.json").read_text())
        del index["text_encoder_3"], index["tokenizer_3"]
        (without_t5 / "model_index.json").write_text(json.dumps(index))
    stock = opened("sd3", without_t5, text_encoder_3=None, tokenizer_3=None)
    family = dmdr_models.load("sd3", without_t5, max_tokens=9)
    condition = family.condition(["a fox", "a lighthouse at night"])
    found = stock.encode_prompt(["a fox", "a lighthouse at night"], None, None, max_sequence_length=9)
    states, _, pooled, _ = found
    assert states.shape == (2, 77 + 9, 48)
    torch.testing.assert_close(condition["encoder_hidden_states"], states)
    assert not states[:, 77:].any()
    torch.testing.assert_close(condition["pooled_projections"], pooled)
    assert same_picture(drawn(without_t5, tmp_path / "a.png"), by_stock("sd3", stock))
    layout = registry.find("sd3")
    assert text_fingerprint(layout, without_t5, 9) != text_fingerprint(layout, sd3_model, 9)


def spoilt(model: Path, to: Path, part: str, change) -> Path:
    folder = shutil.copytree(model, to)
    change(folder / part)
    return folder


def rename(old: str, new: str):
    return lambda part: [file.rename(part / file.name.replace(old, new)) for file in part.glob(f"*{old}*")]


def two_variants(part: Path) -> None:
    [file] = part.glob("*.safetensors")
    shutil.copy(file, part / f"{file.stem}.bf16.safetensors")
    file.rename(part / f"{file.stem}.fp16.safetensors")


def cut_shards(part: Path) -> None:
    [file] = part.glob("*.safetensors")
    index = {"metadata": {}, "weight_map": {"a.weight": file.name, "b.weight": "model-00002-of-00002.safetensors"}}
    (part / f"{file.name}.index.json").write_text(json.dumps(index))


def quantise(part: Path) -> None:
    config = json.loads((part / "config.json").read_text())
    quantised = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (part / "config.json").write_text(json.dumps({**config, "quantization_config": quantised}))


SPOILT = {
    "pickle": (rename(".safetensors", ".bin"), "bin, a pickle; only safetensors are read: open it with the library"),
    "renamed": (rename(".safetensors", "x.safetensors"), "x.safetensors: download the folder again"),
    "empty": (lambda part: [file.unlink() for file in part.glob("*.safetensors")], "holds no weights called"),
    "two variants": (two_variants, "holds the variants bf16 and fp16: keep the weights of one"),
    "cut": (cut_shards, "names model-00002-of-00002.safetensors, which is missing: download the folder again"),
    "quantised": (quantise, "says that the weights are quantised (bitsandbytes), which is not supported"),
    "no folder": (shutil.rmtree, 'set "text_encoder_3" to [null, null] in its model_index.json'),
}


@pytest.mark.parametrize("fault", SPOILT)
def test_what_is_refused(sd3_model, tmp_path, capsys, monkeypatch, fault):
    change, line = SPOILT[fault]
    for part in ("transformer", "vae", "text_encoder_3"):
        if fault == "no folder" and part != "text_encoder_3":
            continue
        folder = spoilt(sd3_model, tmp_path / part, part, change)
        with pytest.raises((ValueError, OSError)) as caught:
            describe(registry.find("sd3"), folder)
        assert line in str(caught.value)
    monkeypatch.setattr("diffusers.StableDiffusion3Pipeline.from_pretrained", None)
    with pytest.raises(SystemExit) as end:
        drawn(folder, tmp_path / "a.png")
    assert end.value.code == 2
    shown = capsys.readouterr().err
    assert shown.startswith(f"dmdr-generate: --model {folder}: ")
    assert line in shown
    assert shown.count("\n") == 1


@pytest.mark.parametrize("part", ["tokenizer_2", "tokenizer_3"])
def test_a_tokenizer_without_its_files_is_refused(sd3_model, tmp_path, capsys, part):
    """transformers would make one with a vocabulary of its own, and every text would be the same."""
    layout, folder = registry.find("sd3"), shutil.copytree(sd3_model, tmp_path / "model")
    place = folder / part
    (place / "vocab.json").write_text("{}")  # half of what makes a vocabulary
    for name, line in (
        ("tokenizer.json", f"{place} holds no vocabulary (tokenizer.json): download the folder again"),
        ("tokenizer_config.json", f"{place} holds no tokenizer_config.json: download the folder again"),
        ("", f"{folder} holds no {part}: download the folder again"),
    ):
        (place / name).unlink() if name else shutil.rmtree(place)
        family = dmdr_models.load("sd3", folder)
        for read in (lambda: describe(layout, folder), lambda family=family: family.condition(["a fox"])):
            with pytest.raises(FileNotFoundError, match=f"^{re.escape(line)}$"):
                read()
    describe(layout, folder, own_text=True)
    with pytest.raises(SystemExit) as end:
        drawn(folder, tmp_path / "a.png")
    assert end.value.code == 2
    assert capsys.readouterr().err == f"dmdr-generate: --model {folder}: {line}\n"


def test_a_network_by_its_authors_names_is_refused(sd3_model, tmp_path):
    layout, file = registry.find("sd3"), tmp_path / "student.safetensors"
    family = dmdr_models.load("sd3", sd3_model)
    family.students.save_original(family.load_network(), file)
    line = f"{file} names no layer as diffusers does: give a network that diffusers saved, or make a folder"
    with pytest.raises(ValueError, match=re.escape(line)):
        check_weights(layout, file, describe(layout, sd3_model).layers)


@pytest.mark.parametrize("options", [[], ["--family", "sdxl"]])
def test_a_model_in_one_file_is_refused(sdxl_model, tmp_path, capsys, options):
    file = tmp_path / "style.safetensors"
    shutil.copy(next((sdxl_model / "unet").glob("*.safetensors")), file)
    with pytest.raises(SystemExit) as end:
        drawn(file, tmp_path / "a.png", *options)
    assert end.value.code == 2
    shown = capsys.readouterr().err
    assert f"python -m dmdr_models.unpack {file} BASE FOLDER" in shown
    assert shown.count("\n") == 1
    (tmp_path / "style.gguf").touch()
    with pytest.raises(ValueError, match=r"style\.gguf is a file, and a model is a folder"):
        describe(registry.find("sdxl"), tmp_path / "style.gguf")


# Names of layers in the original files of SD3, and in diffusers' networks. Of `…qkv` diffusers has three layers.
BLOCK = {
    "x_block.adaLN_modulation.1": "norm1.linear", "context_block.adaLN_modulation.1": "norm1_context.linear",
    "x_block.attn.qkv": "attn.to_{}", "context_block.attn.qkv": "attn.add_{}_proj",
    "x_block.attn.proj": "attn.to_out.0", "context_block.attn.proj": "attn.to_add_out",
    "x_block.mlp.fc1": "ff.net.0.proj", "x_block.mlp.fc2": "ff.net.2",
    "context_block.mlp.fc1": "ff_context.net.0.proj", "context_block.mlp.fc2": "ff_context.net.2",
}  # fmt: skip
AROUND = {
    "x_embedder.proj": "pos_embed.proj", "context_embedder": "context_embedder", "final_layer.linear": "proj_out",
    "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
    "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1",
    "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
}  # fmt: skip
VAE = [
    (r"mid_block\.resnets\.0", "mid.block_1"), (r"mid_block\.resnets\.1", "mid.block_2"),
    (r"mid_block\.attentions\.0\.", "mid.attn_1."), (r"attn_1\.group_norm", "attn_1.norm"),
    (r"attn_1\.to_([qkv])", r"attn_1.\1"), (r"attn_1\.to_out\.0", "attn_1.proj_out"),
    (r"down_blocks\.(\d)\.resnets", r"down.\1.block"), (r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample"),
    (r"up_blocks\.(\d)\.resnets", lambda m: f"up.{3 - int(m[1])}.block"),
    (r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"up.{3 - int(m[1])}.upsample"),
    (r"conv_norm_out", "norm_out"), (r"conv_shortcut", "nin_shortcut"),
]  # fmt: skip


def one_file(pipeline, file: Path) -> None:
    """Write network and VAE as the published single files of SD3 hold them, without text encoders."""
    ours, depth = pipeline.transformer.state_dict(), pipeline.transformer.config.num_layers
    layers = dict(AROUND)
    for i in range(depth):
        layers |= {f"joint_blocks.{i}.{old}": f"transformer_blocks.{i}.{new}" for old, new in BLOCK.items()}
    state = {"pos_embed": ours["pos_embed.pos_embed"]}
    for old, new in layers.items():
        for kind in ("weight", "bias"):
            parts = [ours.get(f"{new.format(x)}.{kind}") for x in ("qkv" if "{}" in new else "-")]
            if parts[0] is None:  # the last block has no context after it
                continue
            tensor = torch.cat(parts)
            if old in ("final_layer.adaLN_modulation.1", f"joint_blocks.{depth - 1}.context_block.adaLN_modulation.1"):
                tensor = torch.cat(tensor.chunk(2)[::-1])  # diffusers has scale before shift there
            state[f"{old}.{kind}"] = tensor
    state = {f"model.diffusion_model.{name}": tensor.clone() for name, tensor in state.items()}
    for name, tensor in pipeline.vae.state_dict().items():
        for pattern, original in VAE:
            name = re.sub(pattern, original, name)
        matrix = "attn_1" in name and tensor.ndim == 2
        state[f"first_stage_model.{name}"] = tensor[:, :, None, None].clone() if matrix else tensor.clone()
    save_file(state, file)


def test_the_line_about_a_model_in_one_file_makes_a_folder_of_it(sd3_model, tmp_path):
    pipeline = opened("sd3", sd3_model)
    with torch.no_grad():
        for part in (pipeline.transformer, pipeline.vae):
            for parameter in part.parameters():
                parameter.mul_(1.1)
    one_file(pipeline, tmp_path / "style.safetensors")
    with pytest.raises(ValueError, match="is a model in one file") as caught:
        describe(registry.find("sd3"), tmp_path / "style.safetensors")
    module, *command = str(caught.value).partition("python -m ")[2].split()
    assert module == unpack.__name__
    places = {"BASE": str(sd3_model), "FOLDER": str(tmp_path / "style")}
    unpack.main([places.get(word, word) for word in command])
    assert same_picture(drawn(tmp_path / "style", tmp_path / "a.png"), by_stock("sd3", pipeline))
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "a.png",
        "prompts.jsonl",
        "style",
        "style.safetensors",
    ]


@pytest.mark.parametrize("fault", ["base", "folder", "file", "quantised", "another"])
def test_what_cannot_be_unpacked(sd3_model, tmp_path, capsys, fault):
    file, base, folder = tmp_path / "a.safetensors", sd3_model, tmp_path / "new"
    tensor = torch.zeros(1, dtype=torch.int8 if fault == "quantised" else torch.float16)
    save_file({"model.diffusion_model.x": tensor}, file)
    base = tmp_path if fault == "base" else sd3_model
    folder = tmp_path if fault == "folder" else tmp_path / "new"
    file = sd3_model / "model_index.json" if fault == "file" else file
    with pytest.raises(SystemExit) as end:
        unpack.main([str(file), str(base), str(folder)])
    assert end.value.code == 2
    line = {
        "base": "is no folder of a model with a pipeline in diffusers",
        "folder": "exists already: give a new place",
        "file": "model_index.json is no safetensors file",
        "quantised": "quantised ones are not read",
        "another": f"a.safetensors is no whole model like {base}: it lacks model.diffusion_model.",
    }
    assert line[fault] in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "new").exists()
