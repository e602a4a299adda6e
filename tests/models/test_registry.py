"""Families by name, and a family of another package: a pixel-space network with class labels, and without a VAE."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import dmdr_models
import numpy as np
import pytest
import torch
from dmdr_models import registry
from dmdr_models.drawing.own_sampler import OwnSampler
from dmdr_models.families.network_students import NetworkStudents
from dmdr_models.folder.checks import check_weights
from dmdr_models.folder.contents import describe
from dmdr_models.folder.fingerprints import network_fingerprint
from dmdr_models.folder.layout import Layout
from dmdr_models.generate import main
from PIL import Image
from same_picture import same_picture

ROOT = Path(__file__).parents[2]
LAYOUT = """
from dmdr_models.folder.layout import Layout

LAYOUT = Layout(name="dots", parts={"network": ("DotsNetwork",)}, opens="dots.family:Dots")
"""

FAMILY = """
import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from dmdr_models.families.class_labels import ClassLabels
from dmdr_models.families.network_family import NetworkFamily, in_own_dtype
from torch import nn

from dots.layout import LAYOUT


class DotsNetwork(ModelMixin, ConfigMixin):
    @register_to_config
    def __init__(self, in_channels=3, sample_size=16, num_classes=4, width=8):
        super().__init__()
        self.label_embed = nn.Embedding(num_classes + 1, width)
        self.first = nn.Conv2d(in_channels + 1, width, 3, padding=1)
        self.last = nn.Conv2d(width, in_channels, 3, padding=1)

    def forward(self, x, t, class_labels):
        time = t.to(x.dtype).reshape(-1, 1, 1, 1).expand(-1, 1, *x.shape[2:])
        hidden = self.first(torch.cat([x, time], dim=1)) + self.label_embed(class_labels)[:, :, None, None]
        return self.last(hidden.relu())


class Dots(ClassLabels, NetworkFamily):
    layout = LAYOUT
    network_class = DotsNetwork
    lora_targets = ("first", "last")

    def predict(self, network, x_t, t, condition, **named):
        x_t, condition = in_own_dtype(network, x_t, condition)
        return network(x_t, t, **condition, **named).float()
"""


def install(site: Path, name: str, modules: dict[str, str], *entries: str) -> None:
    """Write what pip leaves in site-packages: a package with these modules, and its metadata.

    Args:
        entries: lines of the group `dmdr_families`.
    """
    (site / name).mkdir()
    for module, source in {"__init__": "", **modules}.items():
        (site / name / f"{module}.py").write_text(source)
    info = site / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[dmdr_families]\n" + "\n".join(entries) + "\n")


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of installed packages, with the package `dots` in it."""
    site = tmp_path / "site"
    site.mkdir()
    monkeypatch.syspath_prepend(site)
    install(site, "dots", {"layout": LAYOUT, "family": FAMILY}, "dots = dots.layout:LAYOUT")
    yield site
    for module in [name for name in sys.modules if name.split(".")[0] in ("dots", "other")]:
        del sys.modules[module]


@pytest.fixture
def dots(site: Path, tmp_path: Path) -> Path:
    """A model of the family dots."""
    from dots.family import DotsNetwork

    with torch.random.fork_rng():
        torch.manual_seed(0)
        DotsNetwork().save_pretrained(tmp_path / "model/network")
    return tmp_path / "model"


def generate(*arguments: object) -> None:
    main([str(argument) for argument in arguments])


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


# -- names


def test_names_are_sorted_and_hold_the_built_in(site: Path) -> None:
    assert registry.names() == ["dots", "sd3", "sdxl", "sit"]
    assert [layout.name for layout in registry.layouts()] == registry.names()
    assert [registry.find(name).takes for name in registry.names()] == ["labels", "texts", "texts", "labels"]


@pytest.mark.parametrize(("name", "nearest"), [("sd33", "sd3"), ("sdlx", "sdxl"), ("SiT", "sit"), ("dot", "dots")])
def test_an_unknown_name_gets_the_nearest(site: Path, name: str, nearest: str) -> None:
    with pytest.raises(ValueError, match=rf"unknown model family '{name}'; did you mean {nearest}\?"):
        registry.find(name)
    assert registry.nearest(name) == nearest


