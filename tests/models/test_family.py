import json
import shutil

import dmdr_models
import pytest
import torch
from dmdr_models import tiny
from dmdr_models.base.errors import ModelsError
from dmdr_models.families.protocols import Family, Students
from dmdr_models.folder.fingerprints import content_fingerprint
from dmdr_models.folder.state_dicts import save_state_dict
from dmdr_models.sit.transformer import SiTTransformer, preset
from safetensors.torch import load_file, save_file


def test_facts_of_the_model(family):
    assert (family.layout.name, family.size, family.num_classes) == ("sit", (32, 32), 10)
    assert family.latent_shape(32, 32) == (4, 4, 4)
    for height, width, shown in ((64, 64, "64"), (32, 64, "32x64")):
        with pytest.raises(ValueError, match=f"resolution {shown}: this sit model draws 32 pixels only"):
            family.latent_shape(height, width)
    assert family.process.t_end == 0.0
    assert family.lora_targets == ("to_q", "to_v")


def test_every_family_has_the_whole_interface(family, sd3, sdxl):
    both = [{*vars(each), *each.__annotations__} for each in (Family, Students)]
    public, of_students = ({name for name in names if not name.startswith("_")} for names in both)
    assert {"grid", "predict", "latent_shape", "students", "text"} < public
    assert {"keeps_lora", "save_lora", "usage"} < of_students
    for one, lacks in ((family, {"text"}), (sd3, set()), (sdxl, set())):
        assert {name for name in public if not hasattr(one, name)} == lacks, one.layout.name
        assert all(hasattr(one.students, name) for name in of_students), one.layout.name


def test_presets():
    assert preset("SiT-XL/2") == {"width": 1152, "depth": 28, "num_heads": 16, "patch_size": 2}
    assert preset("S/8") == {"width": 384, "depth": 12, "num_heads": 6, "patch_size": 8}
    for wrong in ("SiT-XXL/2", "XL/3", "XL"):
        with pytest.raises(ValueError, match=r"is not a SiT; valid are"):
            preset(wrong)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"sample_size": 5, "patch_size": 2}, "sample_size 5 is not a multiple of patch_size 2"),
        ({"width": 30, "num_heads": 3}, "width 30 must be a multiple of 4"),
        ({"width": 32, "num_heads": 3}, "of num_heads 3"),
    ],
)
def test_impossible_networks(config, message):
    with pytest.raises(ValueError, match=message):
        SiTTransformer(**{"depth": 1, **config})


def test_a_new_network_predicts_zero():
    network = SiTTransformer(sample_size=4, width=16, depth=2, num_heads=2)
    x = torch.randn(2, 4, 4, 4)
    assert torch.equal(network(x, torch.rand(2), torch.tensor([0, 1000])), torch.zeros_like(x))


def test_labels(family):
    assert family.condition([0, 9])["class_labels"].tolist() == [0, 9]
    assert family.condition(torch.tensor([3], dtype=torch.int32))["class_labels"].dtype == torch.int64
    assert family.null_condition(2)["class_labels"].tolist() == [10, 10]
    for wrong, message in {10: "10 is out of range; valid are 0 to 9", -1: "-1 is out of range"}.items():
        with pytest.raises(ValueError, match=message):
            family.condition([2, wrong])
    for wrong in ([1.0], ["dog"], [[1]], [True], [], 3):
        with pytest.raises(ValueError, match="must be a list of whole numbers"):
            family.condition(wrong)


def test_labels_reach_the_network(family, noise):
    network = family.load_network()
    x, t = torch.randn(3, 4, 4, 4, generator=noise), torch.full((3,), 0.5)
    batch = family.predict(network, x, t, family.condition([1, 2, 1]))
    same = family.predict(network, x[[0, 0, 0]], t, family.condition([1, 2, 1]))
    torch.testing.assert_close(same[0], same[2], atol=1e-6, rtol=1e-5)  # a kernel may treat a batch's last rows alone
    assert not torch.allclose(same[0], same[1], atol=1e-4)
    alone = family.predict(network, x[1:2], t[:1], family.condition([2]))
    torch.testing.assert_close(batch[1:2], alone, atol=1e-6, rtol=1e-5)


def test_networks_are_copies_in_float32(family, noise):
    one, other = family.load_network(), family.load_network()
    assert not one.training
    assert {p.dtype for p in one.parameters()} == {torch.float32}
    one.proj_out.bias.data.add_(1)
    assert not torch.equal(one.proj_out.bias, other.proj_out.bias)
    x = torch.randn(2, 4, 4, 4, generator=noise)
    prediction = family.predict(one.bfloat16(), x, torch.tensor([0.626, 1.0]), family.condition([1, 2]))
    assert prediction.dtype == torch.float32


def test_saved_weights(family, tmp_path):
    network = family.load_network()
    network.proj_out.bias.data.fill_(0.5)
    network.save_pretrained(tmp_path / "student/transformer")
    for place in ("student", "student/transformer"):
        loaded = family.load_network(tmp_path / place)
        assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), network.parameters(), strict=True))


def test_a_student_is_a_whole_model(family, model, tmp_path):
    """Of a family without a pipeline: a folder that opens without the model it was made from."""
    network = family.load_network()
    network.proj_out.bias.data.fill_(0.5)
    family.students.save(network, tmp_path / "student")
    student = dmdr_models.load("sit", tmp_path / "student")
    assert torch.equal(student.load_network().proj_out.bias, network.proj_out.bias)
    latents = torch.ones(1, 4, 4, 4)
    assert torch.equal(student.decode(latents), family.decode(latents))
    with pytest.raises(ModelsError, match=r"^the family sit keeps no LoRA: save network\.merged"):
        family.students.save_lora(None, tmp_path / "student")


