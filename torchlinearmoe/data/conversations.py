"""Finetuning data: JSONL files, one conversation a line.

    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]}
    {"prompt": "Hi", "response": "Hello."}

Roles are system, user and assistant. Every line has at least one turn of the assistant, else nothing is trained on it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from torchlinearmoe.data.best_fit import best_fit
from torchlinearmoe.data.chat_template import ROLES, ChatTemplate, Message
from torchlinearmoe.data.order import SampleOrder
from torchlinearmoe.data.packing import IGNORED, Order, Sample, ignored_sample
from torchlinearmoe.data.shared import Decide, alone, open_stores
from torchlinearmoe.data.sources import Sources, find_sources, read_lines
from torchlinearmoe.data.splits import DEFAULT_CACHE, Packing, Splits, check_long_enough, check_not_empty
from torchlinearmoe.data.store import Encoded, Progress, TokenStore, cached_store, document_key
from torchlinearmoe.data.tokenizer import Tokenizer
from torchlinearmoe.disk import expanded
from torchlinearmoe.errors import UserError

DEFAULT_INSTRUCTIONS = Path(__file__).parent / "instructions"
BATCH = 1000
"""Conversations encoded at once."""

Conversation = list[Message]


class Conversations:
    """The conversations of one split."""

    def __init__(
        self, store: TokenStore, chosen: np.ndarray, min_length: int = 0, packing: Packing = "concatenate"
    ) -> None:
        """`chosen`: bool [documents], the conversations of `store` that belong to the split; those of fewer than
        `min_length` ids are left out. `packing`: how the others fill sequences."""
        lengths = np.diff(store.offsets)
        self.store, self._min_length = store, min_length
        self._packing: Packing = packing
        self.documents = np.flatnonzero(chosen & (lengths >= min_length))
        self.left_out = int(chosen.sum()) - len(self.documents)
        """Conversations that are too short."""
        self.num_documents = len(self.documents)
        self._lengths = lengths[self.documents]

    def __len__(self) -> int:
        """Tokens in all."""
        return int(self._lengths.sum())

    def samples(self, length: int, tail: bool = False) -> PackedConversations:
        """Packed sequences of `length` tokens; the last one is never short, so `tail` changes nothing."""
        return PackedConversations(self.store, self.documents, self._lengths, length, self._packing)

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
        store: TokenStore,
        documents: np.ndarray,
        lengths: np.ndarray,
        length: int,
        packing: Packing = "concatenate",
    ) -> None:
        fits = lengths - 1 <= length
        self.store, self.length = store, length
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
            start, stop = self.store.offsets[document : document + 2]
            ids = self.store.read(start, stop)
            end = place + len(ids) - 1
            sample.tokens[place:end] = ids[:-1]
            sample.labels[place:end] = np.where(self.store.trained[start + 1 : stop], ids[1:], IGNORED)
            starts.append(place)
            place = end
        begun = len(starts)
        if place < self.length:
            starts.append(place)
        return Sample(sample.tokens, sample.labels, starts, place, begun)

    def ignored(self) -> Sample:
        """A sample that counts for nothing."""
        return ignored_sample(self.length, self.store.padding)

    def order(self, seed: int, first: int = 0, stream: tuple[int, ...] = ()) -> Order:
        """All of them, epoch after epoch."""
        return SampleOrder(len(self), seed, first, stream)


def open_conversations(
    paths: Sequence[str | Path] = (),
    *,
    tokenizer: Tokenizer,
    template: ChatTemplate,
    validation_fraction: float,
    min_length: int = 0,
    packing: Packing = "concatenate",
    begins: bool | None = None,
    cache: str | Path | None = None,
    progress: Progress | None = None,
    run_folder: Path | None = None,
    decide: Decide = alone,
) -> Splits:
    """The conversations under `paths` (none: those that ship), encoded once into `cache` and split.

    A conversation is held out by the hash of its messages. `min_length`, `packing`, `run_folder`, `decide` and `begins`
    are those of `open_splits`. Raises UserError, one line that names the file and line.
    """
    folder = expanded(cache or DEFAULT_CACHE, "data.cache")
    (store,), found = open_stores(
        lambda: _find_messages(paths, run_folder),
        lambda files, made, starting: (
            cached_store(
                files,
                read_conversations,
                starting,
                folder,
                progress,
                encode=partial(_encode, template=template),
                told=template.source,
                folder=made,
            ).folder
        ),
        tokenizer,
        decide,
        begins,
    )
    held_out = store.keys < int(validation_fraction * 2**64)
    splits = Splits(
        Conversations(store, ~held_out, min_length, packing),
        Conversations(store, held_out, min_length),
        (store,),
        left_out=found.left_out,
        unknown=found.unknown,
    )
    check_long_enough([splits.train, splits.validation], min_length)
    check_not_empty(splits, validation_fraction)
    return splits


def _find_messages(paths: Sequence[str | Path], run_folder: Path | None) -> Sources:
    found = find_sources(paths or [DEFAULT_INSTRUCTIONS], run_folder)
    if found.stores:
        raise UserError(f"data.paths: '{found.stores[0]}' holds tokens, not messages; give JSONL files")
    for file in found.files:
        if file.suffix not in (".jsonl", ".json"):
            raise UserError(f"data.paths: '{file}': data.format = 'messages' needs JSONL files")
    return found


def read_conversations(files: Sequence[Path]) -> Iterator[Conversation]:
    """The conversations of `files`, line after line. Raises UserError that names file and line."""
    for path in files:
        for number, line in read_lines(path):
            if not line.strip():
                continue
            try:
                yield parse_conversation(json.loads(line))
            except json.JSONDecodeError as error:
                raise UserError(
                    f"{path}, line {number}: not JSON: {error.msg} at column {error.colno}; mend "
                    "the line or take it out"
                ) from None
            except (ValueError, RecursionError) as error:
                raise UserError(f"{path}, line {number}: {error}") from None


def parse_conversation(entry: Any) -> Conversation:
    """The messages of one line. Raises ValueError that names what is wrong with it."""
    if not isinstance(entry, dict):
        raise ValueError("not an object")
    if "messages" in entry:
        turns = entry["messages"]
        if not isinstance(turns, list):
            raise ValueError('"messages" is not a list')
        messages = [_message(turn, f"messages[{index}]") for index, turn in enumerate(turns)]
    elif "prompt" in entry and "response" in entry:
        pairs = (("user", "prompt"), ("assistant", "response"))
        messages = [_message({"role": role, "content": entry[key]}, key) for role, key in pairs]
    else:
        raise ValueError('neither "messages" nor "prompt" and "response"')
    if not any(message.role == "assistant" for message in messages):
        raise ValueError("no message of the assistant: nothing to train on")
    return messages


def _message(turn: Any, where: str) -> Message:
    if not isinstance(turn, dict):
        raise ValueError(f"{where} is not an object")
    role, content = turn.get("role"), turn.get("content")
    if role not in ROLES:
        raise ValueError(f"{where}: role {role!r}; legal: {', '.join(ROLES)}")
    if not isinstance(content, str):
        raise ValueError(f"{where}: the content is not a string")
    # JSON can spell half a character, which has no UTF-8 form.
    return Message(role, content.encode("utf-16", "surrogatepass").decode("utf-16", "replace"))


def _encode(
    conversations: Iterable[Conversation], tokenizer: Tokenizer, template: ChatTemplate
) -> Iterator[list[Encoded]]:
    batch: list[Encoded] = []
    for messages in conversations:
        ids, trained = template.encode(messages, tokenizer)
        batch.append(Encoded(document_key(json.dumps(messages)), ids, trained))
        if len(batch) == BATCH:
            yield batch
            batch = []
    if batch:
        yield batch
