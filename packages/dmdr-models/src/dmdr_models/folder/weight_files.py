"""Which files of a part's folder hold its weights: whole or in shards, plain or in a variant. Imports no torch.

diffusers and transformers write `STEM.safetensors`, or shards and `STEM.safetensors.index.json`; of a variant such as
fp16 `STEM.fp16.safetensors`, or shards and `STEM.safetensors.index.fp16.json`.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from dmdr_models.base.json_files import read_json
from dmdr_models.base.reasons import reason

PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_WHOLE = re.compile(r"(?:diffusion_pytorch_model|model)(?:\.(?P<variant>[^.]+))?\.safetensors")
_INDEX = re.compile(r"(?:diffusion_pytorch_model|model)\.safetensors\.index(?:\.(?P<variant>[^.]+))?\.json")
_SHARD = re.compile(r".*-\d+-of-\d+")


@dataclass(frozen=True)
class WeightFiles:
    """The weights of a part.

    Attributes:
        variant: as diffusers and transformers call it, such as "fp16"; None for the plain weights.
        files: the index if there is one, and the .safetensors files.
    """

    variant: str | None
    files: tuple[Path, ...]

    @property
    def tensors(self) -> tuple[Path, ...]:
        """The .safetensors files alone."""
        return tuple(file for file in self.files if file.suffix == ".safetensors")


def weight_files(folder: Path) -> WeightFiles:
    """Find the weights in a part's folder. The plain weights come before those of a variant.

    Raises:
        FileNotFoundError: there are none, or a shard is missing.
        ValueError: they are pickles, an index names another kind of file, or there is a choice of variants.
    """
    found: dict[str | None, tuple[Path, ...]] = {}
    for file in sorted(folder.glob("*")):
        if (match := _WHOLE.fullmatch(file.name)) and not _SHARD.fullmatch(file.stem):
            found.setdefault(match["variant"], (file,))
        elif match := _INDEX.fullmatch(file.name):
            found[match["variant"]] = (file, *_shards(file))  # libraries, too, take an index before a whole file
    if not found:
        _refuse(folder)
    if None in found:
        return WeightFiles(None, found[None])
    if len(found) > 1:
        raise ValueError(f"{folder} holds the variants {' and '.join(map(str, found))}: keep the weights of one")
    [(variant, files)] = found.items()
    return WeightFiles(variant, files)


def is_weights(file: Path) -> bool:
    """Whether a file's name is that of weights, or of an index of their shards, in any format and variant."""
    return file.suffix in (".safetensors", *PICKLES) or ".index." in file.name


def _shards(index: Path) -> list[Path]:
    try:
        names = sorted(set(read_json(index)["weight_map"].values()))
        strange = [name for name in names if Path(name).name != name or Path(name).suffix != ".safetensors"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is not an index of weights: {reason(error)}") from error
    if strange:
        raise ValueError(f"{index} names {strange[0]!r}, which is no .safetensors file beside it")
    for name in names:
        if not (index.parent / name).is_file():
            raise FileNotFoundError(f"{index} names {name}, which is missing: download the folder again")
    return [index.parent / name for name in names]


def _refuse(folder: Path) -> None:
    """Raise the error for a folder without weights that can be read."""
    if pickles := sorted(file.name for file in folder.glob("*") if file.suffix in PICKLES):
        raise ValueError(
            f"{folder} holds {pickles[0]}, a pickle; only safetensors are read: open it with the library that wrote it "
            "and save it with save_pretrained(…, safe_serialization=True)"
        )
    others = sorted(file.name for file in folder.glob("*.safetensors"))
    named = f", but {others[0]}" if others else ""
    raise FileNotFoundError(
        f"{folder} holds no weights called diffusion_pytorch_model or model{named}: download the folder again"
    )
