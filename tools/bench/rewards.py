"""Measure the speed of the ViT-H rewards, as ratios within one run.

    python tools/bench rewards FOLDER                                # makes random weights in FOLDER first, 8 GB
    python tools/bench rewards FOLDER --official OFFICIAL/bin/python   # also compare with the package hpsv2

tools/parity_rewards.py describes the environment OFFICIAL. With `--device cuda` everything runs on the GPU.
`--model FILE.json` uses a small architecture instead (open_clip's configuration), to try this program.

It compares:

    bare            open_clip's image tower in a loop over tensors on the device, with the same batch size
    dmdr-score      the program, from files on disk to the table; the speed that it prints, without loading weights
    hpsv2           the package's score(), called once per picture; it loads its checkpoint each time
"""

import argparse
import contextlib
import io
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import dmdr_rewards
import numpy as np
import open_clip
import torch
from dmdr_rewards import cli
from dmdr_rewards.networks.clip_towers import open_clip_config
from PIL import Image

HPS, DFN = "HPS_v2.1_compressed.pt", "open_clip_pytorch_model.bin"
PROMPT = "a photo of a cat on a red sofa"
OFFICIAL = """
import sys, time
from hpsv2 import img_score
made = img_score.create_model_and_transforms
img_score.create_model_and_transforms = lambda model, tag, **options: made(model, None, **options)
pictures = sys.argv[2:]
begin = time.perf_counter()
for picture in pictures:
    img_score.score(picture, PROMPT, cp=sys.argv[1])
print("seconds per picture", (time.perf_counter() - begin) / len(pictures))
"""


def make(folder: Path, model: str, count: int, side: int) -> list[Path]:
    """Write random weights in both formats if they do not exist, and pictures; return the pictures."""
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    if not (folder / DFN).exists():
        torch.manual_seed(0)
        state = open_clip.CLIP(**open_clip_config(model)).state_dict()
        torch.save({"state_dict": state}, folder / HPS)
        torch.save(state, folder / DFN)
    pictures = [folder / "pictures" / f"{index:03}.png" for index in range(count)]
    for index, path in enumerate(pictures):
        noise = np.random.default_rng(index).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((side, side), Image.Resampling.BICUBIC).save(path)
    return pictures


class Bench:
    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.device = torch.device(options.device)
        self.dtype = getattr(torch, options.dtype)
        self.pictures = make(options.folder, options.model, options.pictures, options.side)

    def program(self, *names: str) -> float:
        """Return the pictures per second that dmdr-score prints."""
        files = {"hpsv2.1": HPS, "dfn-clip": DFN}
        output = self.options.folder / "scores.jsonl"
        command = [str(self.options.folder / "pictures"), "--prompt", PROMPT, "-o", str(output), "--overwrite"]
        command += ["--device", self.options.device, "--dtype", self.options.dtype]
        command += ["--batch-size", str(self.options.batch_size), "--workers", str(self.options.workers)]
        for name in names:
            command += ["--reward", f"{name}={self.options.folder / files[name]}"]
            command += ["--option", f"{name}.model={self.options.model}"]
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            cli.main(command)
        found = re.search(r"([\d.e+-]+) pictures/s", printed.getvalue())
        assert found is not None, printed.getvalue()
        return float(found[1])

    def reward(self) -> Any:
        return dmdr_rewards.create(
            "hpsv2.1", self.options.folder / HPS, self.device, self.dtype, model=self.options.model
        )

    def bare(self) -> float:
        """Return the pictures per second of the bare tower on prepared tensors."""
        reward = self.reward()
        pixels = reward.pixels(self.pictures).split(self.options.batch_size)
        with torch.inference_mode(), self.autocast():
            seconds = self.seconds(lambda: [reward.tower.module(part) for part in pixels])
        return len(self.pictures) / seconds

    def training(self) -> tuple[float, float]:
        """Return the seconds of forward and backward: of the bare tower and of the reward."""
        reward = self.reward()
        size = reward.info.image_size
        images = torch.rand(self.options.train_batch, 3, *size, device=self.device, requires_grad=True)
        texts = reward.encode_text([PROMPT])

        def bare() -> None:
            with self.autocast():
                features = reward.tower.module((images - 0.45) / 0.27)
            (features.float() @ texts.T).sum().backward()

        def ours() -> None:
            reward.score(images, [PROMPT] * len(images)).sum().backward()

        times: dict[Callable[[], None], list[float]] = {bare: [], ours: []}
        for _ in range(self.options.repeats):
            for work, found in times.items():
                found.append(self.seconds(work))
        return min(times[bare]), min(times[ours])

    def official(self) -> float:
        """Return the pictures per second of the package's score(), called once per picture."""
        command = [
            self.options.official,
            "-c",
            OFFICIAL.replace("PROMPT", repr(PROMPT)),
            str(self.options.folder / HPS),
        ]
        pictures = [str(path) for path in self.pictures[: self.options.official_pictures]]
        done = subprocess.run([*command, *pictures], capture_output=True, text=True, check=True)
        return 1 / float(done.stdout.split()[-1])

    def seconds(self, work: Callable[[], Any]) -> float:
        self.wait()
        begin = time.perf_counter()
        work()
        self.wait()
        return time.perf_counter() - begin

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    @contextlib.contextmanager
    def autocast(self) -> Iterator[None]:
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            yield


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--official", help="a Python that has the package hpsv2")
    parser.add_argument("--official-pictures", type=int, default=2)
    parser.add_argument("--model", default="ViT-H-14")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--pictures", type=int, default=16)
    parser.add_argument("--side", type=int, default=512, help="side of the pictures, in pixels")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--train-batch", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=2, help="number of measurements; the best counts")
    parser.add_argument("--workers", type=int, default=1)
    bench = Bench(options := parser.parse_args())

    print(f"{options.model} on {options.device}, {options.dtype}, {torch.get_num_threads()} threads, "
          f"{options.pictures} pictures of {options.side}x{options.side}, batch {options.batch_size}, "
          f"torch {torch.__version__}\n")  # fmt: skip
    speeds: dict[str, list[float]] = {}
    for _ in range(options.repeats):
        for name, measure in {
            "bare tower": bench.bare,
            "dmdr-score hpsv2.1": lambda: bench.program("hpsv2.1"),
            "dmdr-score dfn-clip": lambda: bench.program("dfn-clip"),
            "dmdr-score both": lambda: bench.program("hpsv2.1", "dfn-clip"),
        }.items():
            speeds.setdefault(name, []).append(measure())
    best = {name: max(found) for name, found in speeds.items()}
    if options.official:
        best["hpsv2, per picture"] = bench.official()
    print("| what | pictures/s |\n|---|---:|")
    for name, speed in best.items():
        print(f"| {name} | {speed:.3g} |")

    bare, ours = bench.training()
    alone = 1 / best["dmdr-score hpsv2.1"] + 1 / best["dmdr-score dfn-clip"]
    print("\n| ratio | value |\n|---|---:|")
    print(f"| speed, dmdr-score hpsv2.1 / bare tower | {best['dmdr-score hpsv2.1'] / best['bare tower']:.3f} |")
    if options.official:
        print(f"| speed, dmdr-score hpsv2.1 / hpsv2 | {best['dmdr-score hpsv2.1'] / best['hpsv2, per picture']:.1f} |")
    print(f"| time, both together / one after the other | {1 / best['dmdr-score both'] / alone:.3f} |")
    print(f"| time, forward and backward / bare tower | {ours / bare:.3f} |")


if __name__ == "__main__":
    sys.exit(main())
