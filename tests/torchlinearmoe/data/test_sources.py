"""Which files are read, in which order, into which documents."""

import json
import sys

import pytest

from torchlinearmoe.data.sources import DEFAULT_CORPUS, find_sources, read_documents
from torchlinearmoe.data.store import cached_store, write_store
from torchlinearmoe.errors import UserError


def documents(*paths):
    return list(read_documents(find_sources(paths).files))


def write_lines(path, *texts):
    path.write_text("".join(json.dumps({"text": text, "other": 1}) + "\n" for text in texts))
    return path


def test_the_shipped_corpus_is_a_chapter_a_document():
    texts = documents()
    assert len(texts) == 260
    assert 900_000 < sum(len(text.encode()) for text in texts) < 1_100_000
    assert texts[0].startswith("Matthew 1\n\nThe book of the generation of Jesus Christ")
    assert texts[-1].rstrip().endswith("Amen.")
    assert find_sources().files[0].parent == DEFAULT_CORPUS


def test_files_in_the_order_given_and_folders_by_name(tmp_path):
    write_lines(tmp_path / "b.jsonl", "b1", "b2")
    write_lines(tmp_path / "a.json", "a1")
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "z.txt").write_text("z1")
    (tmp_path / "README.md").write_text("not text to train on")
    (tmp_path / ".hidden.txt").write_text("nor this")
    assert documents(tmp_path) == ["a1", "b1", "b2", "z1"]
    assert documents(tmp_path / "c" / "z.txt", tmp_path / "a.json") == ["z1", "a1"]
    assert documents(tmp_path / "a.json", tmp_path) == ["a1", "b1", "b2", "z1"], "a file named twice is read once"


def test_text_files_are_cut_at_the_marker(tmp_path):
    (tmp_path / "t.txt").write_text("one\nline two\n<|endoftext|>\nthree<|endoftext|>four<|endoftext|>\n")
    assert documents(tmp_path / "t.txt") == ["one\nline two\n", "\nthree", "four"]


def test_blank_documents_and_lines_are_left_out(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": ""}\n\n{"text": " \\n"}\n{"text": "kept"}')
    assert documents(path) == ["kept"]


def test_half_a_character_is_replaced(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "x\\ud83dy \\ud83d\\ude00"}\n')
    assert documents(path) == ["x\ufffdy \U0001f600"]


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("a.jsonl", b'{"text": "ok"}\n{"text": \n', "a.jsonl, line 2: not JSON"),
        ("a.jsonl", b'{"text": "ok"}\n\n{"body": "x"}\n', "a.jsonl, line 3: not an object with a string under"),
        ("a.jsonl", b'["text"]\n', "a.jsonl, line 1: not an object"),
        ("a.json", b'{"text": 3}\n', "a.json, line 1: not an object"),
        ("a.txt", b"fine\n\xff\xfe\n", "a.txt, line 2: not UTF-8"),
    ],
)
def test_broken_lines_are_named(tmp_path, name, content, match):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=match) as error:
        documents(tmp_path / name)
    assert "\n" not in str(error.value)


def test_useless_paths_are_named(tmp_path):
    with pytest.raises(ValueError, match="data.paths: '.*nowhere' does not exist"):
        find_sources([tmp_path / "nowhere"])
    (tmp_path / "x.pdf").write_text("")
    with pytest.raises(ValueError, match=r"x.pdf' is of no known kind; legal: .txt, .jsonl"):
        find_sources([tmp_path / "x.pdf"])
    with pytest.raises(ValueError, match="holds no .txt, .jsonl, .json, .parquet file"):
        find_sources([tmp_path])


def write_run(folder):
    """What training leaves in a run's folder, as far as it looks like text."""
    (folder / "checkpoints" / "step-2" / "tokenizer").mkdir(parents=True)
    (folder / "checkpoints" / "step-4.tmp").mkdir()
    (folder / "recipe.toml").write_text("")
    write_lines(folder / "metrics.jsonl", "of a run")
    for file in ("step-2/__0_0.distcp", "step-2/state.json", "step-2/tokenizer/tokenizer.json", "step-4.tmp/notes.txt"):
        (folder / "checkpoints" / file).write_text("{}")
    return folder


def test_what_training_wrote_is_no_data_wherever_it_lies(tmp_path, letters):
    text = write_lines(tmp_path / "a.jsonl", "abc")
    before = find_sources([tmp_path])
    cached_store([text], read_documents, letters, tmp_path / "deep" / "cache")
    cached_store([text], read_documents, letters, write_run(tmp_path / "runs" / "one") / "cache")
    copied = write_run(tmp_path / "elsewhere") / "checkpoints" / "step-2"
    copied.rename(tmp_path / "copied")
    found = find_sources([tmp_path])
    assert (found.files, found.stores) == (before.files, before.stores) == ((text,), ())
    names = {path.relative_to(tmp_path).as_posix() for path in found.left_out}
    assert names == {"copied", "deep/cache", "elsewhere", "runs/one", "runs/one/cache"}


@pytest.mark.parametrize("inside", ["", "run"])
def test_text_beside_what_a_run_writes_is_read_at_every_start(tmp_path, letters, inside):
    run = tmp_path / inside
    (run / "texts").mkdir(parents=True)
    own = [write_lines(run / "b.jsonl", "abc"), write_lines(run / "texts" / "metrics.jsonl", "def")]
    assert list(find_sources([tmp_path], run).files) == own
    write_lines(run / "metrics.jsonl", "of a run that has no recipe yet")
    assert list(find_sources([tmp_path], run).files) == own
    (run / "metrics.jsonl").unlink()
    write_run(run)
    assert list(find_sources([tmp_path], run).files) == list(find_sources([tmp_path]).files) == own


def test_tokens_are_taken_where_they_are_named_and_under_names_of_their_own(tmp_path, letters):
    text = write_lines(tmp_path / "a.jsonl", "abc")
    cached = cached_store([text], read_documents, letters, tmp_path / "cache").folder
    own = write_store(tmp_path / "tokens", ["de"], letters).folder
    assert find_sources([tmp_path]).stores == (own,)
    assert find_sources([cached, tmp_path]).stores == (cached, own)
    with pytest.raises(UserError, match="holds no .txt.* file but what training wrote in '.*cache'"):
        find_sources([tmp_path / "cache"])
    write_run(tmp_path / "run")
    with pytest.raises(UserError, match="step-2' is a checkpoint; name the text"):
        find_sources([tmp_path / "run" / "checkpoints" / "step-2"])


def test_parquet_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(
        ValueError, match=r"a.parquet: reading parquet needs pyarrow: pip install torchlinearmoe\[data\]"
    ):
        documents(tmp_path)


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    texts = [f"document {i}" for i in range(10)]
    parquet.write_table(pyarrow.table({"text": texts, "n": range(10)}), tmp_path / "a.parquet", row_group_size=3)
    assert documents(tmp_path) == texts
    parquet.write_table(pyarrow.table({"body": texts}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="no column 'text'; it has body"):
        documents(tmp_path)
    parquet.write_table(pyarrow.table({"text": ["a", None]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="a.parquet, row 1: "):
        documents(tmp_path)
    (tmp_path / "a.parquet").write_bytes(b"no parquet at all")
    with pytest.raises(ValueError, match="a.parquet: not a parquet file"):
        documents(tmp_path)
