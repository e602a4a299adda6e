"""Folders of safetensors shards: `dmdr-train encode` and `dmdr-train pairs` write them, and a run reads them.

    folder/
        manifest.json            how the folder was made, and every shard with its rows, size and sha256
        shard-*.safetensors      tensors `[n, …]`

Every process makes its share of the shards and waits for no other process. Shards are written atomically, so that an
interrupted command can be started again, on any number of processes, and makes only the missing shards. A process that
finds all shards complete writes the manifest.
"""

import json
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dmdr_train.base.atomic_files import fingerprint, write_whole
from dmdr_train.base.errors import UserError, naming
from dmdr_train.base.folders import check_writable

if TYPE_CHECKING:
    from torch import Tensor

MANIFEST = "manifest.json"
Made = tuple[dict[str, "Tensor"], dict[str, str] | None]
"""The contents of a shard: tensors `[n, …]`, and texts."""


@dataclass(frozen=True)
class ShardFolder:
    """A folder of shards.

    Args:
        key: the recipe key or command-line option that errors name.
        path: of the folder.
        command: the command of dmdr-train that writes such folders.
        unit: what a row is, in the plural, such as "prompts"; the manifest uses it as a key.
    """

    key: str
    path: Path
    command: str
    unit: str

    def manifest(self) -> dict[str, Any]:
        """Read the manifest.

        Raises:
            UserError: it is missing or damaged.
        """
        try:
            manifest = json.loads((self.path / MANIFEST).read_text(encoding="utf-8"))
            shards = manifest["shards"].items()
            if not all(is_shard(name) and isinstance(entry["bytes"] + entry[self.unit], int) for name, entry in shards):
                raise ValueError
        except OSError:
            raise UserError(
                self.key, f"{self.path} holds no {MANIFEST}; give a folder that dmdr-train {self.command} wrote"
            ) from None
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            fix = f"delete {self.path} and write it again with dmdr-train {self.command}"
            raise UserError(self.key, f"{self.path / MANIFEST} is damaged; {fix}") from None
        return manifest

    def check(self, wanted: Mapping[str, Any]) -> dict[str, Any]:
        """Check that the folder is complete and was made with `wanted`, and return its manifest.

        Raises:
            UserError: it is not.
        """
        manifest = self.manifest()
        self.refuse_other(manifest, wanted)
        command = f"dmdr-train {self.command} -o {self.path}"
        if not manifest["shards"]:
            raise UserError(self.key, f"{self.path} is not finished; go on with {command}")
        for name, expected in manifest["shards"].items():
            if not self.is_whole(name, expected):
                raise UserError(self.key, f"{self.path / name} is missing or damaged; repair it with {command}")
        return manifest

    def prepare(self, wanted: Mapping[str, Any]) -> None:
        """Make a new folder with a manifest, or check that an existing folder was made with `wanted`.

        Raises:
            UserError: the folder has other files, was made with something else, or cannot be written to.
        """
        check_writable(self.key, self.path)
        with naming(self.key):
            self.path.mkdir(parents=True, exist_ok=True)
            if not (self.path / MANIFEST).exists():
                if any(path.name != MANIFEST and path.suffix != ".partial" for path in self.path.iterdir()):
                    raise UserError(self.key, f"{self.path} holds other files; give a new folder")
                self._write_manifest({**wanted, "shards": {}})
        self.refuse_other(self.manifest(), wanted)

    def refuse_other(self, manifest: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
        """Compare how the folder was made with `wanted`.

        Raises:
            UserError: for the first difference.
        """
        for name, value in wanted.items():
            found = manifest.get(name)
            if found != value:
                raise UserError(
                    self.key,
                    f"{self.path} was made with {name} {found}, not {value}; give another folder, "
                    f"or a new one to dmdr-train {self.command}",
                )

    def is_whole(self, name: str, expected: Mapping[str, Any]) -> bool:
        """Whether a shard exists and has the size that the manifest says."""
        shard = self.path / name
        return shard.is_file() and shard.stat().st_size == expected["bytes"]

    def whole(self) -> dict[str, Any]:
        """The shards of the manifest that are whole, with their entries."""
        return {name: entry for name, entry in self.manifest()["shards"].items() if self.is_whole(name, entry)}

    def remove_damaged(self) -> None:
        """Delete the shards that the manifest lists and that are not whole, so that `write` makes them again."""
        for name in self.manifest()["shards"].keys() - self.whole().keys():
            (self.path / name).unlink(missing_ok=True)

    def plan(self, count: int, shard_size: int) -> dict[str, range]:
        """The shards that the folder lacks of `count` numbered rows, by name, and the rows in each.

        Rows that are listed keep their shards. Damaged shards count as lacking.
        """
        listed = self.manifest()["shards"]
        numbers = {name: range(*map(int, name.removesuffix(".safetensors").split("-")[1:])) for name in listed}
        first = max((part.stop for part in numbers.values()), default=0)
        for start in range(first, count, shard_size):
            part = range(start, min(start + shard_size, count))
            numbers[f"shard-{part.start:08d}-{part.stop:08d}.safetensors"] = part
        return {name: part for name, part in numbers.items() if name not in self.whole()}

    def write(
        self,
        shards: Mapping[str, Sequence[int]],
        make: Callable[[Sequence[int], Callable[[int], Any]], Made],
        row_bytes: Callable[[], int],
        rank: int = 0,
        world: int = 1,
    ) -> None:
        """Write this process's share of the shards, and the manifest once all shards exist.

        Args:
            shards: the missing shards by name, with their rows.
            make: returns the contents of a shard for its rows; it reports its progress by calling its second argument
                with a number of rows.
            row_bytes: returns the size of a row in bytes.

        Raises:
            UserError: the disk is too small.
        """
        from safetensors.torch import save_file
        from tqdm import tqdm

        missing = {name: rows for name, rows in shards.items() if not (self.path / name).exists()}
        if missing:
            self._check_space(sum(map(len, missing.values())), row_bytes())
        mine = {name: missing[name] for name in list(shards)[rank::world] if name in missing}
        label = f"{self.unit} of process 1 of {world}" if world > 1 else self.unit
        with tqdm(total=sum(map(len, mine.values())), desc=label, unit=f" {self.unit}", disable=rank > 0) as progress:
            for name, rows in mine.items():
                tensors, texts = make(rows, progress.update)
                write_whole(self.path / name, partial(save_file, tensors, metadata=texts))
        if all((self.path / name).exists() for name in shards):
            self._finish(shards)

    def _check_space(self, count: int, row_bytes: int) -> None:
        """Raise a UserError if the disk cannot hold so many rows."""
        needed, free = count * row_bytes, shutil.disk_usage(self.path).free
        if needed > free:
            raise UserError(
                self.key,
                f"{count} {self.unit} take {needed / 1e9:.3g} GB and {self.path} has {free / 1e9:.3g} GB left; "
                f"give a larger disk, or write fewer",
            )

    def _finish(self, made: Mapping[str, Sequence[int]]) -> None:
        """Add the new shards to the manifest; from then on they are part of the folder."""
        shards = self.whole()
        with ThreadPoolExecutor() as pool:
            entries = pool.map(lambda name: {self.unit: len(made[name]), **fingerprint(self.path / name)}, made)
            shards |= zip(made, entries, strict=True)
        count = sum(entry[self.unit] for entry in shards.values())
        told = {self.unit: count, "tensors": row_shapes(self.path / next(iter(shards)))}
        self._write_manifest(self.manifest() | told | {"shards": dict(sorted(shards.items()))})
        for left in self.path.glob(".shard-*.partial"):  # of processes that were killed
            left.unlink(missing_ok=True)
        size = sum(entry["bytes"] for entry in shards.values())
        print(f"Wrote {self.path}: {count} {self.unit}, {size / 1e9:.3g} GB")

    def _write_manifest(self, manifest: Mapping[str, Any]) -> None:
        text = json.dumps(manifest, indent=1)
        write_whole(self.path / MANIFEST, lambda path: path.write_text(text, encoding="utf-8"))


def is_shard(name: str) -> bool:
    """Whether a name is that of a file beside the manifest. Damaged shards are deleted, so other names are refused."""
    return re.fullmatch(r"[\w-]{1,100}\.safetensors", name, re.ASCII) is not None


def row_shapes(shard: Path) -> dict[str, list[int]]:
    """The shapes of one row of a shard's tensors."""
    from safetensors import safe_open

    with safe_open(shard, "np") as file:
        return {name: file.get_slice(name).get_shape()[1:] for name in sorted(file.keys())}


def processes() -> tuple[int, int]:
    """The rank of this process and the number of processes, as the launcher sets them."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
