import hashlib
import os
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from dmdr_rewards.networks import checkpoint_files
from safetensors.torch import save_file

TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4)}


class Trojan:
    """A pickle that creates a folder when it is read."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("name", ["new.pth", "old.pth", "new.safetensors"])
def test_tensors_come_back(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    if path.suffix == ".safetensors":
        save_file(TENSORS, path)
    else:
        torch.save(TENSORS, path, _use_new_zipfile_serialization=name == "new.pth")
        assert zipfile.is_zipfile(path) == (name == "new.pth")
    loaded = checkpoint_files.load(path)
    assert loaded.keys() == TENSORS.keys()
    for key, tensor in TENSORS.items():
        assert torch.equal(loaded[key], tensor)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_with_code_is_refused_unrun(zipped: bool, tmp_path: Path) -> None:
    path, target = tmp_path / "evil.pth", tmp_path / "made-by-the-pickle"
    torch.save({**TENSORS, "c": Trojan(target)}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r"evil\.pth was refused and none of its code was run.*non-tensors.*mkdir"):
        checkpoint_files.load(path)
    assert not target.exists()
    torch.load(path, weights_only=False)
    assert target.exists(), "the trap itself must work, or the test proves nothing"


@pytest.mark.parametrize("name", ["cut.pth", "cut.safetensors"])
def test_a_truncated_file_is_refused(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    if path.suffix == ".safetensors":
        save_file(TENSORS, path)
    else:
        torch.save(TENSORS, path)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ValueError, match=rf"checkpoint .*{name}.* is damaged"):
        checkpoint_files.load(path)


@pytest.mark.parametrize("name", ["text.pth", "text.safetensors", "empty.pth", "hello.pth"])
def test_a_file_of_another_format_is_refused(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    contents = {"empty": "", "hello": "hello", "text": "version https://git-lfs.github.com/spec/v1\n"}
    path.write_text(contents[path.stem])
    with pytest.raises(ValueError, match=rf"checkpoint .*{name}.* is damaged"):
        checkpoint_files.load(path)


@pytest.mark.parametrize("content", [{"state_dict": TENSORS}, [torch.ones(1)], torch.ones(1)])
def test_other_content_is_refused(content: Any, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="holds more than named tensors"):
        checkpoint_files.load(tmp_path / "other.pth")


def test_tensors_may_be_wrapped(tmp_path: Path) -> None:
    torch.save({"state_dict": TENSORS, "epoch": 3}, tmp_path / "wrapped.pth")
    torch.save(TENSORS, tmp_path / "bare.pth")
    for name in ("wrapped", "bare"):
        assert checkpoint_files.load(tmp_path / f"{name}.pth", inside="state_dict").keys() == TENSORS.keys()


def test_the_hash_follows_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    path.write_bytes(b"one")
    assert checkpoint_files.sha256(path) == hashlib.sha256(b"one").hexdigest()
    path.write_bytes(b"other")
    assert checkpoint_files.sha256(path) == hashlib.sha256(b"other").hexdigest()
    (tmp_path / "config.json").write_text("{}")
    folder = checkpoint_files.sha256(tmp_path)
    assert folder == hashlib.sha256(f"{checkpoint_files.sha256(path)}  a.pth\n".encode()).hexdigest()
    path.rename(tmp_path / "b.pth")
    assert checkpoint_files.sha256(tmp_path) != folder


def test_nothing_to_hash_is_said(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ValueError, match="no such file, nor a folder with weights"):
            checkpoint_files.sha256(path)


def test_a_file_is_hashed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.pth").write_bytes(b"one")
    first = checkpoint_files.sha256(tmp_path / "a.pth")
    monkeypatch.setattr(Path, "open", lambda *_: pytest.fail("read again"))
    assert checkpoint_files.sha256(tmp_path / "a.pth") == first


def test_long_lists_of_differences_are_cut() -> None:
    with pytest.raises(ValueError, match=r"missing: a, b, n00, n01 and 98 more$"):
        checkpoint_files.check({}, {**{f"n{i:02}": (1,) for i in range(100)}, "a": (1,), "b": (1,)}, "other.pth")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere\.pth: no such file"):
        checkpoint_files.load(tmp_path / "nowhere.pth")


def test_every_difference_is_listed() -> None:
    checkpoint_files.check(TENSORS, {"a": (2, 3), "b": (4,)}, "good.pth")
    with pytest.raises(
        ValueError,
        match=r"bad\.pth is not of this model; missing: c, d; unexpected: b; wrong shape: a \(2, 3\), expected \(3, 2",
    ):
        checkpoint_files.check(TENSORS, {"a": (3, 2), "d": (1,), "c": (1,)}, "bad.pth")


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
@pytest.mark.parametrize("name", ["wrapped.pth", "wrapped.safetensors"])
def test_names_of_several_gpus_or_of_a_compiled_network_are_unwrapped(prefix: str, name: str, tmp_path: Path) -> None:
    wrapped = {prefix + key: tensor for key, tensor in TENSORS.items()}
    if name.endswith(".safetensors"):
        save_file(wrapped, tmp_path / name)
        assert checkpoint_files.load(tmp_path / name).keys() == TENSORS.keys()
    else:
        torch.save({"epoch": 3, "state_dict": wrapped, "optimizer": {"state": {}}}, tmp_path / name)
        assert checkpoint_files.load(tmp_path / name, inside="state_dict").keys() == TENSORS.keys()
    mixed = {"module.a": TENSORS["a"], "b": TENSORS["b"]}
    torch.save(mixed, tmp_path / "mixed.pth")
    assert checkpoint_files.load(tmp_path / "mixed.pth").keys() == mixed.keys()
