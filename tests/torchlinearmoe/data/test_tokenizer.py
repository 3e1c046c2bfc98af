"""tiktoken files: ids, bytes, neighbours, and what a user is told."""

import base64
import codecs
import json
import random
import tempfile

import pytest
import tiktoken

from torchlinearmoe.data.tokenizer import DEFAULT_TOKENIZER, END_OF_TEXT, check_vocabulary, load_tokenizer
from torchlinearmoe.errors import UserError

TEXTS = [
    "In the beginning was the Word, and the Word was with God.",
    "don't  stop\n\n\tat 1234 spaces   ",
    "naïve café, Ελληνικά, 日本語, 🜂🏳️‍🌈, \u200d\x00\x7f",
    f"spelled out: {END_OF_TEXT}",
    "",
]


def write_ranks(path, ranks):
    path.write_text("".join(f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items()))
    return path


def byte_ranks(*merges):
    ranks = {bytes([byte]): byte for byte in range(256)}
    return ranks | {merge: 256 + i for i, merge in enumerate(merges)}


@pytest.mark.parametrize("text", TEXTS)
def test_text_comes_back(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.end_of_text not in ids
    assert all(0 <= token < tokenizer.vocab_size for token in ids)


@pytest.mark.parametrize("seed", [0, 1])
def test_random_text_comes_back_from_batches(tokenizer, seed):
    random.seed(seed)
    letters = [*map(chr, range(0x250)), *map(chr, range(0x4E00, 0x4E80))]
    texts = ["".join(random.choices(letters, k=200)) for _ in range(20)]
    encoded = tokenizer.encode_batch(texts)
    assert encoded == [tokenizer.encode(text) for text in texts]
    assert [tokenizer.decode(ids) for ids in encoded] == texts
    texts.append("<|endoftext|> in a text is text")
    tokenizer = load_tokenizer()
    for tokenizer.threads in (1, 3):
        assert [list(map(int, ids)) for ids in tokenizer.encode_arrays(texts)] == tokenizer.encode_batch(texts)


def test_stream_of_single_ids_shows_whole_characters(tokenizer):
    text = "日本語 naïve 🜂"
    ids = tokenizer.encode(text)
    assert len(ids) > len(text), "characters must be cut for this test to mean something"
    decoder = codecs.getincrementaldecoder("utf-8")()
    pieces = [decoder.decode(tokenizer.decode_bytes([token])) for token in ids]
    assert "".join(pieces) == text and "\ufffd" not in "".join(pieces)


def test_the_shipped_tokenizer(tokenizer):
    assert tokenizer.path == DEFAULT_TOKENIZER
    assert (tokenizer.vocab_size, tokenizer.end_of_text) == (1024, 1023)
    assert tokenizer.decode([tokenizer.end_of_text]) == END_OF_TEXT


def test_ids_of_a_padded_vocabulary_have_no_bytes(tokenizer):
    ids = tokenizer.encode("word")
    assert tokenizer.decode_bytes([5000, *ids, 99999]) == b"word"


def test_end_of_text_takes_the_next_id(tmp_path):
    tokenizer = load_tokenizer(write_ranks(tmp_path / "t.tiktoken", byte_ranks(b"ab", b" ab")))
    assert (tokenizer.vocab_size, tokenizer.end_of_text) == (259, 258)
    assert tokenizer.encode("ab ab") == [256, 257]


def test_default_pattern_cuts_as_gpt2(tmp_path):
    tiktoken_public = pytest.importorskip("tiktoken_ext.openai_public")
    ranks = byte_ranks(b"'s", b" a", b"12", b"34", b"  ", b"\n\n", b"..", b"A\xcc", b" 9")
    ours = load_tokenizer(write_ranks(tmp_path / "t.tiktoken", ranks))
    theirs = tiktoken.Encoding("t", pat_str=tiktoken_public.r50k_pat_str, mergeable_ranks=ranks, special_tokens={})
    letters = "aA's 12934.\n\t\u0301é日\u00a0'll"
    random.seed(0)
    for _ in range(300):
        text = "".join(random.choices(letters, k=30))
        assert ours.encode(text) == theirs.encode(text), repr(text)


def test_neighbour_brings_pattern_and_special_tokens(tmp_path):
    path = write_ranks(tmp_path / "t.tiktoken", byte_ranks(b"a b"))
    plain = load_tokenizer(path)
    options = {"pattern": r"[^!]+|!", "special_tokens": {"<pad>": 300, "<end>": 301}, "end_of_text": "<end>"}
    path.with_name("t.tiktoken.json").write_text(json.dumps(options))
    tokenizer = load_tokenizer(path)
    assert plain.encode("a b") == [97, 32, 98] and tokenizer.encode("a b") == [256]
    assert (tokenizer.vocab_size, tokenizer.end_of_text) == (302, 301)
    assert tokenizer.fingerprint != plain.fingerprint


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ("{", "not JSON"),
        ('{"patern": "x"}', "no keys but pattern, special_tokens, end_of_text"),
        ('{"pattern": "("}', r"pattern = '\('"),
        ('{"end_of_text": "<end>"}', "end_of_text = '<end>'"),
        ('{"special_tokens": {"<|endoftext|>": 97}}', "share an id"),
        ('{"pattern": 3}', "pattern = 3 is not a string"),
        ('{"end_of_text": ["<end>"]}', "end_of_text = .* is not a string"),
        ('{"special_tokens": ["<|endoftext|>"]}', "must be an object of ids"),
        ('{"special_tokens": {"<|endoftext|>": "300"}}', "must be an object of ids"),
        ('{"special_tokens": {"<|endoftext|>": -1}}', "must be an object of ids"),
    ],
)
def test_broken_neighbour_is_one_line(tmp_path, options, match):
    path = write_ranks(tmp_path / "t.tiktoken", byte_ranks())
    path.with_name("t.tiktoken.json").write_text(options)
    with pytest.raises(ValueError, match=match) as error:
        load_tokenizer(path)
    assert "t.tiktoken" in str(error.value) and "\n" not in str(error.value)