def test_two_packages_with_one_name_are_refused(site: Path) -> None:
    install(site, "other", {"layout": LAYOUT}, "sit = other.layout:LAYOUT")
    with pytest.raises(ValueError, match=r"'sit' is claimed by dmdr_models\.sit\.layout:LAYOUT and other\.layout"):
        registry.find("sit")
    assert registry.names().count("sit") == 1


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("import nothing_of_the_kind", r"other\.layout:LAYOUT cannot be imported: No module named"),
        ("", r"other\.layout:LAYOUT cannot be imported: module 'other\.layout' has no attribute 'LAYOUT'"),
        ("LAYOUT = 3", r"other\.layout:LAYOUT is not a Layout with that name"),
        (LAYOUT, r"other\.layout:LAYOUT is not a Layout with that name"),
    ],
)
def test_a_broken_package_is_named_and_stops_no_other(
    site: Path, model: Path, source: str, message: str, tmp_path: Path
) -> None:
    install(site, "other", {"layout": source}, "broken = other.layout:LAYOUT")
    with pytest.raises(ValueError, match=f"model family 'broken': {message}"):
        registry.find("broken")
    generate("--model", model, "--classes", "1", "-o", tmp_path / "sit.png")
    assert (tmp_path / "sit.png").exists()


def test_a_folder_is_recognised(site: Path, dots: Path, model: Path, sd3_model: Path, sdxl_model: Path) -> None:
    found = [registry.recognise(folder) for folder in (dots, model, sd3_model, sdxl_model, site)]
    assert [layout.name if layout else None for layout in found] == ["dots", "sit", "sd3", "sdxl", None]


def test_options(dots: Path, model: Path) -> None:
    assert dmdr_models.load("dots", dots, vae=None, resolution=None, max_tokens=None, dtype=torch.bfloat16)
    for option in ("vae", "max_tokens"):
        with pytest.raises(ValueError, match=f"{option}: the family dots has no such option; leave it out"):
            dmdr_models.load("dots", dots, **{option: 3})
    for option in ("vae_checkpointing", "vae_tiling", "vae_slicing"):
        with pytest.raises(ValueError, match=f"{option}: the family dots has no VAE; leave it out"):
            dmdr_models.load("dots", dots).save_memory(**{option: True})


# -- a family without a VAE


def test_a_model_is_loaded_and_sampled(dots: Path) -> None:
    family = dmdr_models.load("dots", dots)
    assert (family.size, family.num_classes, family.latent_shape(16, 24)) == ((16, 16), 4, (3, 16, 24))
    network = family.load_network()
    noise = torch.randn(2, *family.latent_shape(*family.size), generator=torch.Generator().manual_seed(1))
    latents = dmdr_models.sample(family, network, family.condition([0, 3]), noise, num_steps=3, guidance=2.0)
    family.open_decoder()
    family.save_memory()
    torch.testing.assert_close(family.decode(latents), ((latents + 1) / 2).clamp(0, 1))
    pictures = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(family.decode(family.encode(pictures)), pictures)
    lora = dmdr_models.LoRANetwork(network, 2, 2, family.lora_targets)
    assert torch.equal(
        family.predict(lora, noise, torch.ones(2), family.condition([0, 3]), lora_scale=1.0),
        family.predict(family.load_network(), noise, torch.ones(2), family.condition([0, 3])),
    )


def test_a_student_is_saved_and_drawn_from_by_its_card(dots: Path, tmp_path: Path, draw_as_told, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    family = dmdr_models.load("dots", dots)
    assert not family.students.keeps_lora
    network = family.load_network()
    network.last.bias.data.fill_(0.25)
    Path("student").mkdir()
    family.students.save(network, Path("student"))
    family.students.save_scheduler(Path("student"), shift=1.0)
    assert [path.name for path in Path("student").iterdir()] == ["network"]
    loaded = family.load_network("student")
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), network.parameters(), strict=True))
    sampling = {"steps": 2, "method": "sde", "guidance": 1.0, "shift": 1.0, **family.students.sampling}
    usage = family.students.usage(Path("student"), sampling, lora=False)
    assert usage == "    dmdr-generate --family dots --model student --classes 0,1 -o pictures.png\n"
    drawn = draw_as_told(usage, "dots", sampling)
    assert drawn.shape == (2 * 18 + 2, 4 * 18 + 2, 3), "two classes, four pictures each"
    generate("--model", dots, "--classes", "0,1", "--steps", 2, "--method", "sde", "-o", "teacher.png")
    assert (drawn != pixels(Path("teacher.png"))).any()


def test_a_folder_is_described(dots: Path, tmp_path: Path) -> None:
    layout = registry.find("dots")
    found = describe(layout, dots)
    assert found is not None
    assert (found.num_classes, set(found.layers)) == (4, {"first", "last"})
    check_weights(layout, dots / "network/diffusion_pytorch_model.safetensors", found.layers)
    with pytest.raises(ValueError, match="lacks first"):
        check_weights(layout, dots / "network/diffusion_pytorch_model.safetensors", ["first.0", "last"])
    assert network_fingerprint(layout, dots) == network_fingerprint(layout, dots)
    config = dots / "network/config.json"
    config.write_text(json.dumps({"_class_name": "DotsNetwork"}))
    with pytest.raises(ValueError, match="is damaged: there is no entry 'num_classes'"):
        describe(layout, dots)


