"""The tracker of a run: it writes metrics.jsonl, shows the progress, and calls the trackers of the recipe.

Only rank 0 has one. No failure in it ends a training: rows that cannot be written to metrics.jsonl are kept and written
later, and a tracker that fails is not called again.
"""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from dmdr_rewards.base.secrets import redacted
from PIL import Image

from dmdr_train.recipe.schema import Recipe
from dmdr_train.tracking.metrics_file import METRICS, Rows, read_metrics
from dmdr_train.tracking.progress import Progress
from dmdr_train.tracking.registry import chosen
from dmdr_train.tracking.terminal import View, open_view
from dmdr_train.tracking.tracker import Tracker


def open_tracker(
    folder: Path,
    settings: Recipe,
    start: int,
    carried: Sequence[Mapping[str, float]] = (),
    callbacks: Sequence[Tracker] = (),
) -> "RunTracker":
    """Open the tracker of a run in its folder.

    Rows of metrics.jsonl after step `start` are dropped, since the run logs these steps again.

    Args:
        start: the step that the run starts from; 0 for a new run.
        carried: rows that were saved with the checkpoint; those that the file lacks are added.
        callbacks: trackers that are called beside the recipe's own.

    Raises:
        OSError: metrics.jsonl cannot be written.
    """
    rows = Rows(folder / METRICS)
    rows.drop_after(start)
    rows.add_missing(carried)
    progress = Progress(settings, start, read_metrics(folder))
    tracker = RunTracker(rows, progress, open_view(progress))
    for choice in chosen(settings.tracking):
        tracker.add(choice.key, partial(choice.open, folder, settings, start))
    for i, callback in enumerate(callbacks):
        tracker.others[f"callbacks[{i}] ({type(callback).__name__})"] = callback
    return tracker


class RunTracker:
    """Passes the rows, pictures and alarms of a run to metrics.jsonl, the terminal and all trackers.

    Attributes:
        rows: of metrics.jsonl.
        others: the trackers that have not failed, by their recipe keys.
    """

    def __init__(self, rows: Rows, progress: Progress, view: View):
        self.rows = rows
        self.progress, self.view = progress, view
        self.others: dict[str, Tracker] = {}

    def add(self, key: str, make: Callable[[], Tracker]) -> None:
        """Call `make` for a tracker and pass everything to it from now on; if it fails, say so and go on without it."""
        try:
            self.others[key] = make()
        except Exception as error:  # trackers, their servers and their disks fail in any way
            self._say_failed(key, error)

    def advance(self) -> None:
        """Count a step."""
        self.progress.advance()

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Log the values of a step."""
        waited = bool(self.rows.waiting)
        self.rows.add({"step": step, **values})
        if self.rows.waiting and not waited:
            self.say(f"warning: {self.rows.path} cannot be written; its rows are kept in memory until it can")
        self.progress.log(values)
        with contextlib.suppress(OSError):  # of the terminal
            self.view.logged()
        self._each(lambda tracker: tracker.log(step, values))

    def picture(self, step: int, name: str, image: Image.Image) -> None:
        """Log a picture, such as a sheet of samples."""
        self._each(lambda tracker: tracker.picture(step, name, image))

    def checkpoint(self, step: int, folder: Path) -> None:
        """Tell the trackers of a complete checkpoint."""
        self._each(lambda tracker: tracker.checkpoint(step, folder))

    def warn(self, step: int, text: str) -> None:
        """Print and log an alarm of early warning."""
        self.say(text)
        self._each(lambda tracker: tracker.warn(step, text))

    def say(self, text: str) -> None:
        """Print a line without secrets; the view also shows warnings."""
        text = redacted(text)
        if text.startswith(("warning: ", "early warning ")):
            self.progress.warnings.append(text)
        with contextlib.suppress(OSError):
            print(text, flush=True)

    def close(self) -> None:
        """Write the waiting rows and close the trackers; rows that still cannot be written are printed."""
        with contextlib.suppress(OSError):
            self.view.close()
        self._each(lambda tracker: tracker.close())
        self.rows.write()
        for row in self.rows.waiting:
            print(row)

    def _each(self, use: Callable[[Tracker], object]) -> None:
        for key, tracker in list(self.others.items()):
            try:
                use(tracker)
            except Exception as error:
                del self.others[key]
                self._say_failed(key, error)

    def _say_failed(self, key: str, error: Exception) -> None:
        self.say(f"warning: {key} failed ({error}) and is left out from here on; {METRICS} has all rows")
