"""Training in float8: near training without, the same on every layout, compiled or run again, free to come and go."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
from emulated_float8 import run_emulated
from harness import RankPool
from tiny_run import Result, Settings, every_run, settings, write_corpus

from torchlinearmoe.recipe import resolve
from torchlinearmoe.resume import changes

pytestmark = pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="needs torchao")

MODEL: Settings = {
    "model": {
        "mixer": None,
        "layout": None,
        "mixers": ["gla", "hgrn2", "softmax_attention", "gated_delta_net"],
        "hidden_size": 64,
        "num_kv_heads": 2,
    },
    "moe": {"first_dense_layers": 1, "shared_hidden_size": 32},
    "training": {"float8": "rowwise", "sequence_length": 64, "tokens_per_step": 4 * 64, "steps": 2},
}
WITHOUT: Settings = {"training": {"float8": "none"}}


def train(ranks: RankPool, folder: Path, name: str, *changes: Settings, size: int = 1, moved: bool = True) -> Result:
    """A run of `size` ranks into a folder of that name, with the gradients of all of its stages."""
    tables = settings(write_corpus(folder), folder / name, MODEL, *changes)
    parts = ranks(size, run_emulated, tables, moved)
    return parts[0]._replace(gradients={name: value for part in parts for name, value in part.gradients.items()})


def furthest(found: Result, expected: Result) -> float:
    """How far the first step's gradients are apart, relative, at most."""
    assert found.gradients.keys() == expected.gradients.keys()
    pairs = ((found.gradients[name], gradient) for name, gradient in expected.gradients.items())
    return max(((other - gradient).norm() / gradient.norm()).item() for other, gradient in pairs)


LAYOUTS: dict[str, tuple[dict[str, Any], dict[str, Any], float]] = {
    "fsdp": ({"data_shard": 2}, {}, 1e-6),
    "fsdp, compiled, run again": (
        {"data_shard": 2},
        {"compile": True, "compile_backend": "aot_eager", "activation_checkpointing": "selective"},
        0.05,
    ),
    "whole layers run again": ({"data_shard": 2}, {"activation_checkpointing": "full"}, 1e-6),
    "tensor": ({"tensor": 2}, {}, 0.05),
    "tensor, compiled": ({"tensor": 2}, {"compile": True, "compile_backend": "aot_eager"}, 0.05),
    "context": ({"context": 2, "expert": 2}, {}, 0.05),
    "pipeline": ({"pipeline": 2}, {}, 1e-6),
    "zero bubble": ({"pipeline": 2, "pipeline_schedule": "zero_bubble", "reshard_after_forward": False}, {}, 1e-6),
}
"""Degrees, training, and how far gradients may be apart.

Where sums are made in another order, or compiled, some numbers fall to the other side between two of float8's, 6 %
apart, and later steps follow; the first loss is that of one process to float32's last digits everywhere.
"""


@pytest.mark.parametrize(
    "name", every_run(LAYOUTS, "fsdp", "tensor", slow=[name for name in LAYOUTS if name not in ("fsdp", "tensor")])
)
def test_layouts_compute_as_one_process(ranks: RankPool, tmp_path: Path, name: str):
    parallel, training, tolerance = LAYOUTS[name]
    expected = train(ranks, tmp_path, "one")
    found = train(ranks, tmp_path, "other", {"parallel": parallel, "training": training}, size=2)
    assert found.column("loss")[0] == pytest.approx(expected.column("loss")[0], rel=1e-6)
    assert found.column("loss")[1] == pytest.approx(expected.column("loss")[1], rel=1e-3)
    assert furthest(found, expected) < tolerance
    assert not found.graph_breaks and bool(found.graphs) == ("compile" in training)


def test_losses_in_float8_are_near_those_in_bfloat16_and_not_equal(ranks: RankPool, tmp_path: Path):
    longer: Settings = {"training": {"steps": 12, "dtype": "bfloat16"}}
    plain = train(ranks, tmp_path, "plain", longer, WITHOUT)
    found = train(ranks, tmp_path, "float8", longer)
    other = train(ranks, tmp_path, "other seed", longer, WITHOUT, {"training": {"seed": 1}})
    losses, expected, seeds = (run.column("loss") for run in (found, plain, other))
    apart = [abs(a - b) for a, b in zip(losses, expected)]
    assert 0 < max(apart) < max(abs(a - b) for a, b in zip(seeds, expected))
    assert losses == pytest.approx(expected, rel=5e-3) and losses[-1] < losses[0] - 0.3
    assert 0.01 < furthest(found, plain) < 0.6


@pytest.mark.parametrize("first", ["none", "rowwise"])
def test_checkpoints_go_on_with_and_without(ranks: RankPool, tmp_path: Path, first: str):
    second = {"none": "rowwise", "rowwise": "none"}[first]
    before = train(ranks, tmp_path, "run", {"training": {"float8": first}})
    after = train(ranks, tmp_path, "run", {"training": {"float8": second, "steps": 4}}, moved=False)
    assert after.column("loss")[:2] == before.column("loss") and len(after.column("loss")) == 4
    assert after.column("loss")[2] < before.column("loss")[0] - 0.1, "does not go on from what was learned"
    saved, now = (
        resolve({"training": {"steps": 4, "float8": kind, "tokens_per_step": 256}}) for kind in (first, second)
    )
    assert list(changes(saved, now, 2)) == [f"training.float8 = '{second}' from here on, '{first}' before"]
