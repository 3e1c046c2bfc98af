"""A Hugging Face `tokenizer.json` as a `Tokenizer`, through the optional `tokenizers` library.

Two ways of spelling bytes are known, by the file's decoder: byte-level vocabularies (GPT-2, Qwen, Llama 3, DeepSeek),
where each character of a token stands for one byte; and SentencePiece vocabularies (Llama 2, Mixtral), where U+2581 is
a space and `<0x0A>` is a byte.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from torchlinearmoe.data.tokenizer.base import END_OF_TEXT, Tokenizer, read_file
from torchlinearmoe.errors import UserError

END_OF_TEXT_NAMES = (END_OF_TEXT, "<|end_of_text|>", "<｜end▁of▁sentence｜>", "</s>", "<eos>", "<|im_end|>")
"""Tried in this order when `tokenizer_config.json` names no `eos_token`."""


def import_tokenizers() -> Any:
    """The `tokenizers` library, or a UserError that says how to get it."""
    try:
        import tokenizers
        import tokenizers.models
        import tokenizers.pre_tokenizers
        import tokenizers.trainers
    except ImportError:
        raise UserError(
            "the `tokenizers` library is not installed, and a Hugging Face tokenizer needs it: "
            "pip install torchlinearmoe[hf]"
        ) from None
    return tokenizers


def byte_level_alphabet() -> dict[str, int]:
    """Letter -> byte of byte-level vocabularies.

    GPT-2's rule: a byte that prints as a Latin-1 character is that character; the others take the code points from 256
    on, in order.
    """
    printing = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printing]
    return {chr(byte): byte for byte in sorted(printing)} | {chr(256 + i): byte for i, byte in enumerate(others)}


class HuggingFaceTokenizer(Tokenizer):
    """Any tokenizer of the `tokenizers` library, from its JSON file."""

    def __init__(self, path: Path) -> None:
        tokenizers = import_tokenizers()
        self.path = path
        content = read_file(path)
        self.files: dict[str, bytes] = {path.name: content}
        try:
            self._model = tokenizers.Tokenizer.from_buffer(content)
            described = json.loads(content)
        except BaseException as error:  # the library raises bare Exception, and panics are none
            if isinstance(error, (KeyboardInterrupt, SystemExit)):
                raise
            raise UserError(f"{path}: not a Hugging Face tokenizer: {' '.join(str(error).split())}") from None
        self._model.encode_special_tokens = True  # a special token spelled out in a text is plain text
        self._model.no_truncation()
        self._model.no_padding()
        vocabulary = self._model.get_vocab(with_added_tokens=True)
        if not vocabulary:
            raise UserError(f"{path}: not a Hugging Face tokenizer: its vocabulary is empty")
        self.vocab_size = max(vocabulary.values()) + 1
        config = self._read_config()
        end_of_text = self._find_end_of_text(vocabulary, config)
        self.end_of_text = vocabulary[end_of_text]
        begin_of_text = self._find_begin_of_text(vocabulary, config)
        self.begin_of_text = None if begin_of_text == self.end_of_text else begin_of_text
        padding = self._spelling(config, "pad_token")
        self.padding = None if padding is None else vocabulary.get(padding)
        added = [token for token in described.get("added_tokens", ()) if token.get("special")]
        self.special_tokens = {token["content"]: token["id"] for token in added}
        named = {key: token.get("content") if isinstance(token, dict) else token for key, token in config.items()}
        named = {key: token for key, token in named.items() if key.endswith("_token") and isinstance(token, str)}
        self.names = {"eos_token": end_of_text} | named
        self._bytes = _token_bytes(described, vocabulary, path)
        self._without_id = _bytes_without_id(described, vocabulary)
        self.fingerprint = hashlib.blake2b(content + end_of_text.encode(), digest_size=16).hexdigest()

    def _read_config(self) -> dict[str, Any]:
        """What `tokenizer_config.json` beside the file says; nothing where it is not there."""
        path = self.path.with_name("tokenizer_config.json")
        if not path.is_file():
            return {}
        content = read_file(path)
        self.files[path.name] = content
        try:
            config = json.loads(content.decode("utf-8-sig"))
        except (ValueError, RecursionError):
            config = None
        if not isinstance(config, dict):
            raise UserError(f"{path}: not a JSON object")
        return config

    def _find_end_of_text(self, vocabulary: dict[str, int], config: dict[str, Any]) -> str:
        config_path = self.path.with_name("tokenizer_config.json")
        token = self._spelling(config, "eos_token")
        if token is not None:
            if token not in vocabulary:
                raise UserError(f"{config_path}: eos_token = {token!r} is not in the vocabulary of {self.path}")
            return token
        for token in END_OF_TEXT_NAMES:
            if token in vocabulary:
                return token
        raise UserError(f"{self.path}: no end-of-text token; set eos_token in {config_path}")

    def _find_begin_of_text(self, vocabulary: dict[str, int], config: dict[str, Any]) -> int | None:
        """The `bos_token` of `tokenizer_config.json`, else what the `post_processor` of the file puts before a text."""
        if config.get("add_bos_token") is False:
            return None
        token = self._spelling(config, "bos_token")
        if token is not None:
            return vocabulary.get(token)
        marked = self._model.encode("a", add_special_tokens=True)
        starts = 0 in marked.special_tokens_mask and marked.special_tokens_mask[0] == 1
        return marked.ids[0] if starts else None

    def _spelling(self, config: dict[str, Any], key: str) -> str | None:
        """A token that is named by itself or by an object of its properties; None where it is not named."""
        token = config.get(key)
        spelled = token.get("content") if isinstance(token, dict) else token
        if spelled is not None and not isinstance(spelled, str):
            path = self.path.with_name("tokenizer_config.json")
            raise UserError(f"{path}: {key} = {token!r}: must be a string, or an object with one under 'content'")
        return spelled

    def _check_bytes(self, text: str) -> None:
        """The library leaves out what its vocabulary lacks, without a word."""
        if not self._without_id:
            return
        for letter in sorted(set(text)):
            if not self._without_id.isdisjoint(letter.encode("utf-8", "replace")):
                raise UserError(
                    f"{self.path}: no id for {letter!r}, which the text holds; take it out of the text, or name a "
                    "tokenizer that has all bytes"
                )

    def encode(self, text: str) -> list[int]:
        self._check_bytes(text)
        return self._model.encode(text, add_special_tokens=False).ids

    def encode_spans(self, text: str, special: bool = True) -> tuple[list[int], list[int]]:
        self._check_bytes(text)
        self._model.encode_special_tokens = not special
        try:
            encoded = self._model.encode(text, add_special_tokens=False)
        finally:
            self._model.encode_special_tokens = True
        return encoded.ids, [end for _, end in encoded.offsets]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        for text in texts:
            self._check_bytes(text)
        return [encoded.ids for encoded in self._model.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return b"".join(self._bytes.get(token, b"") for token in ids)


def _bytes_without_id(described: dict[str, Any], vocabulary: dict[str, int]) -> set[int]:
    """The bytes that a byte-level vocabulary without a token for unknown ones cannot spell."""
    model = described.get("model") or {}
    if '"ByteLevel"' not in json.dumps(described.get("decoder")) or described.get("normalizer"):
        return set()
    if model.get("type") != "BPE" or model.get("unk_token") or model.get("byte_fallback"):
        return set()
    return {byte for letter, byte in byte_level_alphabet().items() if letter not in vocabulary}


def _token_bytes(described: dict[str, Any], vocabulary: dict[str, int], path: Path) -> dict[int, bytes]:
    """The bytes of every id."""
    decoder = json.dumps(described.get("decoder"))
    added = {token["id"]: token["content"].encode() for token in described.get("added_tokens", ())}
    if '"ByteLevel"' in decoder:
        alphabet = byte_level_alphabet()

        def spell(token: str) -> bytes:
            return bytes(alphabet[letter] for letter in token)
    elif '"ByteFallback"' in decoder or '"Metaspace"' in decoder:

        def spell(token: str) -> bytes:
            byte = re.fullmatch("<0x([0-9A-F]{2})>", token)
            return bytes([int(byte[1], 16)]) if byte else token.replace("\u2581", " ").encode()
    else:
        raise UserError(f"{path}: its decoder is neither byte-level nor SentencePiece, so its ids have no bytes")
    try:
        return {index: spell(token) for token, index in vocabulary.items() if index not in added} | added
    except KeyError as error:
        raise UserError(f"{path}: the letter {error} of a token stands for no byte") from None
