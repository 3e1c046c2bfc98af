"""The files of a tokenizer that travel with a model, by name: whatever else lies beside them stays where it is.

None of them holds code, and none names any: `auto_map`, by which transformers would fetch some, is left out.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torchlinearmoe.checkpoint.plain import SMALL, plain_file, read_plain
from torchlinearmoe.errors import UserError

TOKENIZER = "tokenizer.json"
CONFIG = "tokenizer_config.json"
TEMPLATE = "chat_template.jinja"
NEIGHBOURS = (CONFIG, "special_tokens_map.json", TEMPLATE)
"""What belongs to a `tokenizer.json`, where it is there."""
MADE_FROM = "made_from"
"""In `tokenizer_config.json`: the tiktoken file that it and the `tokenizer.json` beside it were made from."""
PATTERNS = (TOKENIZER, "*.tiktoken", "*.tiktoken.json", *NEIGHBOURS)


def tokenizer_names(root: Path, folder: str = "") -> list[str]:
    """The tokenizer's files in `root`, or in a folder of it, the tokenizer itself first; none where there is no folder.

    What was made from another that is there is left out. Names within `root`. Raises UserError for one which is not a
    plain file there.
    """
    found = [
        f"{folder}/{path.name}".lstrip("/") for pattern in PATTERNS for path in sorted((root / folder).glob(pattern))
    ]
    for name in found:
        plain_file(root, name, SMALL)
    config = f"{folder}/{CONFIG}".lstrip("/")
    if config in found and any(name.endswith(".tiktoken") for name in found):
        made_from = _table(read_plain(root, config), root / config).get(MADE_FROM)
        if f"{folder}/{made_from}".lstrip("/") in found:
            return [name for name in found if name.endswith((".tiktoken", ".tiktoken.json"))]
    return found


def read_tokenizer_file(root: Path, name: str) -> bytes:
    """The contents of a tokenizer's file, without what would make transformers run code. Raises UserError."""
    return without_code(read_plain(root, name), root / name)


def without_code(content: bytes, path: Path) -> bytes:
    """The contents of the file `path` of a tokenizer, without `auto_map`. Raises UserError."""
    if path.name != CONFIG:
        return content
    table = _table(content, path)
    if "auto_map" not in table:
        return content
    del table["auto_map"]
    return (json.dumps(table, indent=2, ensure_ascii=False) + "\n").encode()


def _table(content: bytes, path: Path) -> dict[str, Any]:
    try:
        table = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON: {error}") from None
    if not isinstance(table, dict):
        raise UserError(f"{path}: not a JSON object")
    return table
