"""BERT's tokenizer, built from a vocabulary file."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dmdr_rewards.base.errors import MissingError
from dmdr_rewards.prompts.texts import Truncation, as_texts

_BLIP = ["[DEC]", "[ENC]"]  # BLIP appends these to BERT's vocabulary


class WordPiece:
    """Lower-cased word pieces between [CLS] and [SEP]. BLIP's two tokens are added at the end of the vocabulary.

    path    vocab.txt with one entry per line, or a folder that holds vocab.txt or tokenizer.json
    length  number of tokens in every result: longer prompts are truncated, shorter ones padded

    Raises ValueError for a file that is missing or not a vocabulary of BERT.
    """

    def __init__(self, path: Path, length: int) -> None:
        self.path = _file(path)
        self.length = length
        self._warn = Truncation(length)
        self._tokenizer = _load(self.path)
        self._tokenizer.add_special_tokens(_BLIP)
        self._tokenizer.enable_truncation(length)
        self._tokenizer.enable_padding(length=length, pad_id=self._tokenizer.token_to_id("[PAD]"), pad_token="[PAD]")

    @property
    def size(self) -> int:
        """Number of entries, including BLIP's two."""
        return self._tokenizer.get_vocab_size()

    def lengths(self, texts: list[str]) -> list[int]:
        """The number of tokens in each text, before it is truncated."""
        return [_length(each) for each in self._tokenizer.encode_batch(texts)]

    def __call__(self, prompts: Tensor | Sequence[Any], count: int) -> tuple[Tensor, Tensor]:
        """`count` texts -> ids and attention mask, integer Tensors[count, length].

        Warns about the first text that is truncated.
        Raises ValueError for prompts that are not a sequence of `count` texts.
        """
        texts = as_texts(prompts, count)
        encoded = self._tokenizer.encode_batch(texts)
        self._warn([_length(each) for each in encoded], texts)
        return torch.tensor([each.ids for each in encoded]), torch.tensor([each.attention_mask for each in encoded])


def _length(encoding: Any) -> int:
    """Number of tokens before truncation."""
    return 2 + sum(map(_pieces, (encoding, *encoding.overflowing)))


def _pieces(encoding: Any) -> int:
    """Number of tokens between [CLS] and [SEP]."""
    return sum(encoding.attention_mask) - 2


def _file(path: Path) -> Path:
    candidates = [path / "tokenizer.json", path / "vocab.txt"] if path.is_dir() else [path]
    found = next((file for file in candidates if file.is_file()), None)
    if found is None:
        raise MissingError(
            f"tokenizer {path}: no vocabulary there. Download vocab.txt of bert-base-uncased and put it beside the "
            "checkpoint, or give tokenizer=FILE"
        )
    return found


def _load(path: Path) -> Any:
    from tokenizers import BertWordPieceTokenizer, Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(path)) if path.suffix == ".json" else BertWordPieceTokenizer(str(path))
    except Exception as error:  # the library raises plain Exception for a malformed file
        raise ValueError(f"tokenizer {path} is not a vocabulary of BERT: {error}") from error
    if tokenizer.token_to_id("[PAD]") is None:
        raise ValueError(f"tokenizer {path} is not a vocabulary of BERT: it has no [PAD]")
    return tokenizer
