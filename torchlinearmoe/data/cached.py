"""The tokens of text that `data.paths` names, kept from one start to the next.

    cache/HASH/      a folder of shards as `prepare` writes it, or one token folder of an earlier version

The name is a hash of the tokenizer and of every file's path, size and time of change. Shards that were finished when a
start was killed are kept. What is damaged is made again; what was begun from files that changed since is removed.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from torchlinearmoe.data.chat import Chat
from torchlinearmoe.data.prepare import NoText, Options, Tell, make_again, prepare
from torchlinearmoe.data.prepared import (
    PLAN,
    SHARDS,
    is_cached,
    is_complete,
    open_tokens,
    read_json,
)
from torchlinearmoe.data.records import BadLine
from torchlinearmoe.data.store import TokenStore, is_store, name_of, remove_orphans, take_away
from torchlinearmoe.data.tokenizer import Tokenizer
from torchlinearmoe.errors import UserError, visible

logger = logging.getLogger(__name__)

LOOKED_THROUGH = 1 << 24
"""Documents up to which a cache is looked through for damage at every start."""


def cached_texts(
    files: Sequence[Path],
    tokenizer: Tokenizer,
    cache: Path,
    folder: Path | None = None,
    *,
    text_key: str = "text",
    chat: Chat | None = None,
    workers: int = 0,
    tell: Tell | None = None,
) -> Path:
    """The folder with the tokens of `files`, in `cache`; tokenised by `workers` processes (0: one a core) where needed.

    `chat`: how their messages are written, where they hold such. `folder`: where another process says they are. Raises
    UserError that names file and line.
    """
    told = chat.told(tokenizer) if chat is not None else "" if text_key == "text" else f"text_key {text_key}"
    folder = folder or cache / name_of(files, tokenizer, told)
    _mend(folder)
    if is_store(folder) or is_complete(folder):
        return folder
    _remove_outdated(cache, folder)
    way_out = "make room there, or set data.cache"
    try:
        prepare(
            files,
            tokenizer,
            folder,
            Options(text_key, chat=chat, way_out=way_out, named=cache, waits=True),
            workers=workers or len(os.sched_getaffinity(0)),
            tell=tell,
        )
    except (BadLine, NoText) as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise UserError(f"data.paths: {error}") from None
    return folder


def _mend(folder: Path) -> None:
    """Take away what is damaged."""
    if is_complete(folder):
        try:
            stores = open_tokens(folder)
            shards = stores if sum(store.num_documents for store in stores) <= LOOKED_THROUGH else []
        except UserError as error:
            take_away(folder, error)
            return
        damaged: list[Path] = []
        for store in shards:
            try:
                store.check()
            except UserError as error:
                logger.warning("%s; its text is read again", visible(str(error)))
                damaged.append(store.folder)
        if damaged:
            make_again(folder, damaged)
    elif folder.exists() and not (folder / PLAN).is_file() and not (folder / SHARDS).is_dir():
        try:
            TokenStore(folder)
        except UserError as error:
            take_away(folder, error)


def _remove_outdated(cache: Path, folder: Path) -> None:
    """Remove what was begun in the cache and never finished, by killed processes or from files as they were."""
    remove_orphans(cache)
    for begun in cache.glob("*"):
        if begun == folder or is_complete(begun) or is_store(begun) or not is_cached(begun):
            continue
        try:
            files = read_json(begun / PLAN)["asked"]["files"]
            states = [(Path(path).stat(), size, time) for path, size, time in files]
            outdated = any((state.st_size, state.st_mtime_ns) != (size, time) for state, size, time in states)
        except (OSError, UserError, KeyError, TypeError, ValueError):
            outdated = True
        if outdated:
            shutil.rmtree(begun, ignore_errors=True)
