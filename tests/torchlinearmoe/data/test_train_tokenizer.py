"""The shipped byte-pair encoding can be made again, and others like it."""

import pytest

pytest.importorskip("tokenizers")

from torchlinearmoe.data.tokenizer import DEFAULT_TOKENIZER, load_tokenizer  # noqa: E402
from torchlinearmoe.data.train_tokenizer import main, train  # noqa: E402


def test_the_shipped_file_is_what_the_command_writes(tmp_path, capsys):
    assert main(["--output", str(tmp_path / "again.tiktoken"), "--vocab-size", "1024"]) == 0
    assert (tmp_path / "again.tiktoken").read_bytes() == DEFAULT_TOKENIZER.read_bytes()
    assert "1023 tokens and <|endoftext|> = 1023" in capsys.readouterr().out


def test_own_text_makes_own_merges(tmp_path):
    (tmp_path / "text.txt").write_text("zyx zyx zyx zyx")
    main([str(tmp_path / "text.txt"), "--output", str(tmp_path / "t.tiktoken"), "--vocab-size", "260"])
    tokenizer = load_tokenizer(tmp_path / "t.tiktoken")
    assert tokenizer.vocab_size == 260
    assert len(tokenizer.encode("zyx zyx")) < 7
    assert tokenizer.decode(tokenizer.encode("été")) == "été"


def test_errors_are_one_line(tmp_path, capsys):
    assert main([str(tmp_path / "none.txt"), "--output", str(tmp_path / "t")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    with pytest.raises(ValueError, match="at least 257"):
        train(["text"], 256)


def test_a_file_that_cannot_be_written_is_one_line_and_leaves_nothing(tmp_path, capsys):
    (tmp_path / "text.txt").write_text("zyx")
    (tmp_path / "taken.tiktoken").mkdir()
    for output in (tmp_path / "none" / "t.tiktoken", tmp_path / "taken.tiktoken"):
        assert main([str(tmp_path / "text.txt"), "--output", str(output), "--vocab-size", "257"]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"error: --output {output}: cannot write there")
    assert {path.name for path in tmp_path.iterdir()} == {"text.txt", "taken.tiktoken"}
