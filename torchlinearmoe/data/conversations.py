"""Finetuning data: conversations, packed whole, of which the messages of some roles are trained.

`messages.py` says what a line of a file holds. Every one has at least one message that is trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from torchlinearmoe.data.best_fit import best_fit
from torchlinearmoe.data.cached import cached_texts
from torchlinearmoe.data.chat import Chat
from torchlinearmoe.data.order import SampleOrder
from torchlinearmoe.data.packing import IGNORED, Order, Sample, ignored_sample
from torchlinearmoe.data.prepare import Tell
from torchlinearmoe.data.prepared import messages_of
from torchlinearmoe.data.shared import Decide, alone, open_stores
from torchlinearmoe.data.sources import Sources, find_messages
from torchlinearmoe.data.splits import DEFAULT_CACHE, Packing, Splits, check_long_enough, check_not_empty
from torchlinearmoe.data.store import TokenStore
from torchlinearmoe.data.tokenizer import Tokenizer
from torchlinearmoe.disk import expanded

DEFAULT_INSTRUCTIONS = Path(__file__).parent / "instructions"


class Conversations:
    """The conversations of one split."""

    def __init__(
        self,
        stores: Sequence[TokenStore],
        keys: tuple[int, int],
        min_length: int = 0,
        packing: Packing = "concatenate",
    ) -> None:
        """`keys`: the conversations whose key lies in keys[0] .. keys[1] - 1 belong to the split; those of fewer than
        `min_length` ids are left out. `packing`: how the others fill sequences."""
        self.stores, self._min_length = tuple(stores), min_length
        self._packing: Packing = packing
        low, high = keys
        keyed = [low <= store.keys for store in stores]
        if high < 1 << 64:
            keyed = [here & (store.keys < high) for here, store in zip(keyed, stores)]
        chosen, lengths = np.concatenate(keyed), np.concatenate([np.diff(store.offsets) for store in stores])
        self.documents = np.flatnonzero(chosen & (lengths >= min_length))
        """int64: their numbers among those of all stores."""
        self.left_out = int(chosen.sum()) - len(self.documents)
        """Conversations that are too short."""
        self.num_documents = len(self.documents)
        self._lengths = lengths[self.documents]

    def __len__(self) -> int:
        """Tokens in all."""
        return int(self._lengths.sum())

    def samples(self, length: int, tail: bool = False) -> PackedConversations:
        """Packed sequences of `length` tokens; the last one is never short, so `tail` changes nothing."""
        return PackedConversations(self.stores, self.documents, self._lengths, length, self._packing)

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
        if self._min_length:
            text += f"; {self.left_out} shorter than data.min_length = {self._min_length} are left out"
        text += f"; {packed.padding:.2%} is padding"
        return text


class PackedConversations:
    """Sequences of `length` tokens, each of whole conversations in the order of the data, the rest ignored.

    A conversation of n tokens takes n - 1 places: its last token is only predicted. One that does not fit into a
    sequence is left out. With `best_fit` their order is that of `best_fit.py`, and less is ignored.
    """

    def __init__(
        self,
        stores: Sequence[TokenStore],
        documents: np.ndarray,
        lengths: np.ndarray,
        length: int,
        packing: Packing = "concatenate",
    ) -> None:
        fits = lengths - 1 <= length
        self.stores, self.length = stores, length
        self.documents = documents[fits]
        self.left_out = int(len(documents) - fits.sum())
        """Conversations longer than a sequence."""
        self.padding = 0.0
        """Share of all places that hold none."""
        if packing == "best_fit":
            sequences = best_fit(lengths[fits] - 1, length)
            order = np.argsort(sequences, kind="stable")
            self.documents = self.documents[order]
            self._firsts = np.searchsorted(sequences[order], np.arange(int(sequences.max(initial=-1)) + 2))
        else:
            self._firsts = self._in_turn(lengths[fits] - 1, length)
        if len(self):
            self.padding = 1 - int((lengths[fits] - 1).sum()) / (len(self) * length)

    @staticmethod
    def _in_turn(places: np.ndarray, length: int) -> np.ndarray:
        """int64 [sequences + 1]: the first conversation of each; one begins where the next does not fit any more."""
        firsts, used = [], length
        for index, more in enumerate(places.tolist()):
            if used + more > length:
                firsts.append(index)
                used = 0
            used += more
        return np.array([*firsts, len(places)], dtype=np.int64)

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
        begun = len(starts)
        if place < self.length:
            starts.append(place)
        return Sample(sample.tokens, sample.labels, starts, place, begun)

    def ignored(self) -> Sample:
        """A sample that counts for nothing."""
        return ignored_sample(self.length, self.stores[0].padding)

    def order(self, seed: int, first: int = 0, stream: tuple[int, ...] = ()) -> Order:
        """All of them, epoch after epoch."""
        return SampleOrder(len(self), seed, first, stream)


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
    min_length: int = 0,
    packing: Packing = "concatenate",
    begins: bool | None = None,
    cache: str | Path | None = None,
    tell: Tell | None = None,
    run_folder: Path | None = None,
    decide: Decide = alone,
) -> Splits:
    """The conversations under `paths` (none: those that ship), encoded once into `cache` and split.

    A conversation is held out by the hash of its messages. Folders that `prepare` made of messages are taken as they
    are. `min_length`, `packing`, `run_folder`, `decide`, `tell` and `begins` are those of `open_splits`. Raises
    UserError, one line that names the file and line, and for tokens of other messages than `chat` tells of.
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
        Conversations(stores, (bound, 1 << 64), min_length, packing),
        Conversations(stores, (0, bound), min_length),
        tuple(stores),
        left_out=found.left_out,
        unknown=found.unknown,
    )
    check_long_enough([splits.train, splits.validation], min_length)
    check_not_empty(splits, validation_fraction)
    return splits
