"""A tokenizer.json made from tiktoken's ranks gives the same ids, in transformers too."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import tokenizers
import transformers

from torchlinearmoe.checkpoint.tokenizer_files import tokenizer_names
from torchlinearmoe.checkpoint.tokenizer_json import exported_files, merges, tokenizer_json
from torchlinearmoe.data.sources import find_sources, read_documents
from torchlinearmoe.data.tokenizer import DEFAULT_TOKENIZER, TiktokenTokenizer, load_tokenizer

# The way of cutting of a well-known vocabulary, with possessive quantifiers.
POSSESSIVE = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|"
    r"\s*[\r\n]|\s+(?!\S)|\s"
)


def texts() -> list[str]:
    chance = random.Random(4)
    letters = "abcXYZ  \n\r\t0123456789.,;'!-_éßñ中文字🙂́\u00a0\u2028"
    strange = ["".join(chance.choices(letters, k=chance.randint(1, 60))) for _ in range(300)]
    documents = read_documents(find_sources().files)
    return [*strange, "<|endoftextx|>", "it's WE'RE 12345 67", *(next(documents)[:3000] for _ in range(3))]


def marked(folder: Path, **options: object) -> TiktokenTokenizer:
    file = folder / "marked.tiktoken"
    file.write_bytes(DEFAULT_TOKENIZER.read_bytes())
    special = {"<|endoftext|>": 1030, "<|begin|>": 1025}  # ids with gaps, not in their order
    table = {"special_tokens": special, "begin_of_text": "<|begin|>", **options}
    file.with_name(f"{file.name}.json").write_text(json.dumps(table))
    found = load_tokenizer(file)
    assert isinstance(found, TiktokenTokenizer)
    return found


@pytest.mark.parametrize("options", [{}, {"pattern": POSSESSIVE}], ids=["default pattern", "possessive pattern"])
def test_it_gives_the_same_ids_and_texts(tmp_path: Path, options: dict[str, str]) -> None:
    ours = marked(tmp_path, **options)
    theirs = tokenizers.Tokenizer.from_str(json.dumps(tokenizer_json(ours)))
    for text in texts():
        ids = theirs.encode(text, add_special_tokens=False).ids
        assert ids == ours.encode(text), repr(text)
        assert theirs.decode(ids) == text
    assert theirs.encode("a").ids == [1025, *ours.encode("a")]
    assert theirs.token_to_id("<|endoftext|>") == 1030 and theirs.id_to_token(1025) == "<|begin|>"


def test_merges_are_all_pairs_by_the_rank_of_what_they_make() -> None:
    ranks = {b"a": 0, b"b": 1, b"c": 2, b"ab": 3, b"bc": 4, b"abc": 5, b"xy": 6}
    assert merges(ranks) == [(b"a", b"b"), (b"b", b"c"), (b"a", b"bc"), (b"ab", b"c")]


def test_transformers_reads_what_is_exported(tmp_path: Path) -> None:
    for name, tokenizer in {"shipped": load_tokenizer(), "marked": marked(tmp_path)}.items():
        folder = tmp_path / name
        folder.mkdir()
        for file, content in {**tokenizer.files, **exported_files(tokenizer, 77, None)}.items():
            (folder / file).write_bytes(content)
        theirs = transformers.AutoTokenizer.from_pretrained(folder)
        text = "In the beginning was the Word,\n 1234 times"
        begins = [] if tokenizer.begin_of_text is None else [tokenizer.begin_of_text]
        assert theirs(text)["input_ids"] == [*begins, *tokenizer.encode(text)]
        assert (theirs.bos_token_id, theirs.eos_token_id) == (tokenizer.start, tokenizer.end_of_text)
        assert theirs.pad_token_id == tokenizer.end_of_text and theirs.model_max_length == 77
        # What was made is not taken for the tokenizer itself.
        assert sorted(tokenizer_names(folder)) == sorted(tokenizer.files)


def test_a_config_that_names_its_class_stays_as_it_is(tmp_path: Path) -> None:
    table = tokenizer_json(marked(tmp_path))
    (tmp_path / "tokenizer.json").write_text(json.dumps(table))
    ours = load_tokenizer(tmp_path / "tokenizer.json")
    assert exported_files(ours, 9, b'{"tokenizer_class": "Qwen2Tokenizer"}') == {}
    found = json.loads(exported_files(ours, 9, b'{"eos_token": "<|endoftext|>", "x": 1}')["tokenizer_config.json"])
    assert found["x"] == 1 and found["tokenizer_class"] == "PreTrainedTokenizerFast" and found["model_max_length"] == 9
