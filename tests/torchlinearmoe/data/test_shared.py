"""One process finds the data, the others read what it found."""

import json
import shutil

import pytest

from torchlinearmoe.data.splits import open_splits
from torchlinearmoe.errors import UserError


class Told:
    """The word of the process that went first, for those that come after."""

    def __init__(self):
        self.answer = None

    def first(self, action, /):
        self.answer = action()
        return self.answer

    def later(self, action, /):
        return self.answer


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    write(folder / "a.jsonl", "abc", "de")
    return folder


def write(path, *texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def tokens(folder, letters, decide):
    opened = open_splits([folder], tokenizer=letters, validation_fraction=0, cache=folder / "cache", decide=decide)
    return opened.train.read(0, len(opened.train)).tolist()


def test_a_file_that_comes_between_is_nobodys(folder, letters):
    told = Told()
    first = tokens(folder, letters, told.first)
    write(folder / "b.jsonl", "fgh")
    assert tokens(folder, letters, told.later) == first == [26, 0, 1, 2, 26, 3, 4, 26]


def test_a_host_without_the_cache_makes_it_of_the_same_files(folder, letters):
    told = Told()
    first = tokens(folder, letters, told.first)
    shutil.rmtree(folder / "cache")
    write(folder / "b.jsonl", "fgh")
    assert tokens(folder, letters, told.later) == first
    assert len(list((folder / "cache").iterdir())) == 1


def test_a_host_with_other_text_or_another_tokenizer_says_so(folder, letters):
    told = Told()
    tokens(folder, letters, told.first)
    letters.fingerprint = "other"
    with pytest.raises(UserError, match="was tokenised by another tokenizer than .*letters"):
        tokens(folder, letters, told.later)
    letters.fingerprint = "letters"
    shutil.rmtree(folder / "cache")
    write(folder / "a.jsonl", "abcdef")
    with pytest.raises(UserError, match=r"cache/\w+' holds Content\(documents=1, .*give all hosts the same data.paths"):
        tokens(folder, letters, told.later)
