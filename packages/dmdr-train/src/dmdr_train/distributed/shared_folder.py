"""Check that all machines share the run's folder: every process writes and reads its own part of a checkpoint there."""

import tempfile
from pathlib import Path
from typing import Any

import torch.distributed as dist

from dmdr_train.base.errors import UserError, naming
from dmdr_train.base.folders import nearest
from dmdr_train.distributed.collectives import agreed
from dmdr_train.distributed.lost_process import Peers


def check_shared(folder: Path, peers: Peers) -> None:
    """Write a temporary file to the run's folder, or where it will be made, and let every process look for it.

    Raises:
        UserError: on every process, if one of them does not see the file, or if it cannot be written.
    """
    if peers.world == 1:
        return
    left: list[Any] = []

    def leave() -> str:
        with naming("run.output"):
            left.append(tempfile.NamedTemporaryFile(dir=nearest(folder), prefix=".shared-"))  # noqa: SIM115
        return Path(left[0].name).name

    name = agreed(leave)
    seen: list[Any] = [None] * peers.world
    dist.all_gather_object(seen, (nearest(folder) / name).exists())
    for file in left:
        file.close()
    if not all(seen):
        raise UserError(
            "run.output",
            f"{folder} of rank 0 ({peers.names[0]}) is not the folder that rank {seen.index(False)} "
            f"({peers.names[seen.index(False)]}) sees; give a folder on a file system that all machines share",
        )
