"""Checkpoints of earlier versions load and go on as they did."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from saved_run import HERE, STEP, expected, figures, last_logits, recipe_of, resumed, unpack

from torchlinearmoe import load_model

ARCHIVES = {path.name.removesuffix(".tar.xz"): path for path in sorted((HERE / "checkpoints").glob("*.tar.xz"))}


@pytest.mark.parametrize("name", ARCHIVES)
def test_a_saved_model_loads_with_its_logits(name: str, tmp_path: Path) -> None:
    model = load_model(unpack(ARCHIVES[name], tmp_path) / STEP)
    logits = torch.tensor(expected(ARCHIVES[name])["logits"])
    torch.testing.assert_close(torch.tensor(last_logits(model)), logits, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ARCHIVES)
def test_a_saved_run_goes_on_in_one_process_with_its_losses(name: str, tmp_path: Path) -> None:
    folder = unpack(ARCHIVES[name], tmp_path)
    found, recorded = figures(resumed(folder, recipe_of(folder / STEP))), expected(ARCHIVES[name])
    for key in ("loss", "validation_loss"):
        assert found[key] == pytest.approx(recorded[key], rel=1e-5), key
    assert found["grad_norm"] == pytest.approx(recorded["grad_norm"], rel=1e-4)


def test_they_were_saved_by_every_kind_of_layout() -> None:
    layouts = {expected(path)["layout"] for path in ARCHIVES.values()}
    assert {"one process", "fsdp 2", "tensor 2", "context 2", "pipeline 2", "expert 2"} <= layouts


@pytest.mark.parametrize("name", ["llama3"])
def test_an_imported_checkpoint_loads_with_its_logits(name: str, tmp_path: Path) -> None:
    archive = HERE / "imported" / f"{name}.tar.xz"
    model = load_model(unpack(archive, tmp_path) / "imported")
    logits = torch.tensor(expected(archive)["logits"])
    torch.testing.assert_close(torch.tensor(last_logits(model)), logits, rtol=1e-5, atol=1e-6)
