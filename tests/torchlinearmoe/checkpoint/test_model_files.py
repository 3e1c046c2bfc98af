"""The small files of a checkpoint are those that were trained with."""

import base64
from pathlib import Path

from torchlinearmoe.checkpoint.model import model_files
from torchlinearmoe.data.tokenizer import load_tokenizer
from torchlinearmoe.recipe import resolve


def test_a_checkpoint_ships_the_tokenizer_that_was_read_not_the_one_written_since(tmp_path: Path) -> None:
    path = tmp_path / "bytes.tiktoken"
    path.write_bytes(b"".join(base64.b64encode(bytes([byte])) + b" %d\n" % byte for byte in range(256)))
    read = path.read_bytes()
    tokenizer = load_tokenizer(path)
    path.write_bytes(read + base64.b64encode(b"ab") + b" 256\n")
    path.with_name("bytes.tiktoken.json").write_text("{}")
    files = model_files(resolve({"training": {"steps": 1}}), tokenizer)
    assert {name: content for name, content in files.items() if "/" in name} == {"tokenizer/bytes.tiktoken": read}
