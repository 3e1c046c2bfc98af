"""tiktoken's ranks as a `tokenizer.json`, so that transformers reads what is exported.

tiktoken merges, in a piece of text, the two neighbours whose union has the lowest rank. In the other file merges are
pairs in the order of their priority: for each token, all pairs of tokens that make it up.

    ranks    a 0   b 1   c 2   ab 3   bc 4   abc 5
    merges   a b   |   b c   |   a bc, ab c

A piece that is a token as a whole is that token, whatever its merges say (`ignore_merges`).
"""

from __future__ import annotations

import json
import re
from typing import Any

from torchlinearmoe.checkpoint.tokenizer_files import CONFIG, MADE_FROM, TEMPLATE, TOKENIZER
from torchlinearmoe.data.tokenizer import TiktokenTokenizer, Tokenizer
from torchlinearmoe.data.tokenizer.huggingface import byte_level_alphabet


def exported_files(tokenizer: Tokenizer, max_length: int, config: bytes | None) -> dict[str, bytes]:
    """What transformers' AutoTokenizer needs besides the tokenizer's own files, by name.

    max_length: tokens the model reads; config: the `tokenizer_config.json` that travels with it, if one does.
    """
    if isinstance(tokenizer, TiktokenTokenizer):
        table = {**_config(tokenizer, max_length), MADE_FROM: tokenizer.path.name}
        return {TOKENIZER: _dumped(tokenizer_json(tokenizer)), CONFIG: _dumped(table)}
    known: dict[str, Any] = {} if config is None else json.loads(config)
    if "tokenizer_class" in known:
        return {}
    return {CONFIG: _dumped({**_config(tokenizer, max_length), **known})}


def with_template(config: bytes, template: str) -> dict[str, bytes]:
    """The `tokenizer_config.json` with a chat template, and the file that newer readers take it from, by name."""
    table = {**json.loads(config), "chat_template": template}
    return {CONFIG: _dumped(table), TEMPLATE: template.encode()}


def tokenizer_json(tokenizer: TiktokenTokenizer) -> dict[str, Any]:
    """The contents of a `tokenizer.json` with the same ids for every text without special tokens."""
    letter = {byte: letter for letter, byte in byte_level_alphabet().items()}
    spelled = {token: "".join(letter[byte] for byte in token) for token in tokenizer.ranks if token}
    vocabulary = {spelled[token]: rank for token, rank in tokenizer.ranks.items() if token}
    vocabulary |= dict(tokenizer.special_tokens)
    split = {
        "type": "Split",
        # `{1,3}+` gives nothing back in tiktoken's patterns, and in the other's repeats itself.
        "pattern": {"Regex": re.sub(r"(\{\d+(?:,\d*)?\})\+", r"\1", tokenizer.pattern)},
        "behavior": "Isolated",
        "invert": False,
    }
    cut = {"add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": index, "content": token, **plain}
            for token, index in sorted(tokenizer.special_tokens.items(), key=lambda entry: entry[1])
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, {"type": "ByteLevel", **cut}]},
        "post_processor": _begins(tokenizer),
        "decoder": {"type": "ByteLevel", **cut},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": True,
            "vocab": vocabulary,
            "merges": [[spelled[left], spelled[right]] for left, right in merges(tokenizer.ranks)],
        },
    }


def merges(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """All pairs of tokens that make up a token, by the token's rank, then by theirs."""
    found = []
    for token, _ in sorted(ranks.items(), key=lambda entry: entry[1]):
        pairs = ((token[:at], token[at:]) for at in range(1, len(token)))
        known = [(left, right) for left, right in pairs if left in ranks and right in ranks]
        found += sorted(known, key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
    return found


def _begins(tokenizer: Tokenizer) -> dict[str, Any] | None:
    """What puts the begin-of-text token before a text, where documents start with one."""
    begin = tokenizer.begin_of_text
    if begin is None:
        return None
    token = _spelling(tokenizer, begin)
    text = {"Sequence": {"id": "A", "type_id": 0}}
    first = {"SpecialToken": {"id": token, "type_id": 0}}
    return {
        "type": "TemplateProcessing",
        "single": [first, text],
        "pair": [first, text, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {token: {"id": token, "ids": [begin], "tokens": [token]}},
    }


def _config(tokenizer: Tokenizer, max_length: int) -> dict[str, Any]:
    padding = tokenizer.end_of_text if tokenizer.padding is None else tokenizer.padding
    ids = {"bos_token": tokenizer.start, "eos_token": tokenizer.end_of_text, "pad_token": padding}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
        **{key: _spelling(tokenizer, index) for key, index in ids.items()},
    }


def _spelling(tokenizer: Tokenizer, index: int) -> str:
    """A special token by its id."""
    known = (token for token, found in tokenizer.special_tokens.items() if found == index)
    return next(known, tokenizer.decode([index]))


def _dumped(table: dict[str, Any]) -> bytes:
    return (json.dumps(table, indent=1, ensure_ascii=False) + "\n").encode()
