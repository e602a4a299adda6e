"""Trackers by name: the built-in ones, and one that an installed package brings."""

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from dmdr_train.base import plugins
from dmdr_train.base.errors import UserError
from dmdr_train.recipe.schema import Recipe, Tracking
from dmdr_train.tracking.metrics_file import METRICS, read_metrics
from dmdr_train.tracking.registry import TRACKERS, chosen
from dmdr_train.tracking.run_tracker import open_tracker
from dmdr_train.tracking.tracker import Tracker
from PIL import Image

SOURCE = """
from dmdr_train.extending import Tracker
from pydantic import BaseModel


class Notes(Tracker):
    class Options(BaseModel):
        path: str
        every: int = 1

    def __init__(self, folder, recipe, start, path, every):
        self.file = (folder / path).open("w")
        self.note("start", start, recipe.run.steps, every)

    def note(self, *words):
        print(*words, file=self.file)

    def log(self, step, values):
        self.note("log", step, *values.values())

    def picture(self, step, name, image):
        self.note("picture", step, name, image.size)

    def checkpoint(self, step, folder):
        self.note("checkpoint", step, folder.name)

    def warn(self, step, text):
        self.note("warn", step, text)

    def close(self):
        self.note("close")
        self.file.close()


def plain(folder, recipe, start, path, every=1):
    return Notes(folder, recipe, start, path, every)
"""


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A package with two trackers, as pip would have installed it."""
    (site := tmp_path / "site" / "notes-1.0.dist-info").mkdir(parents=True)
    (site.parent / "notes_tracker.py").write_text(SOURCE)
    (site / "METADATA").write_text("Metadata-Version: 2.1\nName: notes\nVersion: 1.0\n")
    entries = "notes = notes_tracker:Notes\nplain = notes_tracker:plain\nbroken = notes_tracker:Gone\n"
    (site / "entry_points.txt").write_text(f"[dmdr_trackers]\n{entries}")
    monkeypatch.syspath_prepend(site.parent)
    plugins._entries.cache_clear()
    yield
    plugins._entries.cache_clear()


def test_the_built_in_trackers_are_registered_like_all_others() -> None:
    assert {"tensorboard", "wandb"} <= set(TRACKERS.names())
    assert all(issubclass(TRACKERS.load(name), Tracker) for name in ("tensorboard", "wandb"))


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("name", ["notes", "plain"])
def test_a_tracker_of_a_package(make_recipe: Callable[..., Recipe], tmp_path: Path, name: str) -> None:
    tracking = {"tensorboard": False, "trackers": {name: {"path": "notes.txt"}}}
    tracker = open_tracker(tmp_path, make_recipe(tracking=tracking), 3)
    tracker.log(4, {"loss/refl": 0.5})
    tracker.picture(4, "student", Image.new("RGB", (2, 3)))
    tracker.checkpoint(4, tmp_path / "step-4")
    tracker.warn(4, "early warning")
    tracker.close()
    said = [
        "start 3 10 1",
        "log 4 0.5",
        "picture 4 student (2, 3)",
        "checkpoint 4 step-4",
        "warn 4 early warning",
        "close",
    ]
    assert (tmp_path / "notes.txt").read_text().splitlines() == said
    assert [row["step"] for row in read_metrics(tmp_path)] == [4]


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("tracking", "line"),
    [
        ({"notez": {}}, "tracking.trackers.notez: unknown tracker 'notez'; did you mean notes?"),
        ({"broken": {}}, "tracking.trackers.broken: tracker 'broken' cannot be imported from notes_tracker:Gone ("),
        ({"notes": {"path": "a", "evry": 2}}, "tracking.trackers.notes.evry: unknown key; did you mean every?"),
        ({"plain": {"path": "a", "evry": 2}}, "tracking.trackers.plain.evry: unknown key; did you mean every?"),
        ({"notes": {}}, "tracking.trackers.notes.path: is required; add it to the recipe"),
        ({"plain": {}}, "tracking.trackers.plain.path: is required; add it to the recipe"),
        ({"notes": {"path": "a", "every": "b"}}, "tracking.trackers.notes.every: should be a valid integer"),
        ({"tensorboard": {}}, "tracking.tensorboard: and tracking.trackers.tensorboard name the same tracker; set it"),
    ],
)
def test_a_mistake_is_named(tracking: dict[str, Any], line: str) -> None:
    def check() -> None:
        for choice in chosen(Tracking(trackers=tracking)):
            choice.check()

    with pytest.raises(UserError) as error:
        check()
    assert str(error.value).startswith(line)


def test_wandb_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for tracking, key in (
        (Tracking(tensorboard=False, wandb="project"), "tracking.wandb"),
        (Tracking(tensorboard=False, trackers={"wandb": {"project": "project"}}), "tracking.trackers.wandb"),
    ):
        (choice,) = chosen(tracking)
        with pytest.raises(UserError, match=rf"^{key}: wandb is not installed; pip install dmdr-train\[wandb\]"):
            choice.check()


def test_samples_are_a_series_in_tensorboard_and_wandb(tmp_path: Path) -> None:
    from dmdr_train.tracking.tensorboard import TensorBoard
    from dmdr_train.tracking.wandb import WandB

    logged: list[Any] = []
    board, wandb = TensorBoard.__new__(TensorBoard), WandB.__new__(WandB)
    board.writer = SimpleNamespace(add_image=lambda name, pixels, step, **_: logged.append((name, pixels.shape, step)))
    wandb.wandb = SimpleNamespace(Image=lambda image, caption: (image.size, caption))
    wandb.run = SimpleNamespace(log=lambda values, step: logged.append((values, step)))
    for tracker in (board, wandb):
        tracker.picture(100, "student-00000100", Image.new("RGB", (2, 3)))
    assert logged == [
        ("samples/student", (3, 2, 3), 100),
        ({"samples/student": ((2, 3), "student-00000100")}, 100),
    ]


def test_rows_are_not_touched_until_a_run_goes_on(make_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    from dmdr_train.tracking.metrics_file import Rows

    path = tmp_path / METRICS
    path.write_text('{"step": 1}\n{"step": 2}\n{"st')
    before = path.read_bytes()
    rows = Rows(path)
    assert path.read_bytes() == before
    rows.drop_after(1)
    rows.add_missing([{"step": 1, "again": 1}, {"step": 0}])
    assert path.read_text() == '{"step": 1}\n{"step": 0}\n'
