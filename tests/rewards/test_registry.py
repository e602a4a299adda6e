import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import dmdr_rewards
import pytest
import torch
from dmdr_rewards.base.errors import MissingError

PLUGIN = """
import torch
from dmdr_rewards import RewardInfo
from dmdr_rewards.pictures.images import as_images


class Brightness:
    def __init__(self, device="cpu", dtype=torch.float32, gain=1.0):
        self.device, self.gain = torch.device(device), gain
        self.info = RewardInfo(
            name="brightness", description="gain times the mean pixel", range=(0.0, gain), licence="MIT", source="here",
            prompt="text", differentiable=True, image_size=None, preprocess="none",
        )

    def score(self, images, prompts):
        return self.gain * as_images(images, self.device, torch.float32).mean(dim=(1, 2, 3))
"""


def install(folder: Path, *entries: str, name: str = "bright") -> None:
    """What pip leaves in site-packages: the module and its dist-info."""
    (folder / f"{name}.py").write_text(PLUGIN)
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[dmdr_rewards]\n" + "\n".join(entries) + "\n")


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    sys.modules.pop("bright", None)


def test_available_is_sorted_and_holds_the_built_in(site: Path) -> None:
    install(site, *(f"{letter}-reward = bright:Brightness" for letter in "zaymxbwn"))
    names = dmdr_rewards.available()
    assert names == sorted(names)
    assert {"a-reward", "class-label", "dinov2", "z-reward"} <= set(names)


def test_an_installed_package_adds_a_reward(site: Path) -> None:
    install(site, "brightness = bright:Brightness")

    assert "brightness" in dmdr_rewards.available()
    reward = dmdr_rewards.create("brightness", gain=2.0)
    assert isinstance(reward, dmdr_rewards.Reward)
    assert reward.info.name == "brightness"
    scores = reward.score(torch.full((3, 3, 4, 4), 0.25), ["a", "b", "c"])
    torch.testing.assert_close(scores, torch.full((3,), 0.5))


def test_two_packages_with_one_name_are_refused(site: Path) -> None:
    install(site, "dinov2 = bright:Brightness")

    with pytest.raises(ValueError, match=r"'dinov2' is claimed by bright:.* and dmdr_rewards\.models\.dinov2:reward"):
        dmdr_rewards.create("dinov2")
    assert dmdr_rewards.available().count("dinov2") == 1


@pytest.mark.parametrize(("typed", "meant"), [("dino-v2", "dinov2"), ("class_label", "class-label"), ("zzz", "")])
def test_an_unknown_name_gets_the_nearest(typed: str, meant: str) -> None:
    with pytest.raises(
        ValueError, match=f"unknown reward '{typed}': did you mean '{meant}.*Available: aesthetic, class-label, clip, d"
    ):
        dmdr_rewards.create(typed)


@pytest.mark.parametrize("name", dmdr_rewards.available())
def test_every_reward_is_described_before_it_is_loaded(name: str) -> None:
    info = dmdr_rewards.describe(name)
    assert info.name == name
    assert info.checkpoint != "none" or info.fetch.startswith("pip install ") or info.licence == "none needed"
    assert info.licence
    assert info.source
    assert info.preprocess
    assert info.range[0] < info.range[1]


INFOS = [dmdr_rewards.describe(name) for name in dmdr_rewards.available()]
LOCAL = [info.name for info in INFOS if not info.endpoint and info.checkpoint != "none"]


@pytest.mark.parametrize("name", LOCAL)
@pytest.mark.parametrize("checkpoint", ["nowhere", "nowhere.pt", "empty", None])
def test_weights_that_are_missing_come_with_the_command_that_fetches_them(
    name: str, checkpoint: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    fetch = dmdr_rewards.describe(name).fetch
    assert fetch.startswith(("hf download ", "curl "))
    with pytest.raises(MissingError, match=rf"; the official weights: {re.escape(fetch)}$"):
        dmdr_rewards.create(name, checkpoint)


def test_a_file_that_is_missing_beside_the_weights_comes_with_it_too(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    (tmp_path / "config.json").write_text('{"model_type": "clip"}')
    with pytest.raises(MissingError, match=r"has no tokenizer.*hf download laion/CLIP-ViT-H-14.* tokenizer\.json"):
        dmdr_rewards.create("pickscore", tmp_path)
    with pytest.raises(MissingError, match=r"must be a folder with sac\+logos.*curl .*sac%2Blogos"):
        dmdr_rewards.create("aesthetic", tmp_path)


def test_a_package_may_describe_its_reward(site: Path) -> None:
    install(site, "brightness = bright:Brightness")
    with pytest.raises(ValueError, match=r"'brightness' has no description: its factory .* needs an attribute"):
        dmdr_rewards.describe("brightness")
    import bright

    bright.Brightness.info = bright.Brightness().info
    assert dmdr_rewards.describe("brightness").licence == "MIT"


def test_arguments_are_checked_by_name(vit_folder: Path) -> None:
    with pytest.raises(ValueError, match=r"'class-label': missing a required argument: 'checkpoint'"):
        dmdr_rewards.create("class-label")
    with pytest.raises(
        ValueError, match=r"unexpected keyword argument 'margin'; it takes checkpoint, preprocess, device, dtype"
    ):
        dmdr_rewards.create("class-label", checkpoint=vit_folder, margin=0.7)


def test_importing_is_light() -> None:
    program = """
        import sys
        import dmdr_rewards
        assert dmdr_rewards.available()
        for name in dmdr_rewards.available():
            dmdr_rewards.describe(name)
        assert "torch" not in sys.modules
        try:
            dmdr_rewards.create("nothing")
        except ValueError:
            pass
        heavy = {"deepspeed", "diffusers", "transformers", "open_clip", "timm", "torchvision", "dmdr_core"}
        heavy &= set(sys.modules)
        raise SystemExit(f"imported {heavy}" if heavy else 0)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
