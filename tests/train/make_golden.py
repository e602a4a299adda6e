"""Write golden_losses.json: the losses of ten steps of a tiny run with everything switched on.

    OMP_NUM_THREADS=1 DS_ACCELERATOR=cpu python tests/train/make_golden.py

Run it after a change that is meant to change numbers, and say so in the changelog.
"""

import json
import tempfile
from pathlib import Path

import torch

FILE = Path(__file__).with_name("golden_losses.json")
KEYS = ("loss/fake_score", "loss/distribution_matching", "loss/refl", "teacher_scale")


def losses(folder: Path) -> list[dict[str, float]]:
    """Train ten steps on models written to `folder`; the process group must be up."""
    from dmdr_models import tiny
    from dmdr_train.recipe.schema import Recipe
    from dmdr_train.run.build import build

    reward = {"name": "class-label", "checkpoint": str(tiny.classifier(folder / "classifier"))}
    recipe = Recipe.model_validate(
        {
            "model": {
                "family": "sit",
                "path": str(tiny.sit(folder / "sit")),
                "fake_score_lora": {"rank": 8, "alpha": 32, "targets": ["to_q", "to_v", "fc1"]},
            },
            "rollout": {"steps": 2, "mode": "sde", "shift": 2.0},
            "objectives": [
                {"kind": "distribution_matching"},
                {"kind": "refl", "weight": 0.1, "margin": 0.0, "start": 5, "reward": reward},
            ],
            "guidance": {"ratio": 3, "cfg": 2.0, "cfg_jitter": 0.5, "dynamics": {"steps": 8}},
            "optim": {
                "batch_size": 4,
                "accumulation": 2,
                # A coarse eps: otherwise Adam makes whole steps of what differs between machines, the sign of a 0.
                "generator": {"lr": 1e-2, "eps": 1e-3, "schedule": "cosine", "warmup": 2},
                "fake_score": {"lr": 3e-2, "eps": 1e-2},
            },
            "run": {"output": "unused", "steps": 10, "seed": 11, "device": "cpu"},
        }
    )
    trainer = build(recipe, torch.device("cpu"))
    rows = [trainer.train_step() for _ in range(recipe.run.steps)]
    return [{key: row[key] for key in KEYS if key in row} for row in rows]


def main() -> None:
    from dmdr_train.distributed.process_group import start_processes

    start_processes(torch.device("cpu"))
    with tempfile.TemporaryDirectory() as folder:
        rows = losses(Path(folder))
    FILE.write_text("[\n" + ",\n".join(f"  {json.dumps(row)}" for row in rows) + "\n]\n")
    print(f"Wrote {FILE}")


if __name__ == "__main__":
    main()
