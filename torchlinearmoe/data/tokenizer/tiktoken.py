"""tiktoken's files, `base64 rank` lines.

Such a file holds ranks and nothing else. How text is cut before merging, and the special tokens, come from an
optional neighbour `NAME.tiktoken.json`:

    {"pattern": "<regular expression>", "special_tokens": {"<|endoftext|>": 50256}, "end_of_text": "<|endoftext|>",
     "begin_of_text": "<|startoftext|>"}

Each key may be left out: the pattern is then `DEFAULT_PATTERN`, GPT-2's way of cutting (so GPT-2's own ranks give
GPT-2's ids), the only special token is `<|endoftext|>`, with the id after the last rank, and no token begins a text.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from torchlinearmoe.data.tokenizer.base import END_OF_TEXT, Tokenizer, read_file
from torchlinearmoe.errors import UserError

if TYPE_CHECKING:
    import tiktoken

LAST_RANK = 2**31 - 1

DEFAULT_PATTERN = "|".join(
    [
        r"'(?:s|t|re|ve|m|ll|d)",  # English contractions
        r" ?\p{L}+",  # a word with the space before it
        r" ?\p{N}+",  # a number, likewise
        r" ?[^\s\p{L}\p{N}]+",  # anything else that is not white space
        r"\s+(?!\S)",  # white space, less the last one before a word
        r"\s+",
    ]
)


class TiktokenTokenizer(Tokenizer):
    """Byte-pair encoding by tiktoken, from a file of ranks."""

    def __init__(self, path: Path) -> None:
        import tiktoken

        self.path = path
        content = read_file(path)
        ranks = parse_ranks(content, path)
        options, options_path, neighbours = _read_options(path)
        self.files = {path.name: content, **neighbours}
        pattern = options.get("pattern", DEFAULT_PATTERN)
        special = options.get("special_tokens", {END_OF_TEXT: max(ranks.values()) + 1})
        end_of_text = options.get("end_of_text", END_OF_TEXT)
        if end_of_text not in special:
            raise UserError(
                f"{options_path}: end_of_text = {end_of_text!r} is not one of special_tokens {list(special)}"
            )
        begin_of_text = options.get("begin_of_text")
        if begin_of_text is not None and begin_of_text not in special:
            raise UserError(
                f"{options_path}: begin_of_text = {begin_of_text!r} is not one of special_tokens {list(special)}"
            )
        if len({*ranks.values(), *special.values()}) != len(ranks) + len(special):
            raise UserError(f"{path}: two tokens share an id; special_tokens are {special}")
        self.encoding: tiktoken.Encoding
        """The library's own."""
        try:
            self.encoding = tiktoken.Encoding(path.name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)
        except ValueError as error:
            raise UserError(f"{options_path}: pattern = {pattern!r}: {_one_line(error)}") from None
        self.ranks, self.pattern = ranks, pattern
        self._known = {*ranks.values(), *special.values()}
        self._without_rank = {byte for byte in range(256) if bytes([byte]) not in ranks}
        self.vocab_size = self.encoding.max_token_value + 1
        self.end_of_text = special[end_of_text]
        self.begin_of_text = None if begin_of_text in (None, end_of_text) else special[begin_of_text]
        self.special_tokens = special
        named = {"eos_token": end_of_text, "bos_token": begin_of_text}
        self.names = {name: token for name, token in named.items() if token is not None}
        told = json.dumps([pattern, special, end_of_text], sort_keys=True)
        self.fingerprint = hashlib.blake2b(content + told.encode(), digest_size=16).hexdigest()

    def encode(self, text: str) -> list[int]:
        self._check_bytes(text)
        with self._panics():
            return self.encoding.encode_ordinary(text)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        for text in texts:
            self._check_bytes(text)
        with self._panics():
            return self.encoding.encode_ordinary_batch(list(texts), num_threads=self.threads)

    def encode_arrays(self, texts: Sequence[str]) -> list[np.ndarray]:
        for text in texts:
            self._check_bytes(text)
        encode = partial(self.encoding.encode_to_numpy, disallowed_special=())
        with self._panics():
            if self.threads == 1:
                return [encode(text) for text in texts]
            with ThreadPoolExecutor(self.threads) as pool:
                return list(pool.map(encode, texts))

    @contextmanager
    def _panics(self) -> Iterator[None]:
        """What tiktoken does with a pattern that cuts where no token begins."""
        try:
            yield
        except BaseException as error:  # its panics are no Exception
            if type(error).__name__ != "PanicException":
                raise
            raise UserError(f"{self.path}: tiktoken fails with its ranks or pattern: {_one_line(error)}") from None

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return self.encoding.decode_bytes([token for token in ids if token in self._known])

    def _check_bytes(self, text: str) -> None:
        """tiktoken panics on a byte without a rank."""
        if not self._without_rank:
            return
        for letter in sorted(set(text)):
            if not self._without_rank.isdisjoint(letter.encode("utf-8", "replace")):
                raise UserError(
                    f"{self.path}: no rank for {letter!r}, which the text holds; take it out of the text, or name a "
                    "tokenizer that has all bytes"
                )


