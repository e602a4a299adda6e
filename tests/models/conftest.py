import json
import math
import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor


def positions(width: int, grid: int) -> Tensor:
    """The fixed position embedding, one number at a time: column first, then row, each sin then cos."""
    quarter = width // 4
    table = torch.zeros(grid * grid, width, dtype=torch.float64)
    for row in range(grid):
        for column in range(grid):
            for half, place in ((0, column), (1, row)):
                for i in range(quarter):
                    angle = place / 10000 ** (i / quarter)
                    table[row * grid + column, half * 2 * quarter + i] = math.sin(angle)
                    table[row * grid + column, half * 2 * quarter + quarter + i] = math.cos(angle)
    return table


def shapes(
    width: int,
    depth: int,
    heads: int,
    patch: int,
    *,
    sample_size: int = 32,
    channels: int = 4,
    outputs: int = 4,
    rows: int = 1001,
    qk_norm: bool = False,
    projectors: bool = False,
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a published state dict, as its authors' modules spell them."""
    named: dict[str, tuple[int, ...]] = {
        "pos_embed": (1, (sample_size // patch) ** 2, width),
        "x_embedder.proj.weight": (width, channels, patch, patch),
        "x_embedder.proj.bias": (width,),
        "t_embedder.mlp.0.weight": (width, 256),
        "t_embedder.mlp.0.bias": (width,),
        "t_embedder.mlp.2.weight": (width, width),
        "t_embedder.mlp.2.bias": (width,),
        "y_embedder.embedding_table.weight": (rows, width),
        "final_layer.linear.weight": (patch * patch * outputs, width),
        "final_layer.linear.bias": (patch * patch * outputs,),
        "final_layer.adaLN_modulation.1.weight": (2 * width, width),
        "final_layer.adaLN_modulation.1.bias": (2 * width,),
    }
    for n in range(depth):
        linears = {
            "attn.qkv": (3 * width, width),
            "attn.proj": (width, width),
            "mlp.fc1": (4 * width, width),
            "mlp.fc2": (width, 4 * width),
            "adaLN_modulation.1": (6 * width, width),
        }
        for name, shape in linears.items():
            named[f"blocks.{n}.{name}.weight"] = shape
            named[f"blocks.{n}.{name}.bias"] = shape[:1]
        if qk_norm:
            for name in ("q_norm", "k_norm"):
                named[f"blocks.{n}.attn.{name}.weight"] = (width // heads,)
                named[f"blocks.{n}.attn.{name}.bias"] = (width // heads,)
    if projectors:
        for n, shape in ((0, (16, width)), (2, (16, 16)), (4, (6, 16))):
            named[f"projectors.0.{n}.weight"] = shape
            named[f"projectors.0.{n}.bias"] = shape[:1]
    return named


def state(*args, seed: int = 0, std: float = 0.08, **kwargs) -> dict[str, Tensor]:
    """A published state dict with random weights, loud enough for every layer to be heard."""
    generator = torch.Generator().manual_seed(seed)
    named = shapes(*args, **kwargs)
    weights = {name: std * torch.randn(shape, generator=generator) for name, shape in named.items()}
    grid = math.isqrt(named["pos_embed"][1])
    weights["pos_embed"] = positions(named["pos_embed"][2], grid)[None].float()
    return weights


def forward(weights: dict[str, Tensor], x: Tensor, t: Tensor, y: Tensor, heads: int) -> Tensor:
    """The published network's output, all its channels, in float64, from its paper and key names alone."""
    w = {name: tensor.double() for name, tensor in weights.items()}
    x = x.double()
    kernel = w["x_embedder.proj.weight"]
    width, patch = kernel.shape[0], kernel.shape[-1]
    grid = x.shape[-1] // patch
    outputs = w["final_layer.linear.bias"].shape[0] // patch**2

    def linear(name: str, value: Tensor) -> Tensor:
        return value @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def silu(value: Tensor) -> Tensor:
        return value / (1 + torch.exp(-value))

    def gelu(value: Tensor) -> Tensor:
        return value * (1 + torch.tanh(math.sqrt(2 / math.pi) * (value + 0.044715 * value**3))) / 2

    def normalised(value: Tensor, eps: float) -> Tensor:
        centred = value - value.mean(dim=-1, keepdim=True)
        return centred / (centred.square().mean(dim=-1, keepdim=True) + eps).sqrt()

    # Times and their features are float32 in the published code.
    frequencies = torch.exp(-math.log(10000) * torch.arange(128, dtype=torch.float32) / 128)
    angles = t.float().reshape(-1, 1) * frequencies
    features = torch.cat([torch.cos(angles), torch.sin(angles)], dim=1).double()
    condition = linear("t_embedder.mlp.2", silu(linear("t_embedder.mlp.0", features)))
    condition = condition + w["y_embedder.embedding_table.weight"][y]

    tokens = []
    for i in range(grid):
        for j in range(grid):
            piece = x[:, :, i * patch : (i + 1) * patch, j * patch : (j + 1) * patch]
            tokens.append(torch.einsum("bcij,dcij->bd", piece, kernel) + w["x_embedder.proj.bias"])
    h = torch.stack(tokens, dim=1) + w["pos_embed"]

    depth = 1 + max(int(name.split(".")[1]) for name in w if name.startswith("blocks."))
    for n in range(depth):
        block = f"blocks.{n}"
        six = linear(f"{block}.adaLN_modulation.1", silu(condition))[:, None].split(width, dim=-1)
        qkv = linear(f"{block}.attn.qkv", normalised(h, 1e-6) * (1 + six[1]) + six[0])
        size = width // heads
        mixed = []
        for head in range(heads):
            q, k, v = (qkv[..., part * width + head * size :][..., :size] for part in range(3))
            if f"{block}.attn.q_norm.weight" in w:
                q = normalised(q, 1e-5) * w[f"{block}.attn.q_norm.weight"] + w[f"{block}.attn.q_norm.bias"]
                k = normalised(k, 1e-5) * w[f"{block}.attn.k_norm.weight"] + w[f"{block}.attn.k_norm.bias"]
            scores = torch.einsum("bid,bjd->bij", q, k) / math.sqrt(size)
            mixed.append(torch.softmax(scores, dim=-1) @ v)
        h = h + six[2] * linear(f"{block}.attn.proj", torch.cat(mixed, dim=-1))
        inner = gelu(linear(f"{block}.mlp.fc1", normalised(h, 1e-6) * (1 + six[4]) + six[3]))
        h = h + six[5] * linear(f"{block}.mlp.fc2", inner)

    shift, scale = linear("final_layer.adaLN_modulation.1", silu(condition))[:, None].split(width, dim=-1)
    patches = linear("final_layer.linear", normalised(h, 1e-6) * (1 + scale) + shift)
    picture = torch.zeros(len(x), outputs, grid * patch, grid * patch, dtype=torch.float64)
    for i in range(grid):
        for j in range(grid):
            for p in range(patch):
                for q in range(patch):
                    start = (p * patch + q) * outputs
                    pixel = patches[:, i * grid + j, start : start + outputs]
                    picture[:, :, i * patch + p, j * patch + q] = pixel
    return picture


@pytest.fixture(scope="session")
def published() -> SimpleNamespace:
    """The published networks, written independently of the package."""
    return SimpleNamespace(positions=positions, shapes=shapes, state=state, forward=forward)


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny SiT; tests must not change it."""
    from dmdr_models import tiny

    return tiny.sit(tmp_path_factory.mktemp("model") / "sit")


@pytest.fixture
def family(model: Path):
    import dmdr_models

    return dmdr_models.load("sit", model)


@pytest.fixture
def noise() -> torch.Generator:
    return torch.Generator().manual_seed(3)


@pytest.fixture(scope="session")
def sd3_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny SD3; tests must not change it."""
    from dmdr_models import tiny

    return tiny.sd3(tmp_path_factory.mktemp("model") / "sd3")


@pytest.fixture
def sd3(sd3_model: Path):
    import dmdr_models

    return dmdr_models.load("sd3", sd3_model)


@pytest.fixture
def pipeline(sd3_model: Path):
    """The tiny SD3 as stock diffusers sees it."""
    return stock("StableDiffusion3Pipeline", sd3_model)


def stock(kind: str, folder: Path):
    import diffusers

    pipeline = getattr(diffusers, kind).from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def adapter(sd3):
    """A LoRA on the tiny SD3 as after some training, with an alpha that is not its rank."""
    from dmdr_models.networks.lora import LoRANetwork

    generator = torch.Generator().manual_seed(5)
    lora = LoRANetwork(sd3.load_network(), rank=4, alpha=6, targets=sd3.lora_targets, generator=generator)
    for name, parameter in lora.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=0.3, generator=generator)
    return lora


@pytest.fixture(scope="session")
def sdxl_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny SDXL; tests must not change it."""
    from dmdr_models import tiny

    return tiny.sdxl(tmp_path_factory.mktemp("model") / "sdxl")


@pytest.fixture(scope="session")
def taesd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny AutoencoderTiny; tests must not change it."""
    from dmdr_models import tiny

    return tiny.taesd(tmp_path_factory.mktemp("model") / "taesd")


@pytest.fixture
def sdxl(sdxl_model: Path):
    import dmdr_models

    return dmdr_models.load("sdxl", sdxl_model)


@pytest.fixture
def xl_pipeline(sdxl_model: Path):
    """The tiny SDXL as stock diffusers sees it."""
    return stock("StableDiffusionXLPipeline", sdxl_model)


@pytest.fixture
def draw_as_told():
    """Runs the command of a student's card, in the folder above the student, and returns the picture."""
    import numpy as np
    from dmdr_models.generate import main
    from PIL import Image

    def draw(usage: str, family: str, sampling: dict) -> np.ndarray:
        Path("student/dmdr.json").write_text(json.dumps({"family": family, **sampling}))
        program, *command = shlex.split(usage.splitlines()[0])
        assert program == "dmdr-generate"
        main([*command, "-o", "ours.png"])
        return np.asarray(Image.open("ours.png"))

    return draw
