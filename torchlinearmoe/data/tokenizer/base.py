"""What the rest of the project sees of a tokenizer, whichever kind of file it was read from."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from copy import copy
from pathlib import Path

import numpy as np

from torchlinearmoe.errors import UserError

END_OF_TEXT = "<|endoftext|>"


class Tokenizer(ABC):
    """Ids 0 .. vocab_size - 1, one of them `end_of_text`, which no text encodes to."""

    path: Path
    """The file it was read from."""
    vocab_size: int
    """The largest id plus one, special tokens included."""
    end_of_text: int
    """The id that ends every document, and starts the next where there is no other for that."""
    begin_of_text: int | None = None
    """The id that its own files put before a text, if it is another one; every document starts with it then."""
    padding: int | None = None
    """The id that its own files fill up with, if they name one."""
    special_tokens: Mapping[str, int] = {}
    """Tokens that no text encodes to, by their spelling."""
    names: Mapping[str, str] = {}
    """What templates call special tokens, `eos_token` for one, and their spelling."""
    fingerprint: str
    """Hash of everything that decides ids; part of the name of cached tokens."""
    threads: int = 8
    """What `encode_batch` works with, where its library lets that be chosen."""
    files: Mapping[str, bytes] = {}
    """What was read, by file name: the same bytes go into checkpoints, whatever lies at `path` by then."""

    @property
    def start(self) -> int:
        """The id that starts every document."""
        return self.end_of_text if self.begin_of_text is None else self.begin_of_text

    def starting(self, begins: bool | None) -> Tokenizer:
        """The same, with documents that start with `begin_of_text` or do not; None: with it where there is one.

        Raises UserError when they must and there is none.
        """
        if begins and self.begin_of_text is None:
            raise UserError(f"data.begin_of_text = true: {self.path} names no token that begins a text; leave it out")
        if begins is not False or self.begin_of_text is None:
            return self
        plain = copy(self)
        plain.begin_of_text = None
        return plain

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """The ids of `text`. Special tokens spelled out in it are encoded as the plain text they are there."""

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text, on several threads where that is faster."""
        return [self.encode(text) for text in texts]

    def encode_arrays(self, texts: Sequence[str]) -> Sequence[Sequence[int] | np.ndarray]:
        """The same, as arrays where that spares making a number of every id."""
        return self.encode_batch(texts)

    def encode_spans(self, text: str, special: bool = True) -> tuple[list[int], list[int]]:
        """The ids of `text`, and where each ends in it, in characters; one inside a character ends with it.

        With `special` a special token that is spelled out is one id.
        """
        spelled = sorted(self.special_tokens, key=len, reverse=True) if special else []
        ids: list[int] = []
        for piece in re.split(f"({'|'.join(map(re.escape, spelled))})", text) if spelled else [text]:
            if special and piece in self.special_tokens:
                ids.append(self.special_tokens[piece])
            elif piece:
                ids += self.encode(piece)
        # The character that each byte is of.
        owners = [place for place, letter in enumerate(text) for _ in letter.encode("utf-8", "replace")]
        ends, place = [], 0
        for token in ids:
            place += len(self.decode_bytes([token]))
            ends.append(owners[place - 1] + 1 if place else 0)
        return ids, ends

    @abstractmethod
    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of `ids`, one token's after the other's: decode_bytes(a + b) == decode_bytes(a) + decode_bytes(b).

        A token may end inside a UTF-8 character, so a stream is shown through `codecs.getincrementaldecoder("utf-8")`.
        Ids without a token (a model's vocabulary may be padded) have no bytes.
        """

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; bytes that are no UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")


def read_file(path: Path) -> bytes:
    """The bytes of a tokenizer's file. Raises UserError when they cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"data.tokenizer: cannot read '{path}': {error.strerror}") from None