def test_the_program_draws(dots: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    generate("--model", dots, "--classes", "1,2", "--per-class", 1, "--steps", 2, "--seed", 7, "-o", tmp_path / "a.png")
    family = dmdr_models.load("dots", dots)
    noise = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(8))
    latents = dmdr_models.sample(family, family.load_network(), family.condition([2]), noise, num_steps=2)
    expected = (family.decode(latents)[0].permute(1, 2, 0) * 255).round().numpy()
    assert same_picture(pixels(tmp_path / "a.png")[20:36, 2:18], expected.astype("uint8"))
    with pytest.raises(SystemExit):
        generate("--model", dots, "--vae", dots, "--classes", "1", "-o", tmp_path / "b.png")
    assert "vae: the family dots has no such option" in capsys.readouterr().err


def test_help_imports_neither_torch_nor_a_family(dots: Path, site: Path) -> None:
    code = """
import sys
from dmdr_models.generate import main
try:
    main(["--help"])
except SystemExit:
    print([name for name in sys.modules if name in ("torch", "diffusers") or name.endswith(".family")])
"""
    path = [str(site), *(str(path) for path in ROOT.glob("packages/*/src"))]
    command = [sys.executable, "-c", f"import sys; sys.path[:0] = {path}\n{code}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr
    assert "(default: dots 1, sd3 4, sdxl 1, sit 1)" in " ".join(done.stdout.split())
    assert "dots, sd3, sdxl, sit (default: what the folder holds)" in " ".join(done.stdout.split())


# -- the own sampler, of texts

SLOW = """
from dataclasses import replace

from dmdr_models.folder.layout import Layout
from dmdr_models.sd3.layout import LAYOUT as SD3

LAYOUT = Layout("slow", SD3.parts, SD3.opens, takes="texts", max_tokens=SD3.max_tokens)
"""


def test_texts_without_a_pipeline(site: Path, sd3_model: Path, tmp_path: Path) -> None:
    install(site, "other", {"layout": SLOW}, "slow = other.layout:LAYOUT")
    assert isinstance(registry.find("slow").drawing(), OwnSampler)
    asked = ["--family", "slow", "--model", sd3_model, "--size", 48, "--max-tokens", 9, "--steps", 2, "--shift", 2]
    generate(*asked, "a red circle", "a cat", "-o", tmp_path / "a.png")
    generate(*asked, "a cat", "--seed", 1, "-o", tmp_path / "b.png")
    assert same_picture(pixels(tmp_path / "a-00001.png"), pixels(tmp_path / "b.png"))
    family = dmdr_models.load("slow", sd3_model, resolution=48, max_tokens=9)
    noise = torch.randn(1, 16, 6, 6, generator=torch.Generator().manual_seed(1))
    latents = dmdr_models.sample(family, family.load_network(), family.condition(["a cat"]), noise, 2, shift=2.0)
    expected = (family.decode(latents)[0].permute(1, 2, 0) * 255).round().numpy()
    assert same_picture(pixels(tmp_path / "b.png"), expected.astype("uint8"))


def test_the_shift_is_the_familys_own_unless_given(site: Path, sd3_model: Path, tmp_path: Path) -> None:
    install(site, "other", {"layout": SLOW}, "slow = other.layout:LAYOUT")
    for name, options in {"own": [], "three": ["--shift", 3], "one": ["--shift", 1]}.items():
        generate("--family", "slow", "--model", sd3_model, "a", "--steps", 2, *options, "-o", tmp_path / f"{name}.png")
    own, three, one = (pixels(tmp_path / f"{name}.png") for name in ("own", "three", "one"))
    assert same_picture(own, three)
    assert (own != one).any()


def test_a_student_of_texts_without_a_pipeline(sd3, tmp_path: Path) -> None:
    """It lacks the text encoders, so that its card names the model, too."""
    students = NetworkStudents(sd3)
    assert students.sampling == {"size": 32, "max_tokens": 128}
    told = students.usage(tmp_path, {}, device="cuda", dtype="bfloat16")
    asked = f'--model {sd3.path} --weights {tmp_path} "a photo of a fox in the snow" --device cuda --dtype bf16'
    assert told == f"    dmdr-generate --family sd3 {asked} -o fox.png\n"


def test_a_layout_is_read_in_order() -> None:
    layout = Layout("a", {"unet": ("A", "B"), "vae": (), "text_encoder": ("C",), "text_encoder_2": ()}, "a:A")
    assert (layout.network_part, layout.network_classes) == ("unet", ("A", "B"))
    assert list(layout.text_encoders) == ["text_encoder", "text_encoder_2"]
