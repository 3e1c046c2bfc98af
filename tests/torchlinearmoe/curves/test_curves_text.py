"""The text is what the package says in English, whole services held apart; what is finished is kept."""

from __future__ import annotations

import gzip
import json
import zipfile
from pathlib import Path

import pytest

from torchlinearmoe.curves import text as texts
from torchlinearmoe.curves.text import describe, get_text, plain, read_package
from torchlinearmoe.data.prepared import is_complete
from torchlinearmoe.errors import UserError

SERVICE = {
    "metadata": {"serviceFullName": "Amazon Example"},
    "documentation": "<p>Keeps <b>things</b>.</p><note> <p>Not &lt;all&gt;.</p></note>",
    "operations": {"PutThing": {"documentation": "<p>Puts it.</p>"}, "Silent": {}},
    "shapes": {
        "PutThingRequest": {
            "type": "structure",
            "members": {"Name": {"documentation": "<p>Its   name.</p>"}, "Other": {"shape": "String"}},
        },
        "String": {"type": "string"},
    },
}
DESCRIBED = """Amazon Example

Keeps things.
Not <all>.

PutThing
Puts it.

PutThingRequest
- Name: Its name.
"""


def wheel(folder: Path, services: dict[str, dict]) -> Path:
    path = folder / "botocore-1-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, table in services.items():
            archive.writestr(f"botocore/data/{name}/service-2.json.gz", gzip.compress(json.dumps(table).encode()))
        archive.writestr("botocore/data/endpoints.json", "{}")
    return path


def test_a_service_is_its_descriptions_with_their_names() -> None:
    assert describe(SERVICE) == DESCRIBED
    assert plain("<p>An <i>id</i>.</p> <ul> <li> <p>One &amp; two</p> </li></ul>") == "An id.\nOne & two"


def test_a_document_is_the_newest_version_of_a_service(tmp_path: Path) -> None:
    newer = {**SERVICE, "documentation": "<p>Newer.</p>"}
    file = wheel(tmp_path, {"b/2020-01-01": newer, "b/2013-01-01": SERVICE, "a/2015-01-01": SERVICE})
    found = list(read_package(file))
    assert [document["id"] for document in found] == ["a", "b"]
    assert found[0]["text"] == DESCRIBED and "Newer." in found[1]["text"]


def test_finished_parts_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts, "VOCABULARY", 300)
    said: list[str] = []
    tokens = get_text(tmp_path / "text", wheel(tmp_path, {"a/1": SERVICE, "b/1": SERVICE}), said.append)
    assert is_complete(tokens) and len(said) == 3
    monkeypatch.setattr(texts, "_download", lambda *rest: pytest.fail("the text is there"))
    assert get_text(tmp_path / "text", None, said.append) == tokens and len(said) == 3
    (tmp_path / "text" / "tokens" / "prepared.json").unlink()
    get_text(tmp_path / "text", None, said.append)
    assert len(said) == 4


def test_another_file_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "a.whl").write_text("no archive")
    with pytest.raises(UserError, match="a.whl: is no wheel of botocore"):
        list(read_package(tmp_path / "a.whl"))
    with pytest.raises(UserError, match="holds no services"):
        list(read_package(wheel(tmp_path, {})))
