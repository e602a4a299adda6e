"""Where a run writes what it measures: metrics.jsonl, TensorBoard, W&B and the progress bar. Rank 0 alone has one.

None of them may end a training. Rows that cannot be written to metrics.jsonl are kept and written later; a tracker that
fails is left out from then on.
"""

import contextlib
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from dmdr_rewards.base.safe_reading import from_json
from dmdr_rewards.base.secrets import redacted
from PIL import Image
from tqdm import tqdm

from dmdr_train.base.atomic_files import settle, write_whole
from dmdr_train.recipe import schema

METRICS = "metrics.jsonl"


class Rows:
    """metrics.jsonl: a line of JSON per row, whole lines only.

    After a resume, rows of steps that will be made again are dropped first, and lines that are none.

    Args:
        carried: rows that came with the checkpoint, since they could not be written.
    """

    def __init__(self, path: Path, start: int, carried: Sequence[Mapping[str, float]] = ()):
        self.path = path
        self.waiting: list[str] = []
        found = read_metrics(path.parent)
        known = {row["step"] for row in found}
        if path.exists():
            if lost := path.read_bytes().count(b"\n") - len(found):
                print(f"warning: {lost} lines of {path} cannot be read, and are removed", file=sys.stderr, flush=True)
            kept = [json.dumps(row) for row in found if row["step"] <= start]
            write_whole(path, lambda new: new.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8"))
        for row in carried:
            if row["step"] not in known:
                self.add(row)

    def add(self, row: Mapping[str, float]) -> None:
        self.waiting.append(json.dumps(row))
        self.write()

    def write(self) -> None:
        """Append the rows that wait. Where that fails they go on waiting."""
        with contextlib.suppress(OSError):
            self.finish()

    def finish(self) -> None:
        """Append the rows that wait.

        Raises:
            OSError: that cannot be; the file is as it was.
        """
        if not self.waiting:
            return
        size = self.path.stat().st_size if self.path.exists() else 0
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write("".join(f"{line}\n" for line in self.waiting))
        except OSError:
            with contextlib.suppress(OSError):
                os.truncate(self.path, size)
            raise
        self.waiting = []

    def settle(self) -> None:
        """Put what was written on the disk: a checkpoint that follows is not to be without its rows."""
        with contextlib.suppress(OSError):
            settle(self.path)


class Tracker:
    """Takes the rows of a run, its pictures and its words."""

    def __init__(self, folder: Path, settings: schema.Recipe, start: int, carried: Sequence[Mapping[str, float]] = ()):
        self.rows = Rows(folder / METRICS, start, carried)
        self.bar = tqdm(total=settings.run.steps, initial=start, unit="step", dynamic_ncols=True)
        self.others: dict[str, Any] = {}
        if settings.tracking.tensorboard:
            self._open("tensorboard", lambda: TensorBoard(folder / "tensorboard", start))
        if settings.tracking.wandb:
            self._open("wandb", lambda: WandB(folder, settings))

    def advance(self) -> None:
        with contextlib.suppress(OSError):  # the terminal's
            self.bar.update()

    def log(self, step: int, values: Mapping[str, float]) -> None:
        waited = bool(self.rows.waiting)
        self.rows.add({"step": step, **values})
        if self.rows.waiting and not waited:
            self.say(f"warning: {self.rows.path} cannot be written; its rows are kept in memory until it can")
        shown = {k.partition("/")[2]: f"{v:.3g}" for k, v in values.items() if k.startswith(("loss/", "reward/"))}
        with contextlib.suppress(OSError):
            self.bar.set_postfix(shown)
        self._each(lambda tracker: tracker.log(step, values))

    def picture(self, step: int, name: str, image: Image.Image) -> None:
        self._each(lambda tracker: tracker.picture(step, name, image))

    def warn(self, step: int, text: str) -> None:
        """An alarm of early warning."""
        self.say(text)
        self._each(lambda tracker: tracker.warn(step, text))

    def say(self, text: str) -> None:
        with contextlib.suppress(OSError):
            self.bar.write(redacted(text))

    def close(self) -> None:
        """Write what waits, and end the trackers.

        Rows that still cannot be written are printed, since they are nowhere else.
        """
        with contextlib.suppress(OSError):
            self.bar.close()
        self._each(lambda tracker: tracker.close())
        self.rows.write()
        for row in self.rows.waiting:
            print(row)

    def _open(self, name: str, make: Callable[[], Any]) -> None:
        try:
            self.others[name] = make()
        except Exception as error:  # whatever a tracker's client, its network or its disk come up with
            self._left_out(name, error)

    def _each(self, use: Callable[[Any], object]) -> None:
        for name, tracker in list(self.others.items()):
            try:
                use(tracker)
            except Exception as error:
                del self.others[name]
                self._left_out(name, error)

    def _left_out(self, name: str, error: Exception) -> None:
        self.say(f"warning: tracking.{name} failed ({error}) and is left out from here on; {METRICS} has all rows")


class TensorBoard:
    def __init__(self, folder: Path, start: int):
        from torch.utils.tensorboard import SummaryWriter

        self.writer: Any = SummaryWriter(str(folder), purge_step=start + 1)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def picture(self, step: int, name: str, image: Image.Image) -> None:
        self.writer.add_image(name, np.asarray(image), step, dataformats="HWC")

    def warn(self, step: int, text: str) -> None:
        self.writer.add_text("watch/alarm", text, step)

    def close(self) -> None:
        self.writer.close()


class WandB:
    """Weights & Biases; where its server cannot be reached, its offline mode, which `wandb sync` sends later."""

    def __init__(self, folder: Path, settings: schema.Recipe):
        import wandb

        self.wandb: Any = wandb
        options = {"project": settings.tracking.wandb, "dir": str(folder), "config": settings.model_dump(mode="json")}
        try:
            self.run = wandb.init(**options)
        except wandb.Error:
            self.run = wandb.init(**options, mode="offline")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log(dict(values), step=step)

    def picture(self, step: int, name: str, image: Image.Image) -> None:
        self.run.log({name: self.wandb.Image(image)}, step=step)

    def warn(self, step: int, text: str) -> None:
        self.run.alert(title="early warning", text=text)

    def close(self) -> None:
        self.run.finish()


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """The rows of a run's metrics.jsonl; empty if there is none.

    Lines that are no rows are left out: a last one that was cut off, or what a machine that lost its power has left.
    """
    path = folder / METRICS
    if not path.exists():
        return []
    rows = []
    for line in path.read_bytes().split(b"\n")[:-1]:
        with contextlib.suppress(ValueError):
            rows += [row] if _is_row(row := from_json(line)) else []
    return rows


def _is_row(found: Any) -> bool:
    values = found.values() if isinstance(found, dict) else [None]
    return all(isinstance(value, int | float) for value in values) and isinstance(found.get("step"), int)
