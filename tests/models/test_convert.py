"""Conversion, and with it the network: both are compared with a forward pass written from the published key names."""

import argparse
import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from dmdr_models import tiny
from dmdr_models.sit.convert import ConversionError, convert, detect_source, read_checkpoint, save
from dmdr_models.sit.transformer import PATCH_SIZES, SIZES, SiTTransformer, preset, sincos_positions

TOOL = Path(__file__).parents[2] / "tools" / "convert_sit.py"
SMALL = {"width": 24, "depth": 2, "heads": 3, "patch": 2, "sample_size": 6, "channels": 3, "rows": 6}


def small(published, **changes):
    return published.state(**{**SMALL, "outputs": 3, **changes})


def inputs(channels: int = 3, size: int = 6):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(4, channels, size, size, generator=generator, dtype=torch.float64)
    return x, torch.tensor([0.0, 0.3, 0.875, 1.0]), torch.tensor([0, 4, 5, 2])


def network(config, weights, **changes) -> SiTTransformer:
    built = SiTTransformer(**{**config, **changes})
    built.load_state_dict(weights)
    return built.double().eval()


@pytest.mark.parametrize(("width", "grid"), [(8, 1), (24, 3), (1152, 5)])
def test_positions_are_those_of_the_loops(published, width, grid):
    torch.testing.assert_close(
        sincos_positions(width, grid).double(), published.positions(width, grid), atol=1e-7, rtol=0
    )


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("qk_norm", [True, False])
def test_repa_network_gives_the_published_output(published, qk_norm, fused):
    weights = small(published, qk_norm=qk_norm, projectors=True)
    config, ours = convert(weights, num_heads=None if qk_norm else 3)
    x, t, y = inputs()
    with torch.no_grad():
        got = network(config, ours, fused_attention=fused)(x, t, y)
    expected = published.forward(weights, x, t, y, heads=3)
    assert expected.std() > 0.1
    # The positions are float32 in both.
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=0)
    assert config["qk_norm"] is qk_norm


def test_every_weight_is_heard(published):
    """Otherwise a swapped pair of layers could hide behind a weight that does nothing."""
    weights = small(published, qk_norm=True)
    config, ours = convert(weights, "repa")
    x, t, y = inputs()
    base = network(config, ours)(x, t, y)
    generator = torch.Generator().manual_seed(0)
    for name in ours:
        if name.endswith("norm_k.bias"):  # the same for every key: the softmax cannot see it
            assert torch.equal(ours[name], weights[name.replace("norm_k", "k_norm")])
            continue
        changed = {**ours, name: ours[name] + 0.3 * torch.randn(ours[name].shape, generator=generator)}
        assert (network(config, changed)(x, t, y) - base).abs().max() > 1e-6, name


@pytest.mark.parametrize("patch", [1, 2, 3])
@pytest.mark.parametrize("outputs", [3, 6])
def test_original_network_runs_backwards(published, patch, outputs):
    """v_ours(x, t, y) = -v_theirs(x, 1 - t, y), of the first channels only."""
    weights = small(published, outputs=outputs, patch=patch)
    config, ours = convert(weights, "sit", num_heads=3)
    x, t, y = inputs()
    with torch.no_grad():
        got = network(config, ours)(x, t, y)
    expected = -published.forward(weights, x, 1 - t, y, heads=3)[:, :3]
    unreversed = -published.forward(weights, x, t, y, heads=3)[:, :3]
    assert (expected - unreversed).abs().max() > 1e-3
    # The converted weights and the time features are float32.
    torch.testing.assert_close(got, expected, atol=2e-6, rtol=0)


@pytest.mark.parametrize("source", ["repa", "sit"])
@pytest.mark.parametrize("patch", PATCH_SIZES)
@pytest.mark.parametrize("size", SIZES)
def test_all_published_sizes(published, size, patch, source):
    expected = preset(f"SiT-{size}/{patch}")
    named = published.shapes(
        expected["width"],
        expected["depth"],
        expected["num_heads"],
        patch,
        outputs=8 if source == "sit" else 4,
        projectors=source == "repa",
    )
    config, ours = convert({name: torch.empty(shape, device="meta") for name, shape in named.items()})
    assert {name: config[name] for name in expected} == expected
    assert (config["sample_size"], config["in_channels"], config["num_classes"]) == (32, 4, 1000)
    with torch.device("meta"):
        built = SiTTransformer(**config).state_dict()
    assert {name: tuple(w.shape) for name, w in ours.items()} == {name: tuple(w.shape) for name, w in built.items()}


