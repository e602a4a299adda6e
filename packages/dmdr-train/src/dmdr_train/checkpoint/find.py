"""Find the checkpoint from which a run resumes: the newest undamaged one, or the one that the user names."""

from collections.abc import Callable
from pathlib import Path

from dmdr_train.base.errors import UserError
from dmdr_train.checkpoint.compatibility import compare
from dmdr_train.checkpoint.manifest import MANIFEST, RECIPE, verify
from dmdr_train.recipe.explain import is_number
from dmdr_train.recipe.schema import Recipe


def find_checkpoint(settings: Recipe, say: Callable[[str], None] = print) -> Path | None:
    """Return the checkpoint that `run.resume` asks for; None to start at step 0.

    `auto` takes the newest undamaged checkpoint. Differences from its recipe are printed, one line for each key, and
    then its path.

    Raises:
        UserError: a given path holds no checkpoint, a damaged one, or one that this recipe cannot resume; or `auto`
            finds only damaged checkpoints.
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
        say(f"resuming from {path}")
    elif (Path(settings.run.output) / RECIPE).exists():
        say(f"warning: {settings.run.output} has no checkpoint; the run starts again at step 0")
    return path


def checkpoints_in(folder: Path) -> list[Path]:
    """Return the checkpoints in a folder, oldest first; each was complete when it got its name."""
    return sorted(path for path in folder.glob("step-*") if is_number(path.name.removeprefix("step-")))


def step_of(checkpoint: Path) -> int:
    """Return the step at which a checkpoint was written, read from its name."""
    return int(checkpoint.name.removeprefix("step-"))


def run_of(checkpoint: Path) -> Path | None:
    """Return the run's folder that contains a checkpoint; None if the checkpoint was moved elsewhere."""
    folder = checkpoint.absolute().parent
    return folder.parent if folder.name == "checkpoints" else None


def newest(key: str, text: str) -> Path:
    """Return the checkpoint at a path: itself, or the newest in a folder of checkpoints or in a run's folder.

    Raises:
        UserError: there is none.
    """
    folder = Path(text)
    for candidate in (folder, *reversed(checkpoints_in(folder)), *reversed(checkpoints_in(folder / "checkpoints"))):
        if (candidate / MANIFEST).is_file():
            return candidate
    raise UserError(key, f"{text} holds no checkpoint; give one of step-*, or start without it")


def newest_verified(key: str, text: str) -> Path:
    """Do the same as `newest`, and verify the checkpoint.

    Raises:
        UserError: there is none, or it is damaged.
    """
    path = newest(key, text)
    verify(key, path)
    return path


def newest_whole(found: list[Path], say: Callable[[str], None]) -> Path | None:
    """Return the last undamaged checkpoint, or None if the list is empty; print a warning for every damaged one.

    Raises:
        UserError: all are damaged. The run does not start at step 0, since the user did not ask for this.
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
