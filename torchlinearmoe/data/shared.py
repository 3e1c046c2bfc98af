"""The token folders that all ranks read: one rank finds or makes them, the others take its word.

    rank 0    data.paths -> sources -> tokenises -> [folder, what is in it]  --.
    others                                              opens the folders   <--+

So no rank looks into `data.paths` while another one writes there, and all of them train on the same documents.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol, TypeVar

from torchlinearmoe.data.prepared import is_complete, open_tokens
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
    begin_of_text: int | None


def open_stores(
    find: Callable[[], Sources],
    tokenise: Callable[[Sequence[Path], Path | None, Tokenizer], Path],
    tokenizer: Tokenizer,
    decide: Decide,
    begins: bool | None,
) -> tuple[list[TokenStore], Sources]:
    """The tokens of the text that `find` finds, then the token folders it finds; and what it found.

    `tokenise(files, folder, tokenizer)` gives the folder of a cache that has the files' tokens. A host that does not
    see the deciding one's cache makes its own, of the same files. `begins`: whether documents start with the
    begin-of-text token; None: as in the folders found, else where the tokenizer has one. Raises UserError on tokens of
    another tokenizer, on documents that start otherwise, and where a host holds other tokens than the others.
    """

    def prepare() -> tuple[Sources, bool | None, list[tuple[Path, Content]]]:
        found = find()
        begun, folders = begins, [folder for folder in found.stores if folder.suffix != ".idx"]
        if begins is None and folders:
            begun = open_tokens(folders[0])[0].begin_of_text is not None
        starting = tokenizer.starting(begun)
        written = {folder: open_tokens(folder, starting) for folder in found.stores}
        made = [tokenise(found.files, None, starting)] if found.files else []
        stores = {**{folder: open_tokens(folder) for folder in made}, **written}
        return found, begun, [(folder, _content(some, starting)) for folder, some in stores.items()]

    found, begun, told = decide(prepare)
    starting = tokenizer.starting(begun)
    stores = []
    for folder, content in told:
        if folder not in found.stores and not (is_store(folder) or is_complete(folder)):
            tokenise(found.files, folder, starting)
        some = open_tokens(folder, starting)
        if (here := _content(some, starting)) != content:
            raise UserError(
                f"'{folder}' holds {here} on this host and {content} on the first rank's; give all hosts the same "
                "data.paths and data.tokenizer, and delete that folder"
            )
        stores += some
    return stores, found


def _check_tokenizer(store: TokenStore, tokenizer: Tokenizer) -> None:
    if store.tokenizer_fingerprint != tokenizer.fingerprint:
        raise UserError(f"data.paths: '{store.folder}' was tokenised by another tokenizer than {tokenizer.path}")
    if store.begin_of_text != tokenizer.begin_of_text:
        ways = ["the token that ends a text", "a token that begins a text"]
        here, wanted = (ways[of.begin_of_text is not None] for of in (store, tokenizer))
        raise UserError(
            f"data.begin_of_text: documents in '{store.folder}' start with {here}, others of this run with {wanted}; "
            "tokenise that text again"
        )


def _content(stores: Sequence[TokenStore], tokenizer: Tokenizer) -> Content:
    """What the stores of a folder hold. Raises UserError for tokens of another tokenizer."""
    for store in stores[:1]:  # those of a folder are of one
        _check_tokenizer(store, tokenizer)
    documents, tokens = sum(s.num_documents for s in stores), sum(s.num_tokens for s in stores)
    return Content(documents, tokens, stores[0].tokenizer_fingerprint, stores[0].begin_of_text)
