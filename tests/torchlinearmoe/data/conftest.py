"""A tokenizer of single letters, for streams that can be written down by hand, and the corpus that ships."""

import pytest

from torchlinearmoe.data.splits import open_splits
from torchlinearmoe.data.store import write_store
from torchlinearmoe.data.tokenizer import Tokenizer, load_tokenizer


class LetterTokenizer(Tokenizer):
    """a .. z are 0 .. 25, the end of text is 26; where it `begins` texts, with 27, and it fills up with 28."""

    def __init__(self, path, fingerprint="letters", begins=False):
        self.path, self.fingerprint = path, fingerprint
        self.vocab_size, self.end_of_text = 29 if begins else 27, 26
        if begins:
            self.begin_of_text, self.padding = 27, 28

    def encode(self, text):
        return [ord(letter) - ord("a") for letter in text]

    def decode_bytes(self, ids):
        return bytes(ord("a") + token for token in ids)


@pytest.fixture
def letters(tmp_path):
    return LetterTokenizer(tmp_path / "letters")


@pytest.fixture
def begun(tmp_path):
    """The same letters with a token that begins a text."""
    return LetterTokenizer(tmp_path / "letters", begins=True)


@pytest.fixture
def make_stream(tmp_path, letters):
    """Documents of letters -> a stream that holds all of them."""
    made = 0

    def make(documents, tokenizer=letters):
        nonlocal made
        made += 1
        folder = tmp_path / f"stream-{made}"
        write_store(folder, documents, tokenizer)
        return open_splits([folder], tokenizer=tokenizer, validation_fraction=0).train

    return make


@pytest.fixture(scope="session")
def tokenizer():
    return load_tokenizer()


@pytest.fixture(scope="session")
def corpus(tokenizer, tmp_path_factory):
    return open_splits(tokenizer=tokenizer, validation_fraction=0.05, cache=tmp_path_factory.mktemp("cache"))
