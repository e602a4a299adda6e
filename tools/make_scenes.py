"""Make the files of the text-to-image problem from drawn pictures: VAE, text encoders, teacher, reward, classifier.

    python tools/make_scenes.py                    # everything, in order; each part prints its seconds
    python tools/make_scenes.py --only teacher     # one part, from the parts already there

Writes to packages/dmdr-train/src/dmdr_train/problems/scenes/. Weights are stored in half precision, so
that all files together stay under 16 MB.
"""

import argparse
from pathlib import Path

from scene_parts.drawn_pictures import make_vae
from scene_parts.reward_model import make_reward
from scene_parts.scene_classifier import make_classifier
from scene_parts.teachers import make_teacher, make_teacher_sdxl
from scene_parts.text_encoders import make_text
from small_models import (
    run_parts,
)

PARTS = ("vae", "text", "teacher", "reward", "classifier", "teacher_sdxl")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=PARTS, help="make only this part")
    parser.add_argument("--teacher-steps", type=int, default=6_000)
    parser.add_argument("--teacher-sdxl-steps", type=int, default=5_500)
    parser.add_argument("--snapshots", type=Path, help="also save the teacher to this folder every 1,000 steps")
    args = parser.parse_args()
    parts = {
        "vae": make_vae,
        "text": make_text,
        "teacher": lambda: make_teacher(args.teacher_steps, args.snapshots),
        "reward": lambda: make_reward(steps=2400),
        "classifier": lambda: make_classifier(steps=2500),
        "teacher_sdxl": lambda: make_teacher_sdxl(args.teacher_sdxl_steps, args.snapshots),
    }
    run_parts(parts, args.only)


if __name__ == "__main__":
    main()
