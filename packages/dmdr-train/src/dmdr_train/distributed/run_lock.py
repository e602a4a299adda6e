"""A lock that allows one run per folder. It is released when its process ends, in whatever way."""

import errno
import fcntl
import os
import socket
import sys
from contextlib import suppress
from pathlib import Path
from typing import IO

from dmdr_train.base.errors import UserError

LOCK = "run.lock"


def check_free(folder: Path) -> None:
    """Refuse a folder in which another run is active; nothing is written.

    Raises:
        UserError: names the process that holds the folder.
    """
    if (folder / LOCK).exists():
        with (folder / LOCK).open() as file:
            _lock(file, fcntl.LOCK_SH, folder)


def hold(folder: Path) -> IO[str]:
    """Lock a run's folder until the returned file is closed or this process ends.

    Raises:
        UserError: another process holds it.
    """
    file = (folder / LOCK).open("a+")
    _lock(file, fcntl.LOCK_EX, folder)
    return file


def sign(file: IO[str]) -> None:
    """Write the name of this process into the lock file, for the error that other processes show."""
    with suppress(OSError):  # on a full disk the lock holds, too
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()


def _lock(file: IO[str], kind: int, folder: Path) -> None:
    # A record lock: in contrast to flock's, children do not inherit it, and NFS supports it.
    try:
        fcntl.lockf(file, kind | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN):  # a file system without locks, as some clusters have
            said = f"warning: {folder} cannot be locked ({error.strerror}); make sure that only one run uses it"
            print(said, file=sys.stderr, flush=True)
            return
        file.seek(0)
        holder = file.read() or "another process"
        raise UserError("run.output", f"{folder} is in use by {holder}; wait for it, or give another folder") from None