def parse_ranks(content: bytes, path: Path) -> dict[bytes, int]:
    """Token -> rank, of the `base64 rank` lines in `content`. Raises UserError that names `path` and the line."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(content.splitlines(), start=1):
        if not line:
            continue
        where = f"{path}, line {number}: not a tiktoken file, or damaged"
        fields = line.split()
        if len(fields) != 2 or not fields[1].isdigit() or len(fields[1]) > len(str(LAST_RANK)):
            raise UserError(f"{where}: {line[:40]!r} is not `base64 rank`; get the file again")
        try:
            # Some vocabularies have a token of no bytes, spelled "=".
            token = b"" if fields[0] == b"=" else base64.b64decode(fields[0], validate=True)
        except binascii.Error:
            raise UserError(f"{where}: {fields[0][:40]!r} is not base64; get the file again") from None
        rank = int(fields[1])
        if rank > LAST_RANK:
            raise UserError(f"{where}: rank {rank} is above {LAST_RANK}; get the file again")
        if token in ranks:
            raise UserError(f"{where}: the token {token!r} has rank {ranks[token]} already; get the file again")
        ranks[token] = rank
    if not ranks:
        raise UserError(f"{path}: not a tiktoken file: it has no `base64 rank` lines")
    for byte in sorted(set().union(*ranks)):
        if bytes([byte]) not in ranks:
            raise UserError(
                f"{path}: not a tiktoken file, or damaged: tokens hold the byte 0x{byte:02x}, which has no rank of its "
                "own; get the file again"
            )
    return ranks


def _read_options(path: Path) -> tuple[dict[str, Any], Path, dict[str, bytes]]:
    """What the neighbour of `path` says, the file to name in errors, and the neighbour's bytes by its name."""
    neighbour = path.with_name(path.name + ".json")
    if not neighbour.is_file():
        return {}, path, {}
    content = read_file(neighbour)
    try:
        options = json.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{neighbour}: not JSON: {_one_line(error)}") from None
    legal = ("pattern", "special_tokens", "end_of_text", "begin_of_text")
    if not isinstance(options, dict) or not set(options) <= set(legal):
        raise UserError(f"{neighbour}: it must be an object with no keys but {', '.join(legal)}")
    for key in ("pattern", "end_of_text", "begin_of_text"):
        if not isinstance(options.get(key, ""), str):
            raise UserError(f"{neighbour}: {key} = {options[key]!r} is not a string")
    special = options.get("special_tokens", {})
    ids = special.values() if isinstance(special, dict) else [None]
    if not all(type(index) is int and 0 <= index <= LAST_RANK for index in ids):
        raise UserError(f"{neighbour}: special_tokens = {special!r} must be an object of ids from 0 to {LAST_RANK}")
    return options, neighbour, {neighbour.name: content}


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
