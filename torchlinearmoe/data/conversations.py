"""Finetuning data: conversations, packed whole, of which the messages of some roles are trained.

`messages.py` says what a line of a file holds. Every one has at least one message that is trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from torchlinearmoe.data.cached import cached_texts
from torchlinearmoe.data.chat import Chat
from torchlinearmoe.data.order import SampleOrder
from torchlinearmoe.data.packing import IGNORED, Order, Sample, ignored_sample
from torchlinearmoe.data.prepare import Tell
from torchlinearmoe.data.prepared import messages_of
from torchlinearmoe.data.shared import Decide, alone, open_stores
from torchlinearmoe.data.sources import Sources, find_messages
from torchlinearmoe.data.splits import DEFAULT_CACHE, Splits, check_not_empty
from torchlinearmoe.data.store import TokenStore
from torchlinearmoe.data.tokenizer import Tokenizer
from torchlinearmoe.disk import expanded

DEFAULT_INSTRUCTIONS = Path(__file__).parent / "instructions"


class Conversations:
    """The conversations of one split."""

    def __init__(self, stores: Sequence[TokenStore], keys: tuple[int, int]) -> None:
        """`keys`: the conversations whose key lies in keys[0] .. keys[1] - 1 belong to the split."""
        self.stores = tuple(stores)
        low, high = keys
        chosen = [low <= store.keys for store in stores]
        if high < 1 << 64:
            chosen = [here & (store.keys < high) for here, store in zip(chosen, stores)]
        self.documents = np.flatnonzero(np.concatenate(chosen))
        """int64: their numbers among those of all stores."""
        self.num_documents = len(self.documents)
        self._lengths = np.concatenate([np.diff(store.offsets) for store in stores])[self.documents]

    def __len__(self) -> int:
        """Tokens in all."""
        return int(self._lengths.sum())

    def samples(self, length: int, tail: bool = False) -> PackedConversations:
        """Packed sequences of `length` tokens; the last one is never short, so `tail` changes nothing."""
        return PackedConversations(self.stores, self.documents, self._lengths, length)

    def ids(self, number: int) -> list[int]:
        """The ids of one of them."""
        return _read(self.stores, int(self.documents[number]))[0].tolist()

    def shortage(self) -> str:
        """Why there may be no sample of some length."""
        return f"the shortest conversation has {int(self._lengths.min()) - 1} tokens; lengthen it"

    def note(self, length: int) -> str | None:
        """How they are packed, and how many are not."""
        packed = self.samples(length)
        text = f"{len(packed.documents)} conversations in {len(packed)} sequences of {length} tokens"
        if packed.left_out:
            text += f"; {packed.left_out} longer than training.sequence_length are left out"
        return text


class PackedConversations:
    """Sequences of `length` tokens, each of whole conversations in the order of the data, the rest ignored.

    A conversation of n tokens takes n - 1 places: its last token is only predicted. One that does not fit into a
    sequence is left out.
    """

    def __init__(self, stores: Sequence[TokenStore], documents: np.ndarray, lengths: np.ndarray, length: int) -> None:
        fits = lengths - 1 <= length
        self.stores, self.length = stores, length
        self.documents = documents[fits]
        self.left_out = int(len(documents) - fits.sum())
        """Conversations longer than a sequence."""
        firsts, used = [], length
        for index, places in enumerate((lengths[fits] - 1).tolist()):
            if used + places > length:
                firsts.append(index)
                used = 0
            used += places
        self._firsts = np.array([*firsts, len(self.documents)], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._firsts) - 1

    def __getitem__(self, index: int) -> Sample:
        sample = self.ignored()
        starts, place = [], 0
        for document in self.documents[self._firsts[index] : self._firsts[index + 1]]:
            ids, trained = _read(self.stores, int(document))
            end = place + len(ids) - 1
            sample.tokens[place:end] = ids[:-1]
            sample.labels[place:end] = np.where(trained[1:], ids[1:], IGNORED)
            starts.append(place)
            place = end
        if place < self.length:
            starts.append(place)
        return Sample(sample.tokens, sample.labels, starts, place)

    def ignored(self) -> Sample:
        """A sample that counts for nothing."""
        return ignored_sample(self.length, self.stores[0].padding)

    def order(self, seed: int, first: int = 0) -> Order:
        """All of them, epoch after epoch."""
        return SampleOrder(len(self), seed, first)


def _read(stores: Sequence[TokenStore], document: int) -> tuple[np.ndarray, np.ndarray]:
    """The ids of a document of all stores, and uint8 which of them are trained."""
    for store in stores:
        if document < store.num_documents:
            start, stop = store.offsets[document : document + 2]
            return store.read(start, stop), store.trained[start:stop]
        document -= store.num_documents
    raise IndexError(document)


def open_conversations(
    paths: Sequence[str | Path] = (),
    *,
    tokenizer: Tokenizer,
    chat: Chat,
    validation_fraction: float,
    begins: bool | None = None,
    cache: str | Path | None = None,
    tell: Tell | None = None,
    run_folder: Path | None = None,
    decide: Decide = alone,
) -> Splits:
    """The conversations under `paths` (none: those that ship), encoded once into `cache` and split.

    A conversation is held out by the hash of its messages. Folders that `prepare` made of messages are taken as they
    are. `run_folder`, `decide`, `tell` and `begins` are those of `open_splits`. Raises UserError, one line that names
    the file and line, and for tokens of other messages than `chat` tells of.
    """
    folder = expanded(cache or DEFAULT_CACHE, "data.cache")

    def find() -> Sources:
        found = find_messages(paths or [DEFAULT_INSTRUCTIONS], run_folder)
        for tokens in found.stores:
            chat.check(messages_of(tokens, chat.described()), tokens)
        return found

    stores, found = open_stores(
        find,
        lambda files, made, starting: cached_texts(files, starting, folder, made, chat=chat, tell=tell),
        tokenizer,
        decide,
        begins,
    )
    bound = int(validation_fraction * 2**64)
    splits = Splits(
        Conversations(stores, (bound, 1 << 64)),
        Conversations(stores, (0, bound)),
        tuple(stores),
        left_out=found.left_out,
        unknown=found.unknown,
    )
    check_not_empty(splits, validation_fraction)
    return splits
