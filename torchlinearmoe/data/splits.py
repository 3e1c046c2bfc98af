"""Training and held-out text as two streams of tokens.

A document belongs to the held-out split when the hash of its text falls under `validation_fraction`: whole documents,
no matter which other documents there are, and two copies of a text never on both sides. Split by tokens, the last share
of the stream of all documents is held out, which may begin inside one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, Protocol, TypeVar

import numpy as np

from torchlinearmoe.data.packing import SampleSource
from torchlinearmoe.data.shared import Decide, alone, open_stores
from torchlinearmoe.data.sources import find_sources, read_documents
from torchlinearmoe.data.store import Progress, TokenStore, cached_store
from torchlinearmoe.data.stream import TokenStream
from torchlinearmoe.data.tokenizer import Tokenizer
from torchlinearmoe.disk import expanded
from torchlinearmoe.errors import UserError

DEFAULT_CACHE = Path("~/.cache/torchlinearmoe")


class Stream(Protocol):
    """One split of the data: what it can be cut into."""

    num_documents: int

    def __len__(self) -> int: ...

    def samples(self, length: int, tail: bool = False) -> SampleSource:
        """Packed sequences of `length` tokens; with `tail` nothing is left over at the end."""
        ...

    def shortage(self) -> str:
        """Why there may be no sample of some length."""
        ...

    def note(self, length: int) -> str | None:
        """What is worth knowing before it is trained on in sequences of `length` tokens."""
        ...


S = TypeVar("S", bound=Stream)


@dataclass(frozen=True)
class Splits(Generic[S]):
    """The two streams of one corpus. `validation` is empty when nothing is held out."""

    train: S
    validation: S
    stores: tuple[TokenStore, ...]
    """All documents of both, in their order."""
    left_out: tuple[Path, ...] = ()
    """Folders under `data.paths` in which something was passed over because training wrote it."""
    unknown: Mapping[str, int] = field(default_factory=dict)
    """Files of no known kind there: how many, by suffix."""


def open_splits(
    paths: Sequence[str | Path] = (),
    *,
    tokenizer: Tokenizer,
    validation_fraction: float,
    split: str = "documents",
    begins: bool | None = None,
    cache: str | Path | None = None,
    progress: Progress | None = None,
    run_folder: Path | None = None,
    decide: Decide = alone,
) -> Splits[TokenStream]:
    """The corpus under `paths` (none: the one that ships), tokenised and split.

    Text is tokenised once into `cache` (default ~/.cache/torchlinearmoe); `progress` is called with (documents, tokens)
    meanwhile. Folders of tokens under `paths` are used as they are, after the text; what a run writes into `run_folder`
    is no text. `decide` picks the process whose word counts. `begins`: whether documents start with the begin-of-text
    token; None: as in the folders of tokens, else where the tokenizer has one. `split`: whether `documents` are held
    out, or the last `tokens`. Raises UserError, one line, on unreadable paths, on tokens of another tokenizer, and when
    a split has no document.
    """
    if not 0 <= validation_fraction < 1:
        raise UserError(f"data.validation_fraction = {validation_fraction}: it must be at least 0 and below 1")
    folder = expanded(cache or DEFAULT_CACHE, "data.cache")
    stores, found = open_stores(
        lambda: find_sources(paths, run_folder),
        lambda files, made, starting: cached_store(files, read_documents, starting, folder, progress, folder=made),
        tokenizer,
        decide,
        begins,
    )
    if split == "tokens":
        whole = TokenStream(stores, [np.ones(store.num_documents, dtype=bool) for store in stores])
        cut = len(whole) - round(validation_fraction * len(whole))
        train, validation = whole.part(0, cut), whole.part(cut, len(whole))
        if min(len(train), len(validation) if validation_fraction else 2) < 2:
            raise UserError(
                f"data.validation_fraction = {validation_fraction} leaves {len(train)} tokens to train on and "
                f"{len(validation)} for validation; each needs 2"
            )
        return Splits(train, validation, tuple(stores), found.left_out, found.unknown)
    bound = int(validation_fraction * 2**64)
    held_out = [store.keys < bound for store in stores]
    train, validation = TokenStream(stores, [~mask for mask in held_out]), TokenStream(stores, held_out)
    splits = Splits(train, validation, tuple(stores), found.left_out, found.unknown)
    check_not_empty(splits, validation_fraction, ", or data.validation_split = 'tokens' to hold out its last tokens")
    return splits


def check_not_empty(splits: Splits, fraction: float, instead: str = "") -> None:
    """Raise UserError when there is nothing to train on, or nothing held out that should be; `instead` ends it."""
    total = splits.train.num_documents + splits.validation.num_documents
    counted = f"data.validation_fraction = {fraction} leaves no document (of {total})"
    if not splits.train.num_documents:
        raise UserError(f"{counted} to train on; lower it or add documents{instead}")
    if fraction and not splits.validation.num_documents:
        raise UserError(f"{counted} for validation; raise it, add documents, set 0 to go without validation{instead}")