def test_latents_are_scaled_and_shifted_by_hand(family, noise):
    family.vae.register_to_config(scaling_factor=0.25, shift_factor=0.5)
    images = torch.rand(2, 3, 32, 32, generator=noise)
    with torch.no_grad():
        raw = family.vae.encode(images * 2 - 1).latent_dist.mean
        torch.testing.assert_close(family.encode(images), (raw - 0.5) * 0.25)
        latents = torch.randn(2, 4, 4, 4, generator=noise)
        decoded = family.vae.decode(latents / 0.25 + 0.5).sample
        torch.testing.assert_close(family.decode(latents), ((decoded + 1) / 2).clamp(0, 1))
        family.vae.register_to_config(shift_factor=None)
        torch.testing.assert_close(family.encode(images), raw * 0.25)


def test_gradients_flow_through_the_decoder_and_not_into_it(family, noise):
    latents = (0.1 * torch.randn(2, 4, 4, 4, generator=noise)).requires_grad_()
    images = family.decode(latents)
    assert images.shape == (2, 3, 32, 32)
    (gradient,) = torch.autograd.grad(images[0].sum(), latents, retain_graph=True)
    assert gradient[0].abs().max() > 0
    assert gradient[1].abs().max() == 0
    assert not any(p.requires_grad for p in family.vae.parameters())
    pictures = torch.rand(1, 3, 32, 32, generator=noise).requires_grad_()
    (gradient,) = torch.autograd.grad(family.encode(pictures).sum(), pictures)
    assert gradient.abs().max() > 0


def test_another_vae(model, tmp_path):
    shutil.copytree(model / "transformer", tmp_path / "bare/transformer")
    family = dmdr_models.load("sit", tmp_path / "bare", vae=model / "vae")
    assert family.decode(torch.zeros(1, 4, 4, 4)).shape == (1, 3, 32, 32)


def test_wrong_folders(model, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"unknown model family 'sd9'; did you mean sd3\? Valid are sd3, sdxl, sit"):
        dmdr_models.load("sd9", model)
    with pytest.raises(FileNotFoundError, match="no model folder"):
        dmdr_models.load("sit", tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="no folder here, nor a model on the hub"):
        dmdr_models.load("sit", "runs/none", vae=model / "vae")
    shutil.copytree(model / "transformer", tmp_path / "half/transformer")
    with pytest.raises(FileNotFoundError, match=r"holds no vae/config\.json"):
        dmdr_models.load("sit", tmp_path / "half")
    with pytest.raises(ValueError, match="holds a SiTTransformer, not a AutoencoderKL"):
        dmdr_models.load("sit", tmp_path / "half", vae=model / "transformer")
    shutil.copytree(model / "vae", tmp_path / "swapped/transformer")
    with pytest.raises(ValueError, match="holds a AutoencoderKL, not a SiTTransformer"):
        dmdr_models.load("sit", tmp_path / "swapped")


def test_wrong_weights(family, model, tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder"):
        family.load_network(tmp_path / "none")
    save_state_dict(family.load_network(), tmp_path / "sit.safetensors")
    loaded, own = family.load_network(tmp_path / "sit.safetensors"), family.load_network()
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), own.parameters(), strict=True))
    assert torch.equal(loaded.positions, own.positions), "which no file holds"
    with pytest.raises(ValueError, match="num_classes 5, the model 10"):
        family.load_network(tiny.sit(tmp_path / "five", num_classes=5))
    shutil.copytree(model / "transformer", tmp_path / "cut")
    file = tmp_path / "cut/diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    del weights["proj_out.bias"]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"do not fit their config: missing_keys: proj_out\.bias"):
        family.load_network(tmp_path / "cut")


@pytest.mark.bits
def test_tiny_models_are_reproducible(model, tmp_path):
    again, other = tiny.sit(tmp_path / "again"), tiny.sit(tmp_path / "other", seed=1)
    for part in ("transformer", "vae"):
        file = f"{part}/diffusion_pytorch_model.safetensors"
        assert (again / file).read_bytes() == (model / file).read_bytes()
        assert (other / file).read_bytes() != (model / file).read_bytes()
        assert json.loads((again / part / "config.json").read_text())["_class_name"]


def test_tiny_leaves_the_global_generator_alone(tmp_path):
    before = torch.get_rng_state()
    tiny.sit(tmp_path / "sit")
    assert torch.equal(torch.get_rng_state(), before)


def test_a_content_fingerprint_is_of_what_is_there(tmp_path):
    """The same wherever it lies; another for another byte, name or size; hidden files and other names do not count."""

    def made(name, files):
        for path, content in files.items():
            (tmp_path / name / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name / path).write_bytes(content)
        return content_fingerprint(tmp_path / name)

    large = bytes(6_000_000)
    first = made("a", {"x/config.json": b"{}", "weights": large})
    assert made("b", {"x/config.json": b"{}", "weights": large, ".cache/y": b"1", "x/.hidden": b"2"}) == first
    others = [
        made("c", {"x/config.json": b"[]", "weights": large}),
        made("d", {"y/config.json": b"{}", "weights": large}),
        made("e", {"x/config.json": b"{}", "weights": large + b"0"}),
        made("f", {"x/config.json": b"{}", "weights": large[:-1] + b"1"}),
        content_fingerprint(tmp_path / "a/weights"),
        content_fingerprint("owner/name"),
    ]
    assert len({first, *others}) == len(others) + 1
    assert content_fingerprint(tmp_path / "a/weights") == content_fingerprint(tmp_path / "b/weights")
