"""Of a folder that somebody else made, only regular files that lie in it are read."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from torchlinearmoe.checkpoint.plain import plain_file, read_plain
from torchlinearmoe.errors import UserError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "secret").write_text("private")
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / "file").write_text("private")
    folder = tmp_path / "folder"
    folder.mkdir()
    return folder


def link(target: str) -> Callable[[Path], None]:
    return lambda path: path.symlink_to(target)


def folder_link(path: Path) -> None:
    path.parent.rmdir()
    path.parent.symlink_to("../private")


def endless(path: Path) -> None:
    path.touch()
    os.truncate(path, 2**40)


STRANGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "link out of the folder": (link("../../secret"), "is a link"),
    "absolute link": (link("/etc/hostname"), "is a link"),
    "link to a device": (link("/dev/zero"), "is a link"),
    "link to nothing": (link("nowhere"), "is a link"),
    "link to itself": (link("file"), "is a link"),
    "link into a folder of blobs that is no cache": (link("../../blobs/file"), "is a link"),
    "behind a linked folder": (folder_link, "behind a link"),
    "pipe": (os.mkfifo, "is no regular file"),
    "folder": (Path.mkdir, "is no regular file"),
    "endless": (endless, "has 1099511627776 bytes, at most"),
}


@pytest.mark.parametrize("kind", STRANGE)
def test_what_is_no_plain_file_is_named_and_not_waited_for(kind: str, folder: Path) -> None:
    make, reason = STRANGE[kind]
    (folder / "sub").mkdir()
    (folder.parent / "blobs").mkdir()
    (folder.parent / "blobs" / "file").write_text("private")
    make(folder / "sub" / "file")
    with pytest.raises(UserError, match=f"^{folder / 'sub' / 'file'}: .*{reason}[^\n]*$"):
        read_plain(folder, "sub/file")


def test_a_name_does_not_leave_the_folder(folder: Path) -> None:
    for name in ("../secret", str(folder.parent / "secret"), "../private/file"):
        with pytest.raises(UserError, match="lies outside"):
            read_plain(folder, name)


def test_a_plain_file_is_read_by_any_path_to_its_folder(folder: Path) -> None:
    (folder / "sub").mkdir()
    (folder / "sub" / "file").write_bytes(b"content")
    (folder.parent / "latest").symlink_to("folder")
    for root in (folder, folder.parent / "latest"):
        assert read_plain(root, "sub/file") == b"content"
        assert plain_file(root, "sub/file") == root / "sub/file"
    with pytest.raises(FileNotFoundError):
        read_plain(folder, "absent")


def cached(tmp_path: Path) -> Path:
    """A snapshot of the Hugging Face cache."""
    model = tmp_path / "models--a--b"
    snapshot = model / "snapshots" / "0123"
    (snapshot / "sub").mkdir(parents=True)
    (model / "blobs").mkdir()
    (model / "blobs" / "1f0c").write_bytes(b"content")
    (snapshot / "file").symlink_to("../../blobs/1f0c")
    (snapshot / "sub" / "file").symlink_to("../../../blobs/1f0c")
    return snapshot


def test_the_links_of_the_cache_are_followed_to_its_own_blobs(tmp_path: Path) -> None:
    snapshot = cached(tmp_path)
    assert read_plain(snapshot, "file") == read_plain(snapshot, "sub/file") == b"content"
    (snapshot / "other").symlink_to("../../blobs/../../secret")
    (tmp_path / "secret").write_text("private")
    with pytest.raises(UserError, match="is a link"):
        read_plain(snapshot, "other")


def test_blobs_that_lie_elsewhere_are_not_the_cache(tmp_path: Path) -> None:
    snapshot = cached(tmp_path)
    blobs = tmp_path / "models--a--b" / "blobs"
    blobs.rename(tmp_path / "private")
    blobs.symlink_to(tmp_path / "private")
    with pytest.raises(UserError, match="is a link"):
        read_plain(snapshot, "file")
