"""Checkpoints that earlier versions saved on one layout go on, on another, as one process goes on."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from harness import RankPool

sys.path.append(str(Path(__file__).parents[1] / "saved"))

from saved_run import HERE, LAYOUTS, SAVED_AT, STEP, expected, figures, recipe_of, train, unpack


@pytest.mark.parametrize(
    "name, saved_by, layout",
    [("gsa", "one process", "fsdp 2"), ("kda", "fsdp 2", "one process"), ("deepseek_v2-mla", "expert 2", "tensor 2")],
)
def test_a_saved_run_goes_on_with_its_losses(
    ranks: RankPool, name: str, saved_by: str, layout: str, tmp_path: Path
) -> None:
    archive = HERE / "checkpoints" / f"{name}.tar.xz"
    recorded = expected(archive)
    assert recorded["layout"] == saved_by
    folder = unpack(archive, tmp_path)
    size, parallel = LAYOUTS[layout]
    for lines in ranks(size, train, str(folder), {**recipe_of(folder / STEP), "parallel": parallel}, False):
        found = figures([line for line in lines if line["step"] > SAVED_AT])
        for key in ("loss", "validation_loss", "grad_norm"):
            assert found[key] == pytest.approx(recorded[key], rel=1e-5), key
