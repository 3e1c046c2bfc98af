"""Data are known by their documents: where they lie is nothing to a run, what they hold is everything."""

import json
from pathlib import Path

import numpy as np
import pytest

from torchlinearmoe.data.chat import Chat
from torchlinearmoe.data.chat_template import load_template
from torchlinearmoe.data.conversations import open_conversations
from torchlinearmoe.data.fingerprint import DataState, Fingerprint, fingerprint, follow
from torchlinearmoe.data.order import SampleOrder
from torchlinearmoe.data.splits import open_splits
from torchlinearmoe.data.tokenizer import load_tokenizer
from torchlinearmoe.errors import RecipeError

TEXTS = [f"document {number} of some words" for number in range(30)]


def known(folder: Path, *files: list[str], fraction: float = 0.2) -> Fingerprint:
    """Of texts, a file a list, in a folder of this name."""
    folder.mkdir(parents=True)
    for number, texts in enumerate(files):
        (folder / f"{number}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    splits = open_splits(
        [folder], tokenizer=load_tokenizer(), validation_fraction=fraction, cache=folder.parent / f"{folder.name}-cache"
    )
    return fingerprint(splits.stores)


def test_it_knows_documents_not_places(tmp_path: Path) -> None:
    found = known(tmp_path / "a", TEXTS)
    assert found.documents == 30 and found.tokens > 30 * 5
    assert known(tmp_path / "moved/b", TEXTS) == found
    assert known(tmp_path / "c", TEXTS[:11], TEXTS[11:], fraction=0.4) == found
    store = next((tmp_path / "a-cache").iterdir())
    splits = open_splits([store], tokenizer=load_tokenizer(), validation_fraction=0.2)
    assert fingerprint(splits.stores) == found
    lengths = np.diff(splits.stores[0].offsets)
    long = lengths[lengths >= (bound := int(lengths.max()))]
    chosen = fingerprint(splits.stores, bound)
    assert 0 < chosen.documents == len(long) < 30 and chosen.tokens == long.sum()
    assert chosen.hash != found.hash
    others = [TEXTS[:-1], [*TEXTS, "one more"], [*TEXTS[:-1], "document 99 of some words"], TEXTS[::-1]]
    different = {known(tmp_path / f"other{number}", texts).hash for number, texts in enumerate(others)}
    assert len(different | {found.hash}) == 5


def test_conversations_have_one_too(tmp_path: Path) -> None:
    found = []
    for number, words in enumerate(("Hello.", "Hello.", "Hullo.")):
        lines = [{"prompt": f"Hi {i}", "response": words} for i in range(20)]
        path = tmp_path / f"{number}.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        splits = open_conversations(
            [path],
            tokenizer=load_tokenizer(),
            chat=Chat(load_template("plain")),
            validation_fraction=0.3,
            cache=tmp_path,
        )
        found.append(fingerprint(splits.stores))
    assert found[0] == found[1] != found[2]


OLD, NEW = Fingerprint(30, 300, "aa"), Fingerprint(31, 320, "bb")


def test_the_same_data_go_on_in_their_order() -> None:
    saved = json.loads(json.dumps({"next_step": 4, **DataState(OLD, 12).table()}))
    assert follow(saved, OLD, "refuse", 40) == (DataState(OLD, 12), None)


def test_changed_data_are_refused_by_the_key_or_begin_afresh() -> None:
    saved = DataState(OLD, 12).table()
    told = "the checkpoint was trained on 30 documents of 300 tokens, data.paths holds 31 documents of 320 tokens now"
    with pytest.raises(RecipeError, match=f"^data.on_change = 'refuse': {told}; bring[^\n]*'restart_epoch'[^\n]*$"):
        follow(saved, NEW, "refuse", 40)
    state, line = follow(saved, NEW, "restart_epoch", 40)
    assert state == DataState(NEW, 40) and line is not None and told in line
    with pytest.raises(RecipeError, match="data.paths holds others now"):
        follow(saved, Fingerprint(30, 300, "cc"), "refuse", 40)


def test_earlier_checkpoints_go_on_with_a_line() -> None:
    state, line = follow({"next_step": 3}, NEW, "refuse", 40)
    assert state == DataState(NEW) and line is not None and "earlier version" in line


def test_an_order_that_begins_late_goes_through_all_samples_afresh() -> None:
    usual, late = SampleOrder(10, seed=3), SampleOrder(10, seed=3, first=7)
    first_epoch = [late[g] for g in range(7, 17)]
    assert sorted(first_epoch) == sorted(late[g] for g in range(17, 27)) == list(range(10))
    assert first_epoch != [usual[g] for g in range(10)] and first_epoch != [usual[g] for g in range(10, 20)]
    assert first_epoch != [late[g] for g in range(17, 27)]
    assert [SampleOrder(10, seed=3, first=0)[g] for g in range(20)] == [usual[g] for g in range(20)]