def test_a_file_rewritten_in_its_place_is_read_anew(tmp_path, monkeypatch):
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    path = write_ranks(tmp_path / "t.tiktoken", byte_ranks(b"ab"))
    first = load_tokenizer(path)
    write_ranks(path, byte_ranks(b"bc"))
    second = load_tokenizer(path)
    assert first.encode("abc") == [256, 99] and second.encode("abc") == [97, 256]
    assert first.fingerprint != second.fingerprint
    assert list(temporary.iterdir()) == []


def test_the_same_relative_path_in_another_folder_is_another_tokenizer(tmp_path, monkeypatch):
    ids = []
    for name, merge in [("one", b"ab"), ("two", b"bc")]:
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        write_ranks(tmp_path / name / "t.tiktoken", byte_ranks(merge))
        ids.append(load_tokenizer("t.tiktoken").encode("abc"))
    assert ids == [[256, 99], [97, 256]]


def test_the_bytes_that_were_read_are_kept(tmp_path):
    path = write_ranks(tmp_path / "t.tiktoken", byte_ranks(b"ab"))
    neighbour = path.with_name("t.tiktoken.json")
    neighbour.write_text("{}")
    before = path.read_bytes()
    tokenizer = load_tokenizer(path)
    path.unlink()
    neighbour.unlink()
    assert tokenizer.files == {"t.tiktoken": before, "t.tiktoken.json": b"{}"}


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ("hello\n", "line 1: not a tiktoken file"),
        ("", "not a tiktoken file"),
        ("YQ== 0\n\nYg== 1 2\n", "line 3: not a tiktoken file"),
        ("YQ== 0\nYg==\n", "line 2: .*b'Yg==' is not `base64 rank`"),
        ("YQ== 0\nYg== -1\n", "line 2: .*b'Yg== -1' is not `base64 rank`"),
        ("YQ== 0\nY!g== 1\n", "line 2: .*is not base64"),
        ("YQ== 0\nYg= 1\n", "line 2: .*is not base64"),
        ("YQ== 0\nYg== 4294967296\n", "line 2: .*rank 4294967296 is above"),
        ("YQ== 0\nYg== 1\nYQ== 2\n", "line 3: .*the token b'a' has rank 0 already"),
        ("YQ== 0\nYg== 0\n", "two tokens share an id"),
        ("YQ== 0\nYWI= 1\n", "tokens hold the byte 0x62, which has no rank of its own"),
    ],
)
def test_other_and_damaged_files_are_refused(tmp_path, content, match):
    path = tmp_path / "odd.tiktoken"
    path.write_text(content)
    with pytest.raises(UserError, match=match) as error:
        load_tokenizer(path)
    assert "odd.tiktoken" in str(error.value) and "\n" not in str(error.value)


def test_a_letter_without_ranks_is_named(tmp_path):
    path = tmp_path / "few.tiktoken"
    path.write_text("YQ== 0\nYg== 1\nYWI= 2\n=  3\n")
    tokenizer = load_tokenizer(path)
    assert tokenizer.encode("aba") == [2, 0]
    for ask in (tokenizer.encode, lambda text: tokenizer.encode_batch(["ab", text])):
        with pytest.raises(UserError, match="few.tiktoken: no rank for 'é'"):
            ask("abé")


def test_missing_files_are_named(tmp_path):
    with pytest.raises(ValueError, match="nothing.tiktoken.*no such file"):
        load_tokenizer(tmp_path / "nothing.tiktoken")
    with pytest.raises(ValueError, match="no tokenizer.json"):
        load_tokenizer(tmp_path)


def test_vocabulary_must_fit_the_model(tokenizer):
    check_vocabulary(tokenizer, 1024)
    with pytest.raises(ValueError, match="model.vocab_size = 1023 is smaller than the 1024 ids"):
        check_vocabulary(tokenizer, 1023)
