"""A damaged checkpoint is never used: skipped where another can be taken, refused in one line where it was named."""

from __future__ import annotations

import json
import logging
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from seals import forget_sums, reseal
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemWriter

from torchlinearmoe import build_model, load_model
from torchlinearmoe.checkpoint import CheckpointError, CheckpointManager, find_latest, load_model_weights
from torchlinearmoe.checkpoint.huggingface.exporting import export_checkpoint
from torchlinearmoe.checkpoint.initial import InitialWeights
from torchlinearmoe.checkpoint.model import model_files
from torchlinearmoe.checkpoint.storage import Writer
from torchlinearmoe.checkpoint.stream import SavedWeights
from torchlinearmoe.data.tokenizer import load_tokenizer
from torchlinearmoe.errors import UserError
from torchlinearmoe.recipe import resolve

SECTIONS = {"model": {"num_layers": 2, "layout": "L", "mixer": "gla"}, "training": {"steps": 1}}
RECIPE = resolve(SECTIONS)
FILES = ("__0_0.distcp", ".metadata", "state.json", "recipe.toml", "tokenizer/bpe-1024.tiktoken")


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with step-1 and step-2."""
    folder = tmp_path_factory.mktemp("run")
    manager = CheckpointManager(folder, keep=2)
    files = model_files(RECIPE, load_tokenizer())
    for step in (1, 2):
        model = build_model(RECIPE.model, seed=step)
        optimizer = torch.optim.AdamW(model.parameters())
        manager.save(step, model, optimizer, {"tokens": step}, files, blocking=True)
    return folder


@pytest.fixture
def folder(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "run"))


def flip(path: Path, bit: int) -> None:
    with path.open("r+b") as stream:
        stream.seek(bit // 8)
        (byte,) = stream.read(1)
        stream.seek(bit // 8)
        stream.write(bytes([byte ^ 1 << bit % 8]))


def weights_of(checkpoint: Path) -> dict[str, Tensor] | None:
    """What a load finds; None where it is refused in one line."""
    try:
        return load_model(checkpoint).state_dict()
    except UserError as error:
        assert "\n" not in str(error)
        return None


@pytest.mark.parametrize("name", FILES)
def test_no_flipped_bit_loads_or_resumes(name: str, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    file, chooser = folder / "step-2" / name, random.Random(name)
    content = file.read_bytes()
    for _ in range(40 if name == FILES[0] else 15):
        bit = chooser.randrange(8 * len(content))
        flip(file, bit)
        if not (name == "state.json" and same_json(file, content)):
            assert weights_of(folder / "step-2") is None, bit
            caplog.clear()
            assert CheckpointManager(folder, keep=2).resume_from("latest") == folder / "step-1", bit
            (line,) = [r.getMessage() for r in caplog.records if r.name.startswith("torchlinearmoe")]
            assert f"checkpoint {folder}/step-2: " in line and "step-1 is taken instead" in line and "\n" not in line
            with pytest.raises(CheckpointError, match="^checkpoint.resume = '.*step-2' is .*") as caught:
                CheckpointManager(folder, keep=2).resume_from(str(folder / "step-2"))
            assert "\n" not in str(caught.value)
        file.write_bytes(content)
    assert find_latest(folder) == folder / "step-2"


def same_json(file: Path, content: bytes) -> bool:
    """Whether a bit of white space was flipped."""
    try:
        return json.loads(file.read_bytes()) == json.loads(content)
    except ValueError:
        return False


def test_flipped_tensors_of_earlier_versions_are_found_too(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Writer, "write_data", FileSystemWriter.write_data)  # with torch's own sums
    expected = build_model(RECIPE.model, seed=3)
    files = model_files(RECIPE, load_tokenizer())
    CheckpointManager(folder, keep=3).save(3, expected, None, {"tokens": 3}, files, blocking=True)
    forget_sums(folder / "step-3")
    assert find_latest(folder) == folder / "step-3"
    file, chooser = folder / "step-3" / FILES[0], random.Random(3)
    content, found = file.read_bytes(), 0
    for _ in range(40):
        flip(file, chooser.randrange(8 * len(content)))
        loaded = weights_of(folder / "step-3")
        if loaded is None:
            found += 1
            assert find_latest(folder) == folder / "step-2"
        else:  # between the tensors
            assert all(torch.equal(value, expected.state_dict()[key]) for key, value in loaded.items())
        file.write_bytes(content)
    assert found > 20


@pytest.mark.parametrize("read", [load_model, SavedWeights, lambda path: export_checkpoint(path, path.parent / "out")])
def test_a_recipe_of_more_layers_than_the_weights_is_refused(read: Callable[[Path], object], folder: Path) -> None:
    for checkpoint, layers, told in (
        (folder / "step-1", 3, "it has no 'model.layers.2."),
        (folder / "step-2", 1, "it holds"),
    ):
        recipe = checkpoint / "recipe.toml"
        recipe.write_text(recipe.read_text().replace("num_layers = 2", f"num_layers = {layers}"))
        reseal(checkpoint)
        with pytest.raises(CheckpointError, match=told):
            read(checkpoint)
    assert not (folder / "out").exists()


def test_export_and_init_from_refuse_damaged_tensors(folder: Path) -> None:
    flip(folder / "step-2" / FILES[0], 8 * 5000)
    with pytest.raises(CheckpointError, match="step-2: __0_0.distcp is damaged: its checksum"):
        export_checkpoint(folder / "step-2", folder / "out")
    assert not (folder / "out").exists()
    recipe = resolve({**SECTIONS, "checkpoint": {"init_from": str(folder / "step-2")}})
    with pytest.raises(UserError, match="step-2: __0_0.distcp is damaged: its checksum"):
        InitialWeights(recipe).load(build_model(recipe.model, seed=0))


def test_with_no_other_left_a_run_starts_afresh_and_says_so(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    for step in (1, 2):
        flip(folder / f"step-{step}" / FILES[0], 8 * 5000)
    assert CheckpointManager(folder, keep=2).resume_from("latest") is None
    lines = [r.getMessage() for r in caplog.records if r.name.startswith("torchlinearmoe")]
    assert len(lines) == 2 and all("there is no other to take instead" in line for line in lines)


def test_damaged_ones_do_not_count_as_kept(folder: Path) -> None:
    flip(folder / "step-2" / FILES[0], 8 * 5000)
    manager = CheckpointManager(folder, keep=2)
    assert manager.latest() == folder / "step-1"
    model = build_model(RECIPE.model, seed=5)
    manager.save(3, model, None, {}, blocking=True)
    assert sorted(path.name for path in folder.iterdir()) == ["step-1", "step-2", "step-3"]
    manager.save(2, model, None, {}, blocking=True)  # comes by again and is sound now
    assert sorted(path.name for path in folder.iterdir()) == ["step-2", "step-3"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_told_and_used(
    value: float, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = build_model(RECIPE.model, seed=1)
    with torch.no_grad():
        model.get_parameter("norm.weight")[3] = value
        model.get_parameter("embed.weight")[5, 1] = -value
    manager = CheckpointManager(tmp_path / "run", keep=1)
    manager.save(1, model, None, {"tokens": 0}, model_files(RECIPE, load_tokenizer()), blocking=True)
    path = tmp_path / "run/step-1"
    recipe = resolve({**SECTIONS, "checkpoint": {"init_from": str(path)}})
    for use, first in (
        (lambda: load_model(path), "model.embed.weight"),
        (lambda: manager.load(path, build_model(RECIPE.model, seed=2)), "model.embed.weight"),
        (lambda: export_checkpoint(path, tmp_path / "out"), "model.embed.weight"),
        (lambda: InitialWeights(recipe).load(build_model(recipe.model, seed=2)), "embed.weight"),
    ):
        caplog.clear()
        use()
        (line,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
        assert "2 of " in line and f"hold NaN or infinite values, the first is '{first}'" in line
    assert not torch.isfinite(load_model(path).get_parameter("norm.weight")).all()


def test_strays_under_the_names_of_checkpoints_do_no_harm(tmp_path: Path) -> None:
    for name in ("step-4", "step-4.tmp", "step-3.trash", "step-9.old", "step-7.tmp"):
        (tmp_path / name).write_text("a note")
    (tmp_path / "step-5").symlink_to("/nowhere")
    manager = CheckpointManager(tmp_path, keep=1)
    assert manager.resume_from("latest") is None
    for step in (4, 5, 9):
        manager.save(step, build_model(RECIPE.model, seed=1), None, {}, blocking=True)
        assert find_latest(tmp_path) == tmp_path / f"step-{step}"
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["step-4.stray", "step-5.stray", "step-9", "step-9.stray"]
    assert (tmp_path / "step-4.stray").read_text() == "a note" and os.readlink(tmp_path / "step-5.stray") == "/nowhere"


def test_a_replacement_cut_short_survives_a_stray(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path, keep=3)
    model = build_model(RECIPE.model, seed=1)
    manager.save(4, model, None, {}, blocking=True)
    (tmp_path / "step-4").rename(tmp_path / "step-4.old")
    (tmp_path / "step-4").write_text("a note")
    assert find_latest(tmp_path) == tmp_path / "step-4.old"
    manager.save(5, model, None, {}, blocking=True)
    load_model_weights(tmp_path / "step-4", model)
