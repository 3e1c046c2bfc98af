"""The token folders that all ranks read: one rank finds or makes them, the others take its word.

    rank 0    data.paths -> sources -> tokenises -> [folder, what is in it]  --.
    others                                              opens the folders   <--+

So no rank looks into `data.paths` while another one writes there, and all of them train on the same documents.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol, TypeVar

from torchlinearmoe.data.sources import Sources
from torchlinearmoe.data.store import TokenStore, is_store
from torchlinearmoe.data.tokenizer import Tokenizer
from torchlinearmoe.errors import UserError

T = TypeVar("T")


class Decide(Protocol):
    """Does an action in one process; every process returns its result or raises its UserError."""

    def __call__(self, action: Callable[[], T], /) -> T: ...


def alone(action: Callable[[], T], /) -> T:
    """The `Decide` of a process without others."""
    return action()


class Content(NamedTuple):
    """What tells two token folders apart."""

    documents: int
    tokens: int
    tokenizer: str


def open_stores(
    find: Callable[[], Sources],
    tokenise: Callable[[Sequence[Path], Path | None], TokenStore],
    tokenizer: Tokenizer,
    decide: Decide,
) -> tuple[list[TokenStore], Sources]:
    """The tokens of the text that `find` finds, then the token folders it finds; and what it found.

    `tokenise(files, folder)` is `cached_store`. A host that does not see the deciding one's cache makes its own, of the
    same files. Raises UserError on tokens of another tokenizer, and where a host holds other tokens than the others.
    """

    def prepare() -> tuple[Sources, list[tuple[Path, Content]]]:
        found = find()
        made = [tokenise(found.files, None)] if found.files else []
        stores = [*made, *map(TokenStore, found.stores)]
        for store in stores:
            _check_tokenizer(store, tokenizer)
        return found, [(store.folder, _content(store)) for store in stores]

    found, told = decide(prepare)
    stores = []
    for folder, content in told:
        makes = folder not in found.stores and not is_store(folder)
        store = tokenise(found.files, folder) if makes else TokenStore(folder)
        _check_tokenizer(store, tokenizer)
        if (here := _content(store)) != content:
            raise UserError(
                f"'{folder}' holds {here} on this host and {content} on the first rank's; give all hosts the same "
                "data.paths and data.tokenizer, and delete that folder"
            )
        stores.append(store)
    return stores, found


def _check_tokenizer(store: TokenStore, tokenizer: Tokenizer) -> None:
    if store.tokenizer_fingerprint != tokenizer.fingerprint:
        raise UserError(f"data.paths: '{store.folder}' was tokenised by another tokenizer than {tokenizer.path}")


def _content(store: TokenStore) -> Content:
    return Content(store.num_documents, store.num_tokens, store.tokenizer_fingerprint)
