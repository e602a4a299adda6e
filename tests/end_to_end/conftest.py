"""Run the real commands in separate processes, on models that a test makes."""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

ROOT = Path(__file__).parents[2]
RUN = ROOT / "packages/dmdr-train/run.py"


@dataclass
class Workshop:
    """A folder with tiny models, recipes that use them, and run.py."""

    folder: Path
    recipe: dict[str, Any]
    python: Callable[..., Any]

    def run(self, *arguments: str, config: str = "recipe.yaml", **started: Any) -> Any:
        """Run `run.py --config RECIPE arguments`; the default is the workshop's own recipe."""
        self.write()
        return self.execute(str(RUN), "--config", config, *arguments, **started)

    def write(self) -> None:
        (self.folder / "recipe.yaml").write_text(yaml.safe_dump(self.recipe))

    def execute(self, *program: str, emulated: bool = False, **started: Any) -> Any:
        """Run a Python program in this folder; with `emulated`, the emulated device replaces a GPU."""
        if emulated:
            program = ("-m", "emulated", *program)
            started["PYTHONPATH"] = os.pathsep.join([str(ROOT / "tools"), os.environ.get("PYTHONPATH", "")])
        return self.python(*program, folder=self.folder, **started)

    def dmdr_train(self, *arguments: str, **started: Any) -> Any:
        return self.execute("-m", "dmdr_train", *arguments, **started)

    def snapshot(self) -> dict[str, tuple[int, int]]:
        """Return size and time of every file."""
        files = {p: p.lstat() for p in self.folder.rglob("*") if not p.is_dir()}
        found = {str(p.relative_to(self.folder)): (s.st_size, s.st_mtime_ns) for p, s in files.items()}
        found.pop("recipe.yaml", None)
        return found | {str(p.relative_to(self.folder)): (0, 0) for p in self.folder.rglob("*") if p.is_dir()}


def rows(run: Path) -> list[dict[str, float]]:
    """Read metrics.jsonl without its times."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if "seconds" not in k} for line in lines]


RECIPE: dict[str, Any] = {
    "model": {"family": "sit", "path": "sit", "fake_score_lora": {"rank": 4, "alpha": 4}},
    "rollout": {"steps": 2},
    "objectives": [
        {"kind": "distribution_matching"},
        {
            "kind": "refl",
            "weight": 0.1,
            "margin": 0.0,
            "start": 3,
            "reward": {"name": "class-label", "checkpoint": "classifier"},
        },
    ],
    "guidance": {"ratio": 2, "cfg": 1.5, "dynamics": {"steps": 3, "teacher_scale": 0.75}},
    "optim": {
        "batch_size": 4,
        "accumulation": 2,
        "generator": {"lr": 1e-3, "eps": 1e-4, "schedule": "cosine"},
        "fake_score": {"lr": 1e-3, "eps": 1e-4},
        "ema": 0.9,
    },
    "run": {"output": "out", "steps": 5, "checkpoint_every": 2, "keep_last": 3},
    "tracking": {"log_every": 1, "samples": {"count": 4, "every": 4}},
}


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny models: sit (and a wider one), classifier (and one of four classes), dinov2."""
    from dmdr_models import tiny

    folder = tmp_path_factory.mktemp("models")
    tiny.sit(folder / "sit")
    tiny.sit(folder / "wider", width=48)
    tiny.classifier(folder / "classifier")
    tiny.classifier(folder / "few", labels=4)
    write_dinov2(folder / "dinov2")
    return folder


@pytest.fixture(scope="session")
def write_texts() -> Callable[[Path], None]:
    """Write the other inputs of a text-to-image run: prompts.txt, and a tiny CLIP in open_clip's format."""
    import open_clip

    clip = {
        "embed_dim": 8,
        "vision_cfg": {"image_size": 16, "layers": 2, "width": 64, "patch_size": 8},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 1},
    }
    prompts = ("a cat", "a dog in a hat", "two red cubes", "a lighthouse at night", "an orange on a blue plate")

    def write(folder: Path) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            torch.save(open_clip.CLIP(**clip).state_dict(), folder / "clip.bin")
        (folder / "clip.json").write_text(json.dumps(clip))
        (folder / "prompts.txt").write_text("".join(f"{prompt}\n" for prompt in prompts))

    return write