def test_xl_2_has_the_published_number_of_parameters(published):
    named = published.shapes(1152, 28, 16, 2, outputs=8)
    assert sum(torch.Size(shape).numel() for shape in named.values()) == 675_129_632  # as DiT-XL/2 reports


def test_512_pixels(published):
    named = published.shapes(1152, 28, 16, 2, outputs=8, sample_size=64)
    config, _ = convert({name: torch.empty(shape, device="meta") for name, shape in named.items()})
    assert config["sample_size"] == 64


def test_source_is_recognised_only_where_it_is_certain(published):
    assert detect_source(small(published, projectors=True)) == "repa"
    assert detect_source(small(published, qk_norm=True)) == "repa"
    assert detect_source(small(published, outputs=6)) == "sit"
    with pytest.raises(ConversionError, match="give --source repa or --source sit"):
        convert(small(published), num_heads=3)
    with pytest.raises(ConversionError, match="unknown source 'dit'"):
        convert(small(published), "dit")


def test_wrong_keys_are_listed_by_name(published):
    weights = small(published, qk_norm=True)
    del weights["blocks.1.attn.qkv.weight"]
    weights["blocks.0.attn.norm.weight"] = torch.zeros(3)
    weights["t_embedder.mlp.2.bias"] = torch.zeros(7)
    with pytest.raises(ConversionError) as error:
        convert(weights)
    message = str(error.value)
    assert "missing: blocks.1.attn.qkv.weight" in message
    assert "unexpected: blocks.0.attn.norm.weight" in message
    assert "wrong shape: t_embedder.mlp.2.bias [7] instead of [24]" in message
    assert "\n" not in message


def test_a_source_that_does_not_fit_is_refused(published):
    with pytest.raises(ConversionError, match=r"wrong shape: final_layer\.linear\.weight"):
        convert(small(published, outputs=6), "repa", num_heads=3)
    with pytest.raises(ConversionError, match=r"unexpected: projectors\.0\.0\.weight"):
        convert(small(published, projectors=True), "sit", num_heads=3)
    with pytest.raises(ConversionError, match=r"no SiT checkpoint: it has no x_embedder\.proj\.weight"):
        convert({"a": torch.zeros(2)}, "sit")


def test_a_label_table_without_null_row_is_refused(published):
    weights = small(published, rows=5, qk_norm=True)
    with pytest.raises(ConversionError, match=r"5 rows for 5 classes.*class_dropout_prob"):
        convert(weights, num_classes=5)
    with pytest.raises(ConversionError, match="5 rows for 5 classes"):
        convert(weights, options={"num_classes": 5})
    with pytest.raises(ConversionError, match=r"1000 rows.*give --num-classes 999"):
        convert(small(published, rows=1000, qk_norm=True))
    assert convert(small(published, rows=1000, qk_norm=True), num_classes=999)[0]["num_classes"] == 999
    with pytest.raises(ConversionError, match="not the 11 of 10 classes"):
        convert(weights, num_classes=10)


def test_heads_are_never_guessed(published):
    with pytest.raises(ConversionError, match="give --num-heads"):
        convert(small(published), "repa")
    with pytest.raises(ConversionError, match="contradicts the weights, which have 3 heads"):
        convert(small(published, qk_norm=True), num_heads=4)
    with pytest.raises(ConversionError, match="not a multiple"):
        convert(small(published), "repa", num_heads=5)


def test_positions_are_checked(published):
    weights = small(published, qk_norm=True)
    drifted = {**weights, "pos_embed": weights["pos_embed"] + 5e-4}
    convert(drifted)
    transposed = weights["pos_embed"].unflatten(1, (3, 3)).transpose(1, 2).flatten(1, 2)
    for wrong in (transposed, torch.full_like(transposed, torch.nan)):
        with pytest.raises(ConversionError, match="pos_embed differs"):
            convert({**weights, "pos_embed": wrong})


@pytest.mark.parametrize("options", [{"path_type": "cosine"}, {"path_type": "GVP"}, {"prediction": "score"}])
def test_other_objectives_are_refused(published, options):
    with pytest.raises(ConversionError, match=r"only .* can be converted"):
        convert(small(published, qk_norm=True), options=options)
    convert(small(published, qk_norm=True), options={"path_type": "Linear", "prediction": "velocity"})


def test_early_names_of_repa(published):
    weights = small(published, qk_norm=True, depth=3)
    early = {
        name.replace("blocks.1.", "decoder_blocks.0.").replace("blocks.2.", "decoder_blocks.1."): weights[name]
        for name in weights
    }
    assert "decoder_blocks.1.mlp.fc1.bias" in early
    for (_, a), (_, b) in zip(convert(weights)[1].items(), convert(early)[1].items(), strict=True):
        assert torch.equal(a, b)


