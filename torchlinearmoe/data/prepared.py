"""A folder of many token shards, as `prepare` leaves it.

    plan.json            what it is made from, and how the work is shared out
    shards/UNIT-PART/    token folders of `store.py`, with what is known of each in shard.json
    prepared.json        appears last: every shard with its counts and checksums, the tokenizer, the summary
    bad_lines.jsonl      what was passed over, where it was asked for

A shard that is there is whole, so work that was stopped goes on with the first one that is not. All documents together,
shard after shard, are those of the files in their order, however the work was shared out.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from torchlinearmoe.data.megatron import MegatronStore, Special
from torchlinearmoe.data.store import NAME_BYTES, TokenStore, is_store
from torchlinearmoe.data.tokenizer import Tokenizer
from torchlinearmoe.errors import UserError

FORMAT = 1
PLAN = "plan.json"
MANIFEST = "prepared.json"
SHARDS = "shards"
SHARD = "shard.json"
BAD_LINES = "bad_lines.jsonl"
ARRAYS = ("tokens.npy", "offsets.npy", "keys.npy")
MASK = "trained.npy"
"""Which tokens are trained, in shards of messages."""


def is_prepared(folder: Path) -> bool:
    """Whether `prepare` writes or wrote this folder."""
    return (folder / MANIFEST).is_file() or ((folder / PLAN).is_file() and (folder / SHARDS).is_dir())


def is_complete(folder: Path) -> bool:
    """Whether `prepare` came to its end there."""
    return (folder / MANIFEST).is_file()


def is_tokens(folder: Path) -> bool:
    """Whether a folder holds tokens: one token folder, or many shards."""
    return is_store(folder) or is_prepared(folder)


def is_cached(folder: Path) -> bool:
    """Whether `folder` is one of a cache: tokens of text that lies elsewhere, under the name that they have there."""
    return re.fullmatch(f"[0-9a-f]{{{2 * NAME_BYTES}}}", folder.name) is not None and is_tokens(folder)


def read_json(path: Path) -> dict[str, Any]:
    """An object that `prepare` wrote. Raises UserError for what is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError("not an object")
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: damaged: {' '.join(str(error).split())}; delete it and prepare again") from None
    return found


def read_manifest(folder: Path) -> dict[str, Any]:
    """What is known of a finished folder. Raises UserError for one that is not, and for what is damaged."""
    if not is_complete(folder):
        raise UserError(f"{folder}: its shards are not all there yet; start prepare again with the same arguments")
    found = read_json(folder / MANIFEST)
    if found.get("format") != FORMAT:
        raise UserError(f"{folder}: prepared in format {found.get('format')}, this version reads {FORMAT}")
    return found


def open_tokens(folder: Path, tokenizer: Tokenizer | None = None) -> list[TokenStore]:
    """The token folders in `folder`: itself, or its shards, of which nothing but the manifest is read yet; or the index
    of Megatron, whose ids are those of `tokenizer`."""
    if folder.suffix == ".idx":
        assert tokenizer is not None
        return [MegatronStore(folder, Special.of(tokenizer))]
    if is_store(folder) or not is_prepared(folder):
        return [TokenStore(folder)]
    return stores_of(folder, read_manifest(folder))


def stores_of(folder: Path, manifest: dict[str, Any]) -> list[TokenStore]:
    """The shards that a manifest tells of. Raises UserError where it is damaged."""
    try:
        known = [{**manifest["store"], **shard} for shard in manifest["shards"]]
        return [TokenStore(folder / SHARDS / shard["name"], shard) for shard in known]
    except (KeyError, TypeError) as error:
        raise UserError(f"{folder / MANIFEST}: damaged: {error!r}; delete it and prepare again") from None


def messages_of(folder: Path, unknown: dict[str, Any] | None = None) -> dict[str, Any] | None:
    """What a token folder tells of the messages it is made of; None where it is made of text.

    One token folder alone does not tell by which template: `unknown`. Raises UserError.
    """
    if is_prepared(folder):
        return read_manifest(folder).get("messages")
    return unknown if (folder / MASK).is_file() else None


def checksum(path: Path) -> str:
    """Of a file, as the manifest has it."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