@pytest.fixture(scope="session")
def make_workshop(python: Callable[..., Any]) -> Callable[..., Workshop]:
    return partial(Workshop, python=python)


@pytest.fixture(scope="session")
def open_workshop(models: Path, make_workshop: Callable[..., Workshop]) -> Callable[[Path], Workshop]:
    def open_workshop(folder: Path) -> Workshop:
        """A workshop with the tiny models and its own recipe."""
        folder.mkdir(exist_ok=True)
        for model in models.iterdir():
            (folder / model.name).symlink_to(model)
        return make_workshop(folder, json.loads(json.dumps(RECIPE)))

    return open_workshop


@pytest.fixture
def workshop(open_workshop: Callable[[Path], Workshop], tmp_path: Path) -> Workshop:
    return open_workshop(tmp_path)


@pytest.fixture(scope="session")
def finished(
    open_workshop: Callable[[Path], Workshop], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Workshop, Any]:
    """A complete run with plain python and an evaluation; tests must not change it."""
    workshop = open_workshop(tmp_path_factory.mktemp("finished"))
    workshop.recipe["tracking"]["evaluation"] = {
        "classifier": "classifier",
        "reference": "shapes",
        "pictures": 100,
        "teacher_steps": [3, 1],
    }
    return workshop, workshop.run(launcher="python").check()


def assert_same_numbers(found: list[dict[str, float]], expected: list[dict[str, float]]) -> None:
    """Check that the losses of two runs, and their parts, are equal at every step up to rounding."""
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        keys = [key for key in theirs if key.startswith(("loss/", "reward/", "weight/", "grad_norm/d"))]
        assert keys
        for key in keys:
            assert ours[key] == pytest.approx(theirs[key], rel=2e-3, abs=1e-6), (ours["step"], key)


@pytest.fixture(scope="session")
def same_numbers() -> Callable[[list[dict[str, float]], list[dict[str, float]]], None]:
    return assert_same_numbers


@pytest.fixture(scope="session")
def read_rows() -> Callable[[Path], list[dict[str, float]]]:
    return rows


def write_dinov2(folder: Path, width: int = 64, depth: int = 4, patch: int = 4, grid: int = 4) -> None:
    """Write a backbone and a four-layer head in torch.hub's layout, for ten classes."""
    generator = torch.Generator().manual_seed(6)

    def draw(*shape: int) -> torch.Tensor:
        return 0.2 * torch.randn(shape, generator=generator)

    state = {
        "cls_token": draw(1, 1, width),
        "pos_embed": draw(1, 1 + grid * grid, width),
        "mask_token": draw(1, width),
        "patch_embed.proj.weight": draw(width, 3, patch, patch),
        "patch_embed.proj.bias": draw(width),
        "norm.weight": 1 + draw(width),
        "norm.bias": draw(width),
    }
    linears = {"attn.qkv": (3 * width, width), "attn.proj": (width, width)}
    linears |= {"mlp.fc1": (4 * width, width), "mlp.fc2": (width, 4 * width)}
    for block in range(depth):
        for name, shape in linears.items():
            state[f"blocks.{block}.{name}.weight"] = draw(*shape)
            state[f"blocks.{block}.{name}.bias"] = draw(shape[0])
        for name in ("norm1", "norm2"):
            state[f"blocks.{block}.{name}.weight"] = 1 + draw(width)
            state[f"blocks.{block}.{name}.bias"] = draw(width)
        for name in ("ls1", "ls2"):
            state[f"blocks.{block}.{name}.gamma"] = 1 + draw(width)
    folder.mkdir()
    torch.save(state, folder / "backbone.pth")
    torch.save({"weight": draw(10, 5 * width), "bias": draw(10)}, folder / "head.pth")