def test_checkpoints_of_trainers_are_read(published, tmp_path):
    ema, raw = small(published, seed=1), small(published, seed=2)
    content = {"model": raw, "ema": ema, "opt": {"state": {}}, "args": argparse.Namespace(num_classes=5), "steps": 7}
    torch.save(content, tmp_path / "full.pt")
    weights, options = read_checkpoint(tmp_path / "full.pt")
    assert torch.equal(weights["pos_embed"], ema["pos_embed"])
    assert torch.equal(weights["final_layer.linear.weight"], ema["final_layer.linear.weight"])
    assert options == {"num_classes": 5}
    torch.save(ema, tmp_path / "bare.pt", _use_new_zipfile_serialization=False)
    weights, options = read_checkpoint(tmp_path / "bare.pt")
    assert weights.keys() == ema.keys()
    assert options == {}


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_malicious_pickle_is_refused_and_not_run(published, tmp_path):
    torch.save({"ema": small(published), "args": Evil(tmp_path / "ran")}, tmp_path / "evil.pt")
    with pytest.raises(ConversionError, match="could run code"):
        read_checkpoint(tmp_path / "evil.pt")
    assert not (tmp_path / "ran").exists()


def test_files_that_are_no_checkpoint(tmp_path):
    for name, content in {"a.pt": b"hello", "b.safetensors": b"hello", "c.pt": b""}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ConversionError) as error:
            read_checkpoint(tmp_path / name)
        assert "\n" not in str(error.value)
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(ConversionError, match="holds a list"):
        read_checkpoint(tmp_path / "list.pt")
    torch.save({"ema": {"a": 1}}, tmp_path / "numbers.pt")
    with pytest.raises(ConversionError, match="neither"):
        read_checkpoint(tmp_path / "numbers.pt")
    with pytest.raises(FileNotFoundError):
        read_checkpoint(tmp_path / "none.pt")


def test_saved_folder_loads_and_is_all_or_nothing(published, model, tmp_path):
    import dmdr_models

    weights = small(published, qk_norm=True, channels=4, outputs=4)
    config, ours = convert(weights)
    save(config, ours, tmp_path / "new", vae=model / "vae")
    family = dmdr_models.load("sit", tmp_path / "new")
    x, t, y = inputs(4)
    got = family.predict(family.load_network().double(), x, t, {"class_labels": y})
    torch.testing.assert_close(got.double(), published.forward(weights, x, t, y, heads=3), atol=1e-5, rtol=0)
    assert family.num_classes == 5
    family.decode(got)

    with pytest.raises(ConversionError, match="is there already"):
        save(config, ours, tmp_path / "new")
    with pytest.raises(ConversionError, match=r"--vae .* give an AutoencoderKL"):
        save(config, ours, tmp_path / "other", vae=model / "transformer")
    three, theirs = convert(small(published, qk_norm=True))
    with pytest.raises(ConversionError, match="give an AutoencoderKL with 3"):
        save(three, theirs, tmp_path / "other", vae=model / "vae")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new"]


def test_command_line(published, tmp_path, monkeypatch, capsys):
    def tool(*arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", [str(TOOL), *arguments])
        runpy.run_path(str(TOOL), run_name="__main__")

    monkeypatch.chdir(tmp_path)
    torch.save(small(published, outputs=6), "sit.pt")
    for wrong, message in {
        ("sit.pt", "-o", "out"): "give --num-heads",
        ("none.pt", "-o", "out"): "no checkpoint file none.pt",
        ("sit.pt", "-o", "sit.pt"): "sit.pt is there already",
        ("sit.pt",): "required: -o/--output",
    }.items():
        with pytest.raises(SystemExit) as end:
            tool(*wrong)
        assert end.value.code == 2
        shown = capsys.readouterr().err
        assert message in shown
        assert shown.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["sit.pt"]
    tool("sit.pt", "-o", "out", "--num-heads", "3")
    assert json.loads(Path("out/transformer/config.json").read_text())["num_heads"] == 3
    assert [path.name for path in Path("out").iterdir()] == ["transformer"]


def test_our_own_weights_are_refused(tmp_path):
    """A folder of ours is no published checkpoint: say so."""
    path = tiny.sit(tmp_path / "ours") / "transformer/diffusion_pytorch_model.safetensors"
    with pytest.raises(ConversionError, match="no SiT checkpoint"):
        convert(read_checkpoint(path)[0], "repa")
