"""What `[data]` names, opened: mixtures, what is held out of them, and validation sets by name."""

import json

import pytest

from torchlinearmoe.data.fingerprint import fingerprint
from torchlinearmoe.data.open import named, open_data
from torchlinearmoe.data.store import write_store
from torchlinearmoe.errors import UserError
from torchlinearmoe.recipe.schema import DataRecipe, SourceRecipe


def write(path, letter, count=40, key="text"):
    lines = [json.dumps({key: letter * (3 + i % 5) + chr(97 + i // 26) + chr(97 + i % 26)}) for i in range(count)]
    path.write_text("\n".join(lines))
    return str(path)


def all_ids(stream):
    return stream.read(0, len(stream))


def test_sources_are_held_out_as_their_split_says(tmp_path, letters):
    a, b = write(tmp_path / "a.jsonl", "x"), write(tmp_path / "b.jsonl", "y")
    c = str(write_store(tmp_path / "c", ["zzz", "zaz"], letters).folder)
    sources = (
        SourceRecipe(path=a, weight=3),
        SourceRecipe(path=b, split="train"),
        SourceRecipe(path=c, split="validation"),
    )
    splits = open_data(DataRecipe(sources=sources, validation_fraction=0.3), letters, tmp_path / "cache")
    plain = open_data(DataRecipe(paths=(a,), validation_fraction=0.3), letters, tmp_path / "cache")
    assert all_ids(splits.validation).tolist() == all_ids(plain.validation).tolist()
    whole = open_data(DataRecipe(paths=(b,), validation_fraction=0), letters, tmp_path / "cache")
    assert all_ids(splits.train).tolist() == [*all_ids(plain.train).tolist(), *all_ids(whole.train).tolist()]
    assert list(splits.others) == ["c"] and all_ids(splits.others["c"]).tolist() == [26, 25, 25, 25, 26, 25, 0, 25, 26]
    assert fingerprint(splits.stores).documents == 82
    assert splits.train.note(8).startswith("data.sources: a 75.0% of")


def test_validation_sets_have_names_and_nothing_of_them_is_trained(tmp_path, letters):
    train, one = write(tmp_path / "a.jsonl", "x"), write(tmp_path / "v.jsonl", "v", 5)
    two = write(tmp_path / "w.test.jsonl", "w", 7)
    data = DataRecipe(paths=(train,), validation_fraction=0, validation_paths=(f"forum={one}", two))
    splits = open_data(data, letters, tmp_path / "cache")
    assert {name: stream.num_documents for name, stream in splits.others.items()} == {"forum": 5, "w": 7}
    ids = all_ids(splits.train)
    assert len(splits.validation) == 0 and set(ids[1:][ids[:-1] == 26]) == {23}


def test_the_text_is_where_text_key_says(tmp_path, letters):
    path = write(tmp_path / "a.jsonl", "x", key="body")
    data = DataRecipe(paths=(path,), validation_fraction=0, text_key="body")
    assert open_data(data, letters, tmp_path / "cache").train.num_documents == 40
    with pytest.raises(UserError, match='data.paths: .*a.jsonl, line 1: not an object with a string under "text"'):
        open_data(DataRecipe(paths=(path,)), letters, tmp_path / "cache")


def test_names_are_told_apart():
    assert named(["a=x/y", "x/b.jsonl.gz", "/c/d/"], "k") == {"a": "x/y", "b": "x/b.jsonl.gz", "d": "/c/d/"}
    assert list(named(["x/b", "y/b", "z=b*.txt"], "k", whole=True)) == ["b", "b-2", "zb"]
    with pytest.raises(UserError, match="data.validation_paths: two are called 'b'; name them apart: 'NAME=y/b'"):
        named(["x/b", "y/b"], "data.validation_paths")
