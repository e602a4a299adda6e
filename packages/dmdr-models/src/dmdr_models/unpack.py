"""`python -m dmdr_models.unpack FILE BASE FOLDER`: make a model folder of a whole model in one .safetensors file.

diffusers converts the weights. Configs, tokenizers, the scheduler, and the parts that the file lacks, such as text
encoders, are those of BASE, the folder of the model that FILE was trained from. Nothing is downloaded.
"""

import argparse
import shutil
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

from dmdr_models import registry
from dmdr_models.base.errors import UsageError
from dmdr_models.base.reasons import reason
from dmdr_models.base.secrets import redact_tracebacks
from dmdr_models.folder.contents import describe
from dmdr_models.folder.layout import Layout
from dmdr_models.folder.safetensors_header import read_header

DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
VAE_MARKS = ("first_stage_model.", "vae.")
CLIP_MARKS, T5_MARKS = ("conditioner.", "text_encoders.clip_"), ("text_encoders.t5xxl.",)


def main(argv: Sequence[str] | None = None) -> None:
    """The program `python -m dmdr_models.unpack`."""
    redact_tracebacks()
    parser = argparse.ArgumentParser(
        prog="python -m dmdr_models.unpack", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path, metavar="FILE")
    parser.add_argument("base", type=Path, metavar="BASE")
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    args = parser.parse_args(argv)
    try:
        unpack(args.file, args.base, args.folder)
    except (UsageError, OSError) as error:
        parser.exit(2, f"{parser.prog}: {' '.join(str(error).split())}\n")
    print(args.folder)


def unpack(file: Path, base: Path, folder: Path) -> None:
    """Write `folder`, which is complete or not there; weights keep the dtype that most tensors of the file have.

    Raises:
        UsageError: a file or folder is none that can be used.
    """
    layout = registry.recognise(base)
    if layout is None or not hasattr(layout.drawing(), "pipeline"):
        raise UsageError(f"{base} is no folder of a model with a pipeline in diffusers: give the one of FILE's base")
    if folder.exists():
        raise UsageError(f"{folder} exists already: give a new place")
    try:
        found = describe(layout, base)
        header = read_header(file)
        known = Counter(DTYPES.get(entry["dtype"]) for entry in header.values())
    except ValueError as error:
        raise UsageError(f"{file} or {base} cannot be read: {error}") from error
    assert found is not None
    if not known or None in known:
        raise UsageError(f"{file} has no weights in float32, float16 or bfloat16 alone: quantised ones are not read")
    pipeline = _opened(layout, file, base, found.layers, header, known.most_common(1)[0][0])
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    pipeline.save_pretrained(partial)
    partial.rename(folder)


def _opened(layout: Layout, file: Path, base: Path, layers: Iterable[str], header: Collection[str], dtype: Any) -> Any:
    import diffusers
    import torch

    from dmdr_models.folder.read_parts import load_text_encoder, load_vae

    def lacks(marks: tuple[str, ...]) -> bool:
        return not any(name.startswith(marks) for name in header)

    parts: dict[str, Any] = {}
    dtype, lacking = getattr(torch, dtype), layout.lacking(base)
    if lacks(VAE_MARKS):
        parts["vae"] = load_vae(str(base), "vae", dtype)
    for part, classes in layout.text_encoders.items():
        if part in lacking:
            parts |= {part: None, part.replace("text_encoder", "tokenizer"): None}
        elif lacks(T5_MARKS if "T5EncoderModel" in classes else CLIP_MARKS):
            parts[part] = load_text_encoder(str(base), part, classes, dtype)
    try:
        return getattr(diffusers, layout.drawing().pipeline).from_single_file(
            str(file), config=str(base), torch_dtype=dtype, local_files_only=True, **parts
        )
    except (ValueError, KeyError, IndexError, RuntimeError, TypeError, AttributeError) as error:
        missing = _missing(layout, base, layers, header)
        why = f"it lacks {missing}" if missing else f"diffusers cannot convert it, {reason(error)}"
        raise UsageError(f"{file} is no whole model like {base}: {why}") from error


def _missing(layout: Layout, base: Path, layers: Iterable[str], header: Collection[str]) -> str | None:
    """The first weight of the original network that a file does not hold, with or without the usual prefix."""
    from dmdr_models.families.original_layout import NETWORK

    students = layout.open(base).students
    for layer in layers:
        name = f"{students.place(layer).layer}.weight"
        if not {name, NETWORK + name} & set(header):
            return NETWORK + name
    return None


if __name__ == "__main__":
    main()
