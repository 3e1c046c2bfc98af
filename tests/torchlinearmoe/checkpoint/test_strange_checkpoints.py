"""A checkpoint that somebody else made is refused in one line where it is not what a save writes."""

from __future__ import annotations

import io
import os
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from seals import reseal
from torch.distributed.checkpoint import Metadata
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from torchlinearmoe import build_model, load_model
from torchlinearmoe.checkpoint import CheckpointManager
from torchlinearmoe.checkpoint.huggingface.exporting import export_checkpoint
from torchlinearmoe.checkpoint.model import checkpoint_template, checkpoint_tokenizer, model_files
from torchlinearmoe.checkpoint.storage import CheckpointError, read_metadata
from torchlinearmoe.checkpoint.stream import SavedWeights
from torchlinearmoe.data.tokenizer import load_tokenizer
from torchlinearmoe.errors import UserError
from torchlinearmoe.recipe import resolve

RECIPE = resolve({"model": {"num_layers": 1, "layout": "L"}, "training": {"steps": 1}})
DATA = "__0_0.distcp"


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    manager = CheckpointManager(tmp_path_factory.mktemp("run"), keep=1)
    files = model_files(RECIPE, load_tokenizer())
    manager.save(1, build_model(RECIPE.model, seed=3), None, {"tokens": 0}, files, blocking=True)
    path = manager.latest()
    assert path is not None
    return path


@pytest.fixture
def checkpoint(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "step-1"))


def test_a_key_that_the_recipe_may_not_hold_is_told_with_its_file(checkpoint: Path) -> None:
    recipe = checkpoint / "recipe.toml"
    recipe.write_text(recipe.read_text().replace("[training]", "[training]\nnope = 1"))
    with pytest.raises(UserError, match=rf"^{re.escape(str(recipe))}: training.nope: unknown key"):
        load_model(checkpoint)
    recipe.write_text("[training")
    with pytest.raises(UserError, match=rf"^{re.escape(str(recipe))}: not valid TOML"):
        load_model(checkpoint)


def refused(checkpoint: Path) -> list[str]:
    """What each way of reading the weights says; all of them must refuse in one line."""
    found = []
    for read in (load_model, SavedWeights, lambda path: export_checkpoint(path, path.parent / "exported")):
        with pytest.raises(UserError) as caught:
            read(checkpoint)
        assert "\n" not in str(caught.value)
        found.append(str(caught.value))
    assert not (checkpoint.parent / "exported").exists()
    return found


def change_index(checkpoint: Path, change: Callable[[Any], Any]) -> None:
    metadata = read_metadata(checkpoint)
    change(metadata)
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))


def each_file(**values: Any) -> Callable[[Any], None]:
    """Change the record of where each tensor lies."""

    def change(metadata: Any) -> None:
        for info in metadata.storage_data.values():
            vars(info).update(values)

    return change


def each_tensor(change: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda metadata: [change(entry) for entry in metadata.state_dict_metadata.values()]


@pytest.mark.parametrize("name", ["../secret.distcp", "/etc/hostname", "sub/x.distcp", "..", "", 3, "a\0b"])
def test_an_index_names_files_of_the_checkpoint_only(name: object, checkpoint: Path) -> None:
    shutil.copy(checkpoint / DATA, checkpoint.parent / "secret.distcp")
    (checkpoint / "sub").mkdir()
    shutil.copy(checkpoint / DATA, checkpoint / "sub" / "x.distcp")
    change_index(checkpoint, each_file(relative_path=name))
    assert all("relative_path" in message and ".metadata" in message for message in refused(checkpoint))


def enlarge(entry: Any) -> None:
    entry.size = torch.Size([2**40, *entry.size[1:]])


def twice(entry: Any) -> None:
    entry.chunks = [entry.chunks[0]] * 2
    entry.size = torch.Size([2 * entry.size[0], *entry.size[1:]]) if entry.size else entry.size


def shift(entry: Any) -> None:
    for chunk in entry.chunks:
        chunk.sizes = torch.Size([chunk.sizes[0] + 1, *chunk.sizes[1:]]) if chunk.sizes else chunk.sizes


def empty(entry: Any) -> None:
    entry.chunks = []


def enlarge_chunks(entry: Any) -> None:
    for chunk in entry.chunks:
        chunk.sizes = torch.Size([2**40, *chunk.sizes[1:]])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (each_file(offset=-1), "none below 0"),
        (each_file(length="many"), "whole numbers"),
        (each_file(transform_descriptors=["zstd"]), "transformed"),
        (each_tensor(enlarge), "leave a hole"),
        (each_tensor(enlarge_chunks), "bytes, but"),
        (each_tensor(empty), "leave a hole"),
        (each_tensor(twice), "overlap"),
        (each_tensor(shift), "lies outside of it"),
        (each_tensor(lambda entry: vars(entry).pop("size")), "is not an index"),
        (lambda metadata: metadata.state_dict_metadata.update(x=3), "'x' is no tensor"),
        (lambda metadata: metadata.storage_data.clear(), "but 0 are written"),
    ],
)
def test_an_index_promises_no_more_than_is_written(change: Callable[[Any], Any], reason: str, checkpoint: Path) -> None:
    change_index(checkpoint, change)
    assert all(reason in message for message in refused(checkpoint))


