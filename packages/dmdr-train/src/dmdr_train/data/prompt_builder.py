"""Files of prompts as a dataset of the library `datasets`, which keeps the texts on the disk."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pyarrow

from dmdr_train.base.errors import naming
from dmdr_train.data.prompt_rows import batches_of

FEATURES = datasets.Features({"prompt": datasets.Value("string")})


@dataclass
class PromptFilesConfig(datasets.BuilderConfig):
    """What decides the prompts, and so the place of their copy in the library's cache.

    Attributes:
        files: absolute path, size in bytes and time of the last change in nanoseconds.
        column: of the texts.
    """

    files: tuple[tuple[str, int, int], ...] = ()
    column: str = ""


class PromptFiles(datasets.ArrowBasedBuilder):
    """Reads files with `prompt_rows.batches_of` into the column `prompt`."""

    VERSION = datasets.Version("1.0.0")  # a change of how files are read must change it: it is part of the cache's path
    BUILDER_CONFIG_CLASS = PromptFilesConfig

    def _info(self) -> datasets.DatasetInfo:
        return datasets.DatasetInfo(features=FEATURES)

    def _split_generators(self, dl_manager: Any) -> list[datasets.SplitGenerator]:
        files = [path for path, _, _ in self.config.files]
        return [datasets.SplitGenerator("train", gen_kwargs={"files": files})]

    def _generate_tables(self, files: Sequence[str]) -> Iterator[tuple[Any, pyarrow.Table]]:
        for i, file in enumerate(files):
            with naming("data.prompts"):  # a stream is read during the training
                for j, batch in enumerate(batches_of(Path(file), self.config.column)):
                    yield (i, j), pyarrow.table({"prompt": pyarrow.array(batch, pyarrow.string())})


def read_files(files: Sequence[Path], column: str, streaming: bool) -> Any:
    """The prompts of some files as a `datasets.Dataset`, or as an IterableDataset if `streaming`."""
    stats = [(str(file.resolve()), file.stat()) for file in files]
    stamps = tuple((path, stat.st_size, stat.st_mtime_ns) for path, stat in stats)
    builder = PromptFiles(dataset_name="prompts", files=stamps, column=column)
    if streaming:
        return builder.as_streaming_dataset(split="train")
    builder.download_and_prepare()
    if not builder.info.splits["train"].num_examples:  # the library does not open what is empty
        return datasets.Dataset.from_dict({"prompt": []}, FEATURES)
    return builder.as_dataset(split="train")
