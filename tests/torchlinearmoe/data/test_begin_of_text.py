"""Documents and conversations that start with a token of their own, in folders of tokens and caches, old and new."""

import json
import shutil

import pytest

from torchlinearmoe.data.chat import Chat
from torchlinearmoe.data.chat_template import load_template
from torchlinearmoe.data.conversations import open_conversations
from torchlinearmoe.data.fingerprint import fingerprint
from torchlinearmoe.data.messages import Message
from torchlinearmoe.data.sources import read_documents
from torchlinearmoe.data.splits import open_splits
from torchlinearmoe.data.store import TokenStore, cached_store, write_store
from torchlinearmoe.data.tokenizer import DEFAULT_TOKENIZER, load_tokenizer
from torchlinearmoe.errors import UserError


def write(path, *texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def make_old(store):
    """As versions wrote it that knew of no special id but the end of text."""
    file = store.folder / "store.json"
    described = json.loads(file.read_text())
    del described["begin_of_text"], described["padding"]
    file.write_text(json.dumps(described))
    return store.folder


def ids(splits):
    return splits.train.read(0, len(splits.train)).tolist()


def opened(paths, tokenizer, **options):
    return open_splits(paths, tokenizer=tokenizer, validation_fraction=0, **options)


def test_a_folder_of_tokens_says_how_its_documents_start(tmp_path, begun, letters):
    store = write_store(tmp_path / "begun", ["abc", "de"], begun)
    assert store.tokens.tolist() == [27, 0, 1, 2, 26, 27, 3, 4, 26]
    assert store.offsets.tolist() == [0, 5, 9]
    assert (store.begin_of_text, store.end_of_text, store.padding) == (27, 26, 28)
    plain = write_store(tmp_path / "plain", ["abc", "de"], letters)
    assert (plain.begin_of_text, plain.end_of_text, plain.padding) == (None, 26, 26)
    assert plain.keys.tolist() == store.keys.tolist()
    old = TokenStore(make_old(plain))
    assert (old.begin_of_text, old.start, old.padding) == (None, 26, 26)


def test_an_old_folder_keeps_its_meaning_and_text_beside_it_follows(tmp_path, begun):
    old = make_old(write_store(tmp_path / "old", ["abc"], begun.starting(False)))
    text = write(tmp_path / "text.jsonl", "de")
    cache = {"cache": tmp_path / "cache"}
    assert ids(opened([old], begun)) == [26, 0, 1, 2, 26]
    assert ids(opened([text, old], begun, **cache)) == [26, 3, 4, 26, 0, 1, 2, 26]
    assert ids(opened([text], begun, **cache)) == [27, 3, 4, 26]
    assert ids(opened([text], begun, begins=False, **cache)) == [26, 3, 4, 26]
    with pytest.raises(UserError, match="old' start with the token that ends a text, others of this run with a token"):
        opened([old], begun, begins=True)
    new = write_store(tmp_path / "new", ["fg"], begun).folder
    assert ids(opened([new, text], begun, **cache)) == [27, 3, 4, 26, 27, 5, 6, 26]
    for first, second in ((old, new), (new, old)):
        with pytest.raises(UserError, match=f"documents in '{second}' start with .*; tokenise that text again"):
            opened([first, second], begun)


def test_a_token_that_is_not_there_cannot_begin(tmp_path, letters):
    with pytest.raises(UserError, match=r"data.begin_of_text = true: .*letters names no token that begins a text"):
        opened([write(tmp_path / "text.jsonl", "de")], letters, begins=True, cache=tmp_path / "cache")


def test_an_old_cache_is_found_again_by_a_run_that_goes_on_and_by_no_other(tmp_path, begun):
    """Its name is that of versions which knew of no begin-of-text token."""
    text, cache = write(tmp_path / "text.jsonl", "abc", "de"), tmp_path / "cache"
    name = cached_store([text], read_documents, begun.starting(False), cache).folder
    before = opened([text], begun, begins=False, cache=cache)
    assert before.stores[0].folder == name
    make_old(before.stores[0])
    after = opened([text], begun, begins=False, cache=cache)
    assert fingerprint(after.stores) == fingerprint(before.stores)
    assert list(cache.iterdir()) == [name]
    assert ids(opened([text], begun, cache=cache))[0] == 27
    assert len(list(cache.iterdir())) == 2


@pytest.fixture
def spelled(tmp_path):
    """The tokenizer that ships, with a token that begins a text."""
    file = tmp_path / "spelled.tiktoken"
    shutil.copy(DEFAULT_TOKENIZER, file)
    special = {"<|endoftext|>": 1023, "<|im_start|>": 1024, "<|im_end|>": 1025, "<|startoftext|>": 1026}
    told = {"special_tokens": special, "begin_of_text": "<|startoftext|>"}
    file.with_name("spelled.tiktoken.json").write_text(json.dumps(told))
    return load_tokenizer(file)


def test_a_tiktoken_file_names_its_token_beside_it(spelled):
    assert (spelled.begin_of_text, spelled.end_of_text, spelled.start) == (1026, 1023, 1026)
    assert spelled.starting(False).start == 1023
    assert 1026 not in spelled.encode("<|startoftext|>")
    file = spelled.path.with_name("spelled.tiktoken.json")
    told = json.loads(file.read_text())
    file.write_text(json.dumps(told | {"begin_of_text": "<|endoftext|>"}))
    assert load_tokenizer(spelled.path).begin_of_text is None, "one token for both is today's single marker"
    file.write_text(json.dumps(told | {"begin_of_text": "<s>"}))
    with pytest.raises(UserError, match="begin_of_text = '<s>' is not one of special_tokens"):
        load_tokenizer(spelled.path)


def test_a_conversation_and_its_prompt_start_with_it(tmp_path, spelled):
    file = tmp_path / "some.jsonl"
    file.write_text('{"prompt": "Hi", "response": "Hello."}\n')
    template = load_template("chatml")
    for tokenizer, start in ((spelled, 1026), (spelled.starting(False), 1023)):
        splits = open_conversations(
            [file], tokenizer=tokenizer, chat=Chat(template), validation_fraction=0, cache=tmp_path / "cache"
        )
        sample = splits.train.samples(64)[0]
        row = sample.tokens.tolist()
        prompt = template.prompt([Message("user", "Hi")], tokenizer)
        assert prompt[0] == start and row[: len(prompt)] == prompt
        filled = sample.filled
        assert [token for token in row[:filled] if token in (1023, 1026)] == [start]
        assert set(row[filled:]) == {1023} and sample.labels[filled - 1] == 1025
        assert splits.stores[0].begin_of_text == tokenizer.begin_of_text
