"""Which checkpoint a run goes on from: the newest that is whole and undamaged, or a given one."""

from collections.abc import Callable
from pathlib import Path

from dmdr_train.base.errors import UserError
from dmdr_train.checkpoint.compatibility import compare
from dmdr_train.checkpoint.manifest import MANIFEST, RECIPE, verify
from dmdr_train.recipe.explain import is_number
from dmdr_train.recipe.schema import Recipe


def find_checkpoint(settings: Recipe, say: Callable[[str], None] = print) -> Path | None:
    """The checkpoint that `run.resume` asks for; None to start afresh.

    `auto` takes the newest that is undamaged. What differs from its recipe is said, a line for each key; then its path.

    Raises:
        UserError: a given path holds no checkpoint, a damaged one, or one of a run that this recipe cannot go on with;
            or `auto` finds damaged ones alone.
    """
    choice = settings.run.resume
    if choice == "never":
        return None
    if choice == "auto":
        path = newest_whole(checkpoints_in(Path(settings.run.output) / "checkpoints"), say)
    else:
        path = newest_verified("run.resume", choice)
    if path is not None:
        compare(settings, path, say)
        say(f"going on from {path}")
    elif (Path(settings.run.output) / RECIPE).exists():
        say(f"warning: {settings.run.output} has no checkpoint; the run begins again, at step 0")
    return path


def checkpoints_in(folder: Path) -> list[Path]:
    """The checkpoints in a folder, oldest first; they were whole when they got their names."""
    return sorted(path for path in folder.glob("step-*") if is_number(path.name.removeprefix("step-")))


def step_of(checkpoint: Path) -> int:
    """The step at which a checkpoint was written, by its name."""
    return int(checkpoint.name.removeprefix("step-"))


def run_of(checkpoint: Path) -> Path | None:
    """The folder of the run that a checkpoint stands in; None for one that was put elsewhere."""
    folder = checkpoint.absolute().parent
    return folder.parent if folder.name == "checkpoints" else None


def newest(key: str, text: str) -> Path:
    """The checkpoint at a path: itself, or the newest in a folder of checkpoints or in a run's folder."""
    folder = Path(text)
    for candidate in (folder, *reversed(checkpoints_in(folder)), *reversed(checkpoints_in(folder / "checkpoints"))):
        if (candidate / MANIFEST).is_file():
            return candidate
    raise UserError(key, f"{text} holds no checkpoint; give one of step-*, or start without it")


def newest_verified(key: str, text: str) -> Path:
    """The same, and undamaged."""
    path = newest(key, text)
    verify(key, path)
    return path


def newest_whole(found: list[Path], say: Callable[[str], None]) -> Path | None:
    """The last of these that is undamaged; every damaged one is said.

    Raises:
        UserError: all are damaged, and a start at step 0 would not be what was meant.
    """
    for path in reversed(found):
        try:
            verify("run.resume", path)
        except UserError as error:
            say(f"warning: {str(error).partition(';')[0]}; falling back to the checkpoint before")
        else:
            return path
    if found:
        raise UserError("run.resume", f"every checkpoint in {found[0].parent} is damaged; give another run.output")
    return None
