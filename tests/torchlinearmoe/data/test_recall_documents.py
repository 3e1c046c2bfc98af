"""Documents of associative recall can be answered from their pairs, and from nothing else."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest

from torchlinearmoe.data.fingerprint import fingerprint_of
from torchlinearmoe.data.loader import build_loader, build_validation_loader
from torchlinearmoe.data.packing import IGNORED
from torchlinearmoe.data.recall import HELD_OUT, TRAINED, Recall, open_recall
from torchlinearmoe.recipe import RecipeError, resolve
from torchlinearmoe.recipe.schema import DataRecipe, RecallRecipe

TWO = ({"pairs": 3, "length": 16, "examples": 41}, {"pairs": 8, "length": 32, "examples": 10})


def data(**more: Any) -> DataRecipe:
    table = {"format": "recall", "recall": TWO, "recall_vocabulary": 64, "validation_fraction": 0.1, **more}
    return resolve({"data": table, "training": {"steps": 1, "sequence_length": 64}}).data


@pytest.mark.parametrize("fill", ["random", "zero"])
def test_every_key_is_asked_once_and_its_label_is_its_value(fill: str) -> None:
    recall, entry = Recall(50, fill, 3), RecallRecipe(pairs=5, length=26)
    for number in range(50):
        tokens, labels = recall.draw(entry, number)
        keys, values = tokens[:10:2].tolist(), tokens[1:10:2].tolist()
        assert len(set(keys)) == len(set(values)) == 5
        assert all(1 <= key < 25 for key in keys) and all(25 <= value < 50 for value in values)
        asked = np.flatnonzero(labels != IGNORED)
        assert len(asked) == 5 and asked.min() >= 10 and not (asked % 2).any()
        assert dict(zip(tokens[asked].tolist(), labels[asked].tolist())) == dict(zip(keys, values))
        rest = tokens[~np.isin(np.arange(26), [*range(10), *asked.tolist()])]
        assert (rest != 0).any() if fill == "random" else not rest.any()


def test_most_keys_are_asked_early_as_a_power_law_says() -> None:
    """The first key to be placed takes gap g with probability in proportion to g^-0.99."""
    recall, entry = Recall(64, "zero", 0), RecallRecipe(pairs=1, length=18)
    gaps = Counter(int(np.flatnonzero(recall.draw(entry, n)[1] != IGNORED)[0]) for n in range(4000))
    weights = np.arange(1, 9) ** -0.99
    expected = 4000 * weights / weights.sum()
    found = np.array([gaps[2 + 2 * g] for g in range(8)])
    assert (np.abs(found - expected) < 5 * np.sqrt(expected)).all(), (found, expected)


def test_a_document_is_a_function_of_seed_entry_and_number() -> None:
    entry = RecallRecipe(pairs=4, length=16)

    def tokens(seed: int = 0, number: int = 7, split: int = TRAINED, **entries: int) -> list[int]:
        return (
            Recall(64, "random", seed)
            .draw(RecallRecipe(**{"pairs": 4, "length": 16, **entries}), number, split)[0]
            .tolist()
        )

    assert tokens() == Recall(64, "random", 0).draw(entry, 7)[0].tolist()
    others = [tokens(seed=1), tokens(number=8), tokens(split=HELD_OUT), tokens(pairs=3)]
    assert all(other != tokens() for other in others)


def test_sequences_are_packed_of_whole_documents_of_one_entry() -> None:
    stream = open_recall(data()).train
    samples = stream.samples(64)
    assert len(samples) == 41 // 4 + 10 // 2  # what does not fill a sequence is left out
    assert len(stream) == 41 * 16 + 10 * 32 and stream.num_documents == 51
    first, later = samples[0], samples[10]
    assert first.starts == [0, 16, 32, 48] and later.starts == [0, 32] and first.filled is later.filled is None
    recall = stream.recall
    for sample, entry, numbers in ((samples[1], stream.entries[0], range(4, 8)), (later, stream.entries[1], (0, 1))):
        drawn = [recall.draw(entry, number) for number in numbers]
        assert sample.tokens.tolist() == [token for tokens, _ in drawn for token in tokens]
        assert sample.labels.tolist() == [label for _, labels in drawn for label in labels]


def test_validation_asks_every_held_out_document_once() -> None:
    stream = open_recall(data(validation_fraction=0.13)).validation
    assert stream.counts == [6, 2]
    batches = list(build_validation_loader(stream, sequence_length=64, micro_batch_size=2))
    assert sum(batch.valid_tokens for batch in batches) == 6 * 3 + 2 * 8
    assert [batch.filled for batch in batches] == [(64, 32), (64, 0)]
    assert batches[0].documents().num_documents == 7  # six, and what fills up


def test_a_step_is_the_same_on_any_number_of_ranks() -> None:
    def rows(rank: int, ranks: int) -> list[list[int]]:
        loader = build_loader(
            open_recall(data()).train,
            sequence_length=64,
            micro_batch_size=2,
            samples_per_step=4,
            seed=5,
            rank=rank,
            ranks=ranks,
            stop_step=6,
        )
        return [batch.tokens.tolist() for step in loader for batch in step]

    one, left, right = rows(0, 1), rows(0, 2), rows(1, 2)
    assert one[::2] == left and one[1::2] == right


def test_other_documents_have_another_fingerprint() -> None:
    changes = ({}, {"recall_seed": 1}, {"recall_fill": "zero"}, {"recall": TWO[:1]}, {"recall_vocabulary": 62})
    found = [fingerprint_of(open_recall(data(**change))).hash for change in changes]
    assert len(set(found)) == len(found) and found[0] == fingerprint_of(open_recall(data())).hash


@pytest.mark.parametrize(
    "table, told",
    [
        ({"recall": []}, "data.recall = []: names no documents"),
        ({"recall": [{"pairs": 3}]}, "names no length"),
        ({"recall": [{"pairs": 5, "length": 16}]}, "at least four times the pairs"),
        ({"recall": [{"pairs": 3, "length": 15}]}, "a length must be even"),
        ({"recall": [{"pairs": 3, "length": 48}]}, "must divide training.sequence_length = 64; legal: 1, 2, 4, 8"),
        ({"recall": [{"pairs": 32, "length": 128}]}, "has keys for 1 to 31"),
        ({"recall": [{"pairs": 3, "length": 16, "examples": 0}]}, "examples = 0"),
        ({"recall": [TWO[0], TWO[0]]}, "two entries have the same pairs and length"),
        ({"recall_vocabulary": 4096}, "must lie between 4 and model.vocab_size"),
        ({"recall_seed": -1}, "data.recall_seed = -1"),
        ({"paths": ["text"]}, "data.paths: data.format = 'recall' makes its own documents"),
        ({"validation_split": "tokens"}, "documents of recall are held out whole"),
    ],
    ids=str,
)
def test_what_cannot_be_drawn_is_refused(table: dict[str, Any], told: str) -> None:
    with pytest.raises(RecipeError, match=r".*") as refused:
        data(**table)
    assert told in str(refused.value) and "\n" not in str(refused.value)
