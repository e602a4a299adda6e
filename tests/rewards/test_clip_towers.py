import gc
import shutil
import socket
from pathlib import Path
from typing import Any

import dmdr_rewards
import pytest
import torch
from dmdr_rewards.networks import checkpoint_files, clip_towers
from dmdr_rewards.networks.frozen_network import FrozenNetwork

from .conftest import TINY_CLIP, eight_bit, open_clip_model
from .test_checkpoint_files import Trojan


def load(path: Path, config: dict[str, Any] = TINY_CLIP, **options: Any) -> clip_towers.Towers:
    return clip_towers.open_clip_towers(path, config, **options)


def test_equal_checkpoints_give_one_object(clip_file: Path, tmp_path: Path) -> None:
    first = load(clip_file)
    copy = Path(shutil.copy(clip_file, tmp_path / "copy.bin"))
    assert load(copy) is first
    assert load(clip_file, {**TINY_CLIP, "quick_gelu": True}) is not first
    assert load(clip_file, dtype=torch.float64) is not first
    assert load(clip_file, gradient_checkpointing=True) is not first
    torch.save(open_clip_model(seed=5).state_dict(), copy)
    assert load(copy) is not first


def test_nothing_is_kept_that_nobody_uses(clip_file: Path) -> None:
    gc.collect()
    before = len(checkpoint_files._loaded)
    loaded = load(clip_file, dtype=torch.float16)
    assert len(checkpoint_files._loaded) == before + 1
    del loaded
    gc.collect()
    assert len(checkpoint_files._loaded) == before


def test_the_mapped_file_is_the_weights(clip_file: Path) -> None:
    """No second copy in memory: parameters lie in one mapping, at the distances they have in the file."""
    parameters = dict(load(clip_file).image.module.named_parameters())
    assert len({parameter.untyped_storage().data_ptr() for parameter in parameters.values()}) > 1
    maps = Path("/proc/self/maps")
    if maps.exists():
        ranges = [
            tuple(int(bound, 16) for bound in line.split()[0].split("-"))
            for line in maps.read_text().splitlines()
            if line.endswith(clip_file.name)
        ]
        for name, parameter in parameters.items():
            assert any(low <= parameter.data_ptr() < high for low, high in ranges), name


def test_the_causal_mask_is_rebuilt(clip_file: Path) -> None:
    loaded: Any = load(clip_file)
    model = open_clip_model()
    text = loaded._text_module.model
    assert torch.equal(text.attn_mask, model.attn_mask)
    assert not any(tensor.is_meta for tensor in [*text.buffers(), *loaded.image.module.buffers()])


@pytest.mark.parametrize("kind", ["custom text", "ResNet"])
def test_other_architectures(kind: str, tmp_path: Path) -> None:
    import open_clip

    sizes: dict[str, Any] = {**TINY_CLIP, "custom_text": kind == "custom text"}
    if kind == "ResNet":
        sizes["vision_cfg"] = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "head_width": 16}
    plain = {name: value for name, value in sizes.items() if name != "custom_text"}
    model = (open_clip.CustomTextCLIP if sizes["custom_text"] else open_clip.CLIP)(**plain).eval()
    torch.save(model.state_dict(), tmp_path / "model.pt")
    loaded = load(tmp_path / "model.pt", sizes)
    pixels = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    tokens = open_clip.SimpleTokenizer(context_length=12)(["a cat", "a dog"])
    with torch.no_grad():
        torch.testing.assert_close(loaded.image(pixels), model.encode_image(pixels))
        torch.testing.assert_close(loaded.texts(["a cat", "a dog"]), model.encode_text(tokens, normalize=True))


def refused(path: Path, message: str, config: dict[str, Any] = TINY_CLIP) -> None:
    with pytest.raises(ValueError, match=message):
        load(path, config)


def test_bad_files_are_refused(clip_file: Path, tmp_path: Path) -> None:
    refused(tmp_path / "nowhere.bin", r"nowhere\.bin: no such file")
    refused(tmp_path, r"must be a folder with open_clip_model\.safetensors or ")
    cut = tmp_path / "cut.bin"
    cut.write_bytes(clip_file.read_bytes()[:-1000])
    refused(cut, r"cut\.bin is damaged")
    target = tmp_path / "made-by-the-pickle"
    torch.save({"state_dict": {"a": Trojan(target)}}, tmp_path / "evil.bin")
    refused(tmp_path / "evil.bin", "was refused and none of its code was run")
    assert not target.exists()
    torch.save({"state_dict": {"a": 3}}, tmp_path / "numbers.bin")
    refused(tmp_path / "numbers.bin", "holds more than named tensors")
    torch.jit.script(torch.nn.Linear(2, 2)).save(tmp_path / "program.pt")
    refused(tmp_path / "program.pt", r"program\.pt (was refused|is damaged)")


def test_weights_that_differ_are_listed(tmp_path: Path) -> None:
    tensors = open_clip_model().state_dict()
    tensors["ln_final.weight"] = torch.ones(3)
    tensors["stowaway"] = tensors.pop("visual.proj")
    torch.save(tensors, tmp_path / "other.bin")
    refused(
        tmp_path / "other.bin",
        r"missing: visual\.proj; unexpected: stowaway; wrong shape: ln_final\.weight \(3,\), expected \(32,\)",
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not an open_clip configuration: JSONDecodeError"),
        ("[]", "is not an open_clip configuration"),
        ('{"model_cfg": {}}', "is not an open_clip configuration: KeyError"),
        ('{"text_cfg": {"hf_model_name": "roberta-base"}}', "text towers of Hugging Face"),
        ('{"text_cfg": {}, "multimodal_cfg": {}}', "captioning models are not supported"),
    ],
)
def test_architectures_that_are_refused(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "model.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        clip_towers.open_clip_config(str(tmp_path / "model.json"))


def test_features_made_under_inference_mode_do_not_stay_in_training(clip_file: Path, clip_json: Path) -> None:
    reward = dmdr_rewards.create("clip", clip_file, model=str(clip_json))
    with torch.inference_mode():
        reward.score([eight_bit(32, 32)], ["first met here"])
    pictures = torch.rand(1, 3, 32, 32, requires_grad=True)
    reward.score(pictures, ["first met here"]).sum().backward()
    assert pictures.grad is not None


def test_an_unknown_dtype_is_refused() -> None:
    with pytest.raises(ValueError, match=r"dtype torch\.int8: choose one of torch\.float32"):
        FrozenNetwork(torch.nn.Identity(), "cpu", torch.int8)


def test_nothing_is_downloaded(clip_file: Path, clip_json: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, lambda *_: pytest.fail("a network call"))
    reward = dmdr_rewards.create("clip", clip_file, model=str(clip_json))
    reward.score([eight_bit(32, 32)], ["never met before"])