def test_a_model_larger_than_its_checkpoint_is_not_built(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = checkpoint / "recipe.toml"
    recipe.write_text(recipe.read_text().replace("vocab_size = 1024", f"vocab_size = {2**24}"))
    monkeypatch.setattr(torch.nn.Module, "to_empty", lambda *_, **__: pytest.fail("memory was taken"))
    with pytest.raises(CheckpointError, match=r"'model.embed.* has shape \[1024, 64\]"):
        load_model(checkpoint)


def set_attribute(target: bytes) -> bytes:
    """An index that sets the attribute `planted` of what `target` pushes while it is read."""
    slots = b"N}X\x07\x00\x00\x00plantedX\x03\x00\x00\x00yess\x86b"
    return b"\x80\x02" + target + slots + b"0" + pickle.dumps(Metadata({}), protocol=2)[2:]


PLANTED = {
    "a class": b"ctorch.distributed.checkpoint.metadata\nTensorStorageMetadata\n",
    "a function": b"ctorch.serialization\n_get_layout\n",
    "an enumeration": b"ctorch.distributed.checkpoint.metadata\n_MEM_FORMAT_ENCODING\n",
    "its member": b"ctorch.distributed.checkpoint.metadata\n_MEM_FORMAT_ENCODING\nK\x00\x85R",
}


@pytest.mark.parametrize("kind", PLANTED)
def test_reading_an_index_changes_no_class(kind: str, checkpoint: Path) -> None:
    content = set_attribute(PLANTED[kind])
    planted = pickle.Unpickler(io.BytesIO(content)).load()  # the attack works where nothing is refused
    assert isinstance(planted, Metadata)
    target: Any = pickle.loads(b"\x80\x02" + PLANTED[kind] + b".")
    assert target.planted == "yes"
    del target.planted
    (checkpoint / ".metadata").write_bytes(content)
    assert all("have no place in a checkpoint" in message for message in refused(checkpoint))
    assert not hasattr(target, "planted") and not hasattr(TensorStorageMetadata, "planted")


@pytest.mark.parametrize("name", [".metadata", "state.json", "recipe.toml", DATA])
@pytest.mark.parametrize("kind", ["pipe", "device", "link"])
def test_no_pipe_device_or_link_is_read(name: str, kind: str, checkpoint: Path) -> None:
    path = checkpoint / name
    path.rename(checkpoint.parent / "moved")
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero" if kind == "device" else "../moved")
    assert all(name in message for message in refused(checkpoint))


@pytest.mark.parametrize("name", [".metadata", "state.json", "recipe.toml"])
def test_an_endless_file_is_not_read(name: str, checkpoint: Path) -> None:
    os.truncate(checkpoint / name, 2**42)
    assert all(name in message and "bytes" in message for message in refused(checkpoint))


def test_a_tokenizer_or_template_that_is_none_is_named(checkpoint: Path) -> None:
    (checkpoint / "chat_template.toml").symlink_to("../secret")
    with pytest.raises(UserError, match="chat_template.toml: is a link"):
        checkpoint_template(checkpoint)
    (file,) = (checkpoint / "tokenizer").glob("*.tiktoken")
    neighbour = file.with_name(file.name + ".json")
    neighbour.unlink(missing_ok=True)
    os.mkfifo(neighbour)
    with pytest.raises(UserError, match=f"{neighbour.name}: is no regular file"):
        checkpoint_tokenizer(checkpoint)


def test_a_tensor_of_another_shape_than_the_index_says_is_named(checkpoint: Path) -> None:
    def swap(metadata: Any) -> None:
        (large,) = (info for index, info in metadata.storage_data.items() if index.fqn == "model.embed.weight")
        for index in metadata.storage_data:
            if index.fqn == "model.norm.weight":
                metadata.storage_data[index] = large

    change_index(checkpoint, swap)
    reseal(checkpoint)
    with pytest.raises(CheckpointError, match="cannot read 'norm.weight'"):
        SavedWeights(checkpoint).read("norm.weight", (0,), (64,))
