"""Token folders of earlier versions are read as they are: found in a run's cache, and nothing is tokenised again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from saved_run import HERE, expected, no_tokenizing, unpack

from torchlinearmoe.data.open import open_data
from torchlinearmoe.data.splits import open_splits
from torchlinearmoe.data.store import TokenStore
from torchlinearmoe.data.tokenizer import load_tokenizer
from torchlinearmoe.recipe import resolve

TEXT, MESSAGES = HERE / "tokens" / "text.tar.xz", HERE / "tokens" / "messages.tar.xz"


def cached_under(file: Path, fingerprint: str, *told: str) -> str:
    """The name of a file's tokens in a cache of format 1."""
    state = file.stat()
    known = ["1", fingerprint, *told, f"{file.resolve()} {state.st_size} {state.st_mtime_ns}"]
    return hashlib.blake2b("\n".join(known).encode(), digest_size=12).hexdigest()


def assert_same(splits, archive: Path) -> None:
    """The documents of each split, and the packed sequence that was recorded."""
    recorded = expected(archive)
    assert splits.train.num_documents == recorded["train"]
    assert splits.validation.num_documents == recorded["validation"]
    sample = splits.train.samples(len(recorded["tokens"]))[1]
    assert sample.tokens.tolist() == recorded["tokens"]
    assert sample.labels.tolist() == recorded["labels"]
    assert list(sample.starts) == recorded["starts"]


def texts(store: TokenStore, tokenizer) -> list[str]:
    """The documents, without their start markers."""
    edges: Sequence[int] = store.offsets.tolist()
    return [tokenizer.decode(store.tokens[a + 1 : b].tolist()) for a, b in zip(edges, edges[1:])]


def test_a_token_folder_holds_the_documents_it_was_made_of(tmp_path: Path) -> None:
    folder = unpack(TEXT, tmp_path)
    tokenizer = load_tokenizer(folder / "letters.tiktoken")
    lines = (folder / "corpus.jsonl").read_text().splitlines()
    assert texts(TokenStore(folder / "tokens"), tokenizer) == [json.loads(line)["text"] for line in lines]
    with no_tokenizing():
        assert_same(open_splits([folder / "tokens"], tokenizer=tokenizer, validation_fraction=0.2), TEXT)


@pytest.mark.parametrize(
    "archive, corpus, name, changes",
    [
        (TEXT, "corpus.jsonl", "letters.tiktoken", {}),
        (MESSAGES, "conversations.jsonl", "chat.tiktoken", {"format": "messages", "chat_template": "turns.toml"}),
    ],
    ids=["text", "messages"],
)
def test_a_run_finds_its_cache(archive: Path, corpus: str, name: str, changes: dict[str, str], tmp_path: Path) -> None:
    folder = unpack(archive, tmp_path)
    tokenizer = load_tokenizer(folder / name)
    changes = {key: str(folder / value) if value.endswith(".toml") else value for key, value in changes.items()}
    told = [Path(changes["chat_template"]).read_text()] if changes else []
    cached = folder / "cache" / cached_under(folder / corpus, tokenizer.fingerprint, *told)
    cached.parent.mkdir()
    (folder / "tokens").rename(cached)
    data = {"paths": [str(folder / corpus)], "validation_fraction": 0.2, **changes}
    recipe = resolve({"data": data, "training": {"steps": 1}})
    with no_tokenizing():
        assert_same(open_data(recipe.data, tokenizer, cached.parent), archive)
    assert list(cached.parent.iterdir()) == [cached]
    (cached / "store.json").unlink()
    with no_tokenizing(), pytest.raises(AssertionError, match="tokenised again"):
        open_data(recipe.data, tokenizer, cached.parent)


def test_conversations_keep_which_tokens_are_trained(tmp_path: Path) -> None:
    folder = unpack(MESSAGES, tmp_path)
    tokenizer = load_tokenizer(folder / "chat.tiktoken")
    store = TokenStore(folder / "tokens")
    first = json.loads((folder / "conversations.jsonl").read_text().splitlines()[0])
    ids, trained = (part[: store.offsets[1]] for part in (store.tokens, store.trained))
    assert tokenizer.decode(ids[trained == 1].tolist()) == f"{first['response']}<|end|>"
    assert tokenizer.decode(ids[trained == 0].tolist()) == f"<|endoftext|>user {first['prompt']}\nanswer "
