"""Conversations are packed whole, each by itself, and only their responses have labels."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from torchlinearmoe import build_model
from torchlinearmoe.data.chat import Chat
from torchlinearmoe.data.chat_template import load_template
from torchlinearmoe.data.conversations import Conversations, open_conversations
from torchlinearmoe.data.loader import build_loader, build_validation_loader
from torchlinearmoe.data.messages import Message
from torchlinearmoe.data.packing import IGNORED, collate
from torchlinearmoe.data.splits import Splits
from torchlinearmoe.data.tokenizer import load_tokenizer
from torchlinearmoe.errors import UserError
from torchlinearmoe.recipe import resolve

TOKENIZER, TEMPLATE = load_tokenizer(), load_template("plain")


def write(folder: Path, entries: list[Any]) -> Path:
    file = folder / "data.jsonl"
    file.write_text("".join((entry if isinstance(entry, str) else json.dumps(entry)) + "\n" for entry in entries))
    return file


def random_pairs(count: int) -> list[dict[str, str]]:
    chance = random.Random()
    text = lambda: " ".join(chance.choice(["alpha", "beta", "gamma", "delta"]) for _ in range(chance.randint(1, 12)))  # noqa: E731
    return [{"prompt": f"{i} {text()}", "response": text()} for i in range(count)]


def opened(file: Path, fraction: float = 0.0) -> Splits[Conversations]:
    cache = file.parent / "cache"
    return open_conversations(
        [file], tokenizer=TOKENIZER, chat=Chat(TEMPLATE), validation_fraction=fraction, cache=cache
    )


def expected_pairs(pairs: list[dict[str, str]]) -> list[tuple[list[int], list[int]]]:
    """Inputs and labels of every conversation, alone."""
    out = []
    for pair in pairs:
        ids, trained = TEMPLATE.encode(
            [Message("user", pair["prompt"]), Message("assistant", pair["response"])], TOKENIZER
        )
        labels = [token if flag else IGNORED for token, flag in zip(ids[1:], trained[1:])]
        out.append((ids[:-1], labels))
    return out


def documents_of(batch: Any) -> list[tuple[list[int], list[int]]]:
    """Inputs and labels of every document of a micro-batch that has a label."""
    borders, out = batch.cu_seqlens, []
    for start, stop in zip(borders, borders[1:]):
        labels = batch.labels[start:stop].tolist()
        if any(label != IGNORED for label in labels):
            out.append((batch.tokens[start:stop].tolist(), labels))
    return out


def test_an_epoch_has_every_conversation_once_with_labels_on_its_response_alone(tmp_path: Path) -> None:
    pairs = random_pairs(60)
    stream = opened(write(tmp_path, pairs)).train
    rows = len(stream.samples(160))
    assert rows < 40  # several conversations a row
    found: list[tuple[list[int], list[int]]] = []
    loaders = [
        build_loader(stream, sequence_length=160, micro_batch_size=1, samples_per_step=2, seed=3, rank=r, ranks=2)
        for r in (0, 1)
    ]
    for loader in loaders:
        for _, step in zip(range(rows // 2), loader):
            found += [document for batch in step for document in documents_of(batch)]
    expected = expected_pairs(pairs)
    assert len(found) >= len(expected) - 10
    assert all(document in expected for document in found)
    whole = build_validation_loader(stream, sequence_length=160, micro_batch_size=2)
    assert [d for batch in whole for d in documents_of(batch)] == expected
    assert sum(batch.valid_tokens for batch in whole) == sum(l != IGNORED for _, labels in expected for l in labels)


def test_best_fit_keeps_conversations_whole_in_fewer_sequences(tmp_path: Path) -> None:
    stores, everyone = opened(write(tmp_path, random_pairs(60))).train.stores, (0, 1 << 64)
    lengths = np.concatenate([np.diff(store.offsets) for store in stores])
    found = {}
    for packing in ("concatenate", "best_fit"):
        samples = Conversations(stores, everyone, packing=packing).samples(160)
        batches = [collate([samples[index]]) for index in range(len(samples))]
        found[packing] = sorted(document for batch in batches for document in documents_of(batch)), len(samples)
        filled = sum(batch.counted_tokens for batch in batches)
        assert samples.padding == pytest.approx(1 - filled / (160 * len(samples)))
        assert sum(batch.begun for batch in batches) == 60 and not any(batch.cut for batch in batches)
    assert found["best_fit"][0] == found["concatenate"][0] and found["best_fit"][1] <= found["concatenate"][1]
    long = Conversations(stores, everyone, min_length=40)
    assert long.left_out == (lengths < 40).sum() == 60 - long.num_documents > 0
    assert f"; {long.left_out} shorter than data.min_length = 40 are left out; " in str(long.note(160))


def test_the_order_is_the_same_on_any_number_of_ranks(tmp_path: Path) -> None:
    stream = opened(write(tmp_path, random_pairs(40))).train

    def rows(ranks: int) -> list[list[int]]:
        loaders = [
            iter(
                build_loader(
                    stream, sequence_length=64, micro_batch_size=1, samples_per_step=4, seed=1, rank=r, ranks=ranks
                )
            )
            for r in range(ranks)
        ]
        steps = [[next(loader) for loader in loaders] for _ in range(9)]
        return [step[r][a].tokens.tolist() for step in steps for a in range(4 // ranks) for r in range(ranks)]

    assert rows(1) == rows(2) == rows(4)


def test_a_packed_conversation_has_the_loss_it_has_alone(tmp_path: Path) -> None:
    pairs = random_pairs(12)
    stream = opened(write(tmp_path, pairs)).train
    model: dict[str, Any] = {"mixer": "hgrn2", "layout": "LN", "num_layers": 2, "init_std": 0.2}
    decoder = build_model(resolve({"model": model, "training": {"steps": 1}}).model).double()
    packed = sum(
        decoder(batch.tokens, labels=batch.labels, documents=batch.documents()).item()
        for batch in build_validation_loader(stream, sequence_length=128, micro_batch_size=1)
    )
    alone = 0.0
    for tokens, labels in expected_pairs(pairs):
        logits = decoder(torch.tensor([tokens]))[0]
        alone += torch.nn.functional.cross_entropy(logits, torch.tensor(labels), reduction="sum").item()
    assert packed == pytest.approx(alone, rel=1e-9)


def test_what_is_longer_than_a_sequence_is_left_out_and_told(tmp_path: Path) -> None:
    pairs = [
        {"prompt": "a", "response": "b"},
        {"prompt": "word " * 40, "response": "b"},
        {"prompt": "c", "response": "d"},
    ]
    stream = opened(write(tmp_path, pairs)).train
    assert (
        stream.note(24)
        == "2 conversations in 2 sequences of 24 tokens; 1 longer than training.sequence_length are left out; "
        "37.50% is padding"
    )
    assert stream.note(400) == "3 conversations in 1 sequences of 400 tokens; 78.50% is padding"
    with pytest.raises(UserError, match="training.sequence_length = 4: the shortest conversation has"):
        build_loader(stream, sequence_length=4, micro_batch_size=1, samples_per_step=1, seed=0)


def keys_of(split: Conversations) -> list[int]:
    keys = np.concatenate([store.keys for store in split.stores])
    return sorted(keys[split.documents].tolist())


def test_held_out_conversations_are_whole_and_decided_by_their_messages(tmp_path: Path) -> None:
    pairs = random_pairs(80)
    splits = opened(write(tmp_path, pairs), 0.3)
    assert splits.train.num_documents + splits.validation.num_documents == 80
    assert 5 < splits.validation.num_documents < 50
    (tmp_path / "more").mkdir()
    shuffled = opened(write(tmp_path / "more", pairs[::-1]), 0.3)
    assert keys_of(shuffled.validation) == keys_of(splits.validation)


def test_another_template_is_not_read_from_the_cache(tmp_path: Path) -> None:
    file = write(tmp_path, random_pairs(3))
    opened(file)
    before = len(list((tmp_path / "cache").iterdir()))
    open_conversations(
        [file], tokenizer=TOKENIZER, chat=Chat(load_template("chatml")), validation_fraction=0, cache=tmp_path / "cache"
    )
    assert len(list((tmp_path / "cache").iterdir())) == before + 1


def test_the_instructions_that_ship_are_sound(tmp_path: Path) -> None:
    splits = open_conversations(tokenizer=TOKENIZER, chat=Chat(TEMPLATE), validation_fraction=0.05, cache=tmp_path)
    assert splits.train.num_documents + splits.validation.num_documents == 42 and splits.validation.num_documents


GOOD = {"prompt": "a", "response": "b"}


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("{not json", "line 2: not JSON: Expecting .* at column 2"),
        ("[]", "line 2: not an object"),
        ({"text": "a"}, 'line 2: neither "messages" nor "prompt" and "response"'),
        ({"prompt": "a"}, "line 2: neither"),
        ({"prompt": "a", "response": 3}, "line 2: response: the content is not a string"),
        ({"messages": "hi"}, 'line 2: "messages" is not a list'),
        ({"messages": ["hi"]}, r"line 2: messages\[0\] is not an object"),
        ({"messages": [{"role": "user", "content": "a"}]}, "line 2: no message of the assistant"),
        (
            {"messages": [{"role": "robot", "content": "a"}]},
            r"line 2: messages\[0\]: role 'robot'; legal: ",
        ),
        ({"messages": [{"role": "assistant", "content": None}]}, r"line 2: messages\[0\]: the content is not a string"),
    ],
)
def test_a_broken_line_is_named_and_nothing_is_cached(line: Any, wanted: str, tmp_path: Path) -> None:
    file = write(tmp_path, [GOOD, line, GOOD])
    with pytest.raises(UserError, match=f"{file}, {wanted}") as caught:
        opened(file)
    assert "\n" not in str(caught.value) and not list((tmp_path / "cache").iterdir())


def test_files_of_another_kind_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(UserError, match="a.txt': data.format = 'messages' needs JSONL files"):
        opened(tmp_path / "a.txt")
    (tmp_path / "b.jsonl").write_bytes(b"\xff\n")
    with pytest.raises(UserError, match="b.jsonl, line 1: not UTF-8"):
        opened(tmp_path / "b.jsonl")
    stream = opened(write(tmp_path, ["", GOOD, " "])).train
    assert stream.num_documents == 1 and stream.ids(0) == [*expected_pairs([GOOD])[0][0], TOKENIZER.end_of_text]


def test_a_row_knows_what_is_padding_and_a_prompt_is_none(tmp_path: Path) -> None:
    pairs = random_pairs(12)
    stream = opened(write(tmp_path, pairs)).train
    loader = build_validation_loader(stream, sequence_length=128, micro_batch_size=2)
    places = sum(len(tokens) for tokens, _ in expected_pairs(pairs))
    assert sum(batch.counted_tokens for batch in loader) == places < 128 * 2 * len(loader)
    for batch in loader:
        counted = batch.documents().counted
        assert counted is not None and bool(counted[batch.labels != IGNORED].all())
        assert bool((batch.tokens[~counted] == TOKENIZER.end_of_text).all())
