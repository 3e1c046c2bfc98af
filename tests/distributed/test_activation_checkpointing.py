"""Checkpointed layers train as kept ones do, on every axis, and their statistics are counted once."""

from pathlib import Path
from typing import Any

import pytest
from harness import RankPool
from tiny_run import Result, Settings, assert_same_training, every_run, run, settings, write_corpus

SHORT: Settings = {
    "training": {"steps": 1, "sequence_length": 24, "tokens_per_step": 48},
    "metrics": {"validation_batches": 1},
    "model": {"layout": "LLN", "num_layers": 3},
}
PAIRS: Settings = {"model": {"num_kv_heads": 2}}
BIAS: Settings = {"moe": {"balance": "bias", "bias_rate": 0.01}}
FULL: Settings = {"training": {"activation_checkpointing": "full"}}
SELECTIVE: Settings = {"training": {"activation_checkpointing": "selective"}}
EVERY_SECOND: Settings = {"training": {"activation_checkpointing": "selective", "activation_checkpointing_every": 2}}
COMPILED: Settings = {"training": {"compile": True, "compile_backend": "aot_eager"}}
CARRIED: Settings = {"model": {"mixers": ["rwkv7", "mom_gla", "rwkv7"], "num_layers": 3}}

LAYOUTS: dict[str, tuple[int, tuple[Settings, ...]]] = {
    "one process": (1, (BIAS,)),
    "one process, carried tensors, memories": (1, (CARRIED,)),
    "shards, experts spread": (2, (BIAS, {"parallel": {"expert": 2}})),
    "one process, compiled": (1, (COMPILED, {"model": {"mixer": "gla", "layout": "LN", "num_layers": 2}})),
    "spans": (2, ({"parallel": {"context": 2}},)),
    "heads split": (2, (PAIRS, {"parallel": {"tensor": 2}})),
    "pipeline": (2, ({"parallel": {"pipeline": 2}},)),
    "pipeline, interleaved": (
        2,
        ({"model": {"num_layers": 4}, "parallel": {"pipeline": 2, "pipeline_schedule": "interleaved"}},),
    ),
}


QUICK = every_run(
    LAYOUTS,
    "one process, carried tensors, memories",
    "shards, experts spread",
    "heads split",
    "pipeline",
)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


def figures(result: Result) -> list[dict[str, float]]:
    """Everything logged but speeds and times, and what a step had nothing of."""
    measured = {"time", "tokens_per_second", "mfu", "memory_gib", "step_time", "data_wait", "data_wait_share"}
    lines = [{key: value for key, value in line.items() if value is not None} for line in result.lines]
    return [flat({key: value for key, value in line.items() if key not in measured}) for line in lines]


def flat(line: dict[str, Any]) -> dict[str, Any]:
    """Entries of lists as keys of their own: pytest.approx takes no nested values."""
    found: dict[str, Any] = {}
    for key, value in line.items():
        found |= {f"{key}[{i}]": entry for i, entry in enumerate(value)} if isinstance(value, list) else {key: value}
    return found


@pytest.mark.parametrize("layout", QUICK)
def test_layers_that_run_again_train_the_same(ranks: RankPool, corpus: Path, tmp_path: Path, layout: str) -> None:
    size, changes = LAYOUTS[layout]
    kept = ranks(size, run, settings(corpus, tmp_path / "kept", SHORT, *changes))
    modes = {"full": FULL, "selective": SELECTIVE} if COMPILED not in changes else {"every second": EVERY_SECOND}
    for name, mode in modes.items():
        found = ranks(size, run, settings(corpus, tmp_path / name, SHORT, *changes, mode))
        for one, other in zip(found, kept, strict=True):
            assert_same_training(one, other, 1e-6)
            assert one.state.keys() == other.state.keys()
        for line, expected in zip(figures(found[0]), figures(kept[0]), strict=True):
            assert line == pytest.approx(expected, rel=1e-6)
