"""Text to ids and back.

Two kinds of file are read, tiktoken's (`base64 rank` lines) and Hugging Face's `tokenizer.json`, a file here each. The
rest of the project sees only `Tokenizer`.
"""

from __future__ import annotations

from pathlib import Path

from torchlinearmoe.data.tokenizer.base import END_OF_TEXT, Tokenizer
from torchlinearmoe.data.tokenizer.huggingface import HuggingFaceTokenizer
from torchlinearmoe.data.tokenizer.tiktoken import DEFAULT_PATTERN, TiktokenTokenizer
from torchlinearmoe.disk import expanded
from torchlinearmoe.errors import UserError

__all__ = [
    "DEFAULT_PATTERN",
    "DEFAULT_TOKENIZER",
    "END_OF_TEXT",
    "TiktokenTokenizer",
    "Tokenizer",
    "check_vocabulary",
    "load_tokenizer",
]

DEFAULT_TOKENIZER = Path(__file__).parents[1] / "corpus" / "bpe-1024.tiktoken"


def load_tokenizer(path: str | Path | None = None) -> Tokenizer:
    """The tokenizer in `path`: a tiktoken file, a `tokenizer.json`, or a folder that holds a `tokenizer.json`.

    None or an empty string is the tokenizer that ships with the project. Raises UserError, one line that names the
    file: when it is missing, of neither kind, or names no end-of-text token.
    """
    path = expanded(path, "data.tokenizer") if path else DEFAULT_TOKENIZER
    if path.is_dir():
        folder, path = path, path / "tokenizer.json"
        if not path.is_file():
            raise UserError(f"data.tokenizer = '{folder}': the folder holds no tokenizer.json")
    if not path.is_file():
        raise UserError(
            f"data.tokenizer = '{path}': no such file; give a tiktoken file or a Hugging Face tokenizer.json"
        )
    if path.suffix == ".json":
        return HuggingFaceTokenizer(path)
    return TiktokenTokenizer(path)


def check_vocabulary(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Raises UserError when a model of `vocab_size` ids is too small for the tokenizer."""
    if tokenizer.vocab_size > vocab_size:
        raise UserError(
            f"model.vocab_size = {vocab_size} is smaller than the {tokenizer.vocab_size} ids of {tokenizer.path}; "
            f"set model.vocab_size to at least {tokenizer.vocab_size}"
        )
