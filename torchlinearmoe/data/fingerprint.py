"""Whether a run that goes on reads what it read before.

The sample that comes next is a function of the data and of how many samples were seen, so other data would repeat some
and skip others without a word. A checkpoint therefore carries a fingerprint of the documents: their keys and lengths in
their order, and how many there are. Paths and times are no part of it: data may move.

Where data are allowed to change, the order starts anew at the sample that comes next:

    samples seen      0 1 2 3 4 5 6 | 7 8 9 ...         the data changed after sample 6
    order             of the old    | a fresh shuffle of all of the new, epoch after epoch, from its first epoch on
    first_sample      0             | 7                 kept in the checkpoints that follow
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any, Literal

import numpy as np

from torchlinearmoe.data.splits import Splits
from torchlinearmoe.data.store import TokenStore
from torchlinearmoe.errors import RecipeError, UserError

CHECKED = ("keys.npy", "offsets.npy")
READ = 1 << 26
"""Documents whose keys and lengths are read at every start: a gigabyte."""


@dataclass(frozen=True)
class Fingerprint:
    """What tells one set of documents from another."""

    documents: int
    tokens: int
    hash: str

    def __str__(self) -> str:
        return f"{self.documents} documents of {self.tokens} tokens"


@dataclass(frozen=True)
class DataState:
    """What a checkpoint keeps of the data beside the next step."""

    fingerprint: Fingerprint
    first_sample: int = 0
    """The sample of the run with which the order over these data began."""

    def table(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)


def fingerprint(stores: Sequence[TokenStore], min_length: int = 0) -> Fingerprint:
    """Of all documents of the stores that have `min_length` ids, those of either split.

    Where there are more than READ of them, the checksums that a manifest has of a store take the place of its own.
    """
    digest = hashlib.blake2b(digest_size=16)
    many = sum(store.num_documents for store in stores) > READ
    for _, group in groupby(stores, lambda store: store.folder if store.known is None else store.folder.parent):
        shards = list(group)  # they count as one store
        if many and all(store.known is not None for store in shards):
            told = [store.known["checksums"][name] for store in shards if store.known for name in CHECKED]
            digest.update("".join(told).encode())
            continue
        for store in shards:
            digest.update(np.asarray(store.keys, dtype="<u8").tobytes())
        for store in shards:
            digest.update(np.diff(store.offsets).astype("<i8").tobytes())
    documents, tokens = sum(store.num_documents for store in stores), sum(store.num_tokens for store in stores)
    if min_length:
        digest.update(f"min_length {min_length}".encode())
        lengths = (np.diff(store.offsets) for store in stores)
        counts = [(len(long), int(long.sum())) for found in lengths for long in [found[found >= min_length]]]
        documents, tokens = (sum(column) for column in zip(*counts))
    return Fingerprint(documents, tokens, digest.hexdigest())


def fingerprint_of(splits: Splits[Any], min_length: int = 0) -> Fingerprint:
    """Of all documents of either split, stored, those of `min_length` ids, or made."""
    if splits.stores:
        return fingerprint(splits.stores, min_length)
    streams = (splits.train, splits.validation)
    digest = hashlib.blake2b(splits.made_of.encode(), digest_size=16).hexdigest()
    return Fingerprint(sum(stream.num_documents for stream in streams), sum(map(len, streams)), digest)


def follow(
    saved: Mapping[str, Any], now: Fingerprint, on_change: Literal["refuse", "restart_epoch"], next_sample: int
) -> tuple[DataState, str | None]:
    """How the data go on from a checkpoint whose table is `saved`, and a line to say.

    next_sample: samples seen so far. Raises RecipeError when the data changed and must not.
    """
    if "fingerprint" not in saved:
        return DataState(now), "the checkpoint is of an earlier version: whether its data have changed is not known"
    try:
        before, first_sample = Fingerprint(**saved["fingerprint"]), int(saved["first_sample"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"the checkpoint's state.json: 'data' is not what a run saves ({error!r}); name another checkpoint"
        ) from None
    if before == now:
        return DataState(now, first_sample), None
    told = "others" if (before.documents, before.tokens) == (now.documents, now.tokens) else str(now)
    told = f"the checkpoint was trained on {before}, data.paths holds {told} now"
    if on_change == "refuse":
        raise RecipeError(
            f"data.on_change = 'refuse': {told}; bring the data back, or set it to 'restart_epoch' to go on in a fresh "
            "order over the new data"
        )
    return DataState(now, next_sample), f"data.on_change = 'restart_epoch': {told}; a fresh order over them begins"
