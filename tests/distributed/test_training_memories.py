"""Mixtures of memories train alike however they are spread, and their routers are balanced and told of."""

from pathlib import Path

import pytest
from harness import RankPool
from tiny_run import Result, Settings, assert_same_training, run, settings, write_corpus

MODEL: Settings = {"model": {"layout": "LN", "num_layers": 2, "num_kv_heads": 2}}
RUNS: dict[str, Settings] = {
    "sequence": {
        "model": {**MODEL["model"], "mixer": "mom_gated_delta_net"},
        "mixer": {"mom_gated_delta_net": {"balance_coefficient": 0.2}},
    },
    "global": {
        "model": {**MODEL["model"], "mixer": "mom_gla"},
        "mixer": {"mom_gla": {"balance_scope": "global", "balance_coefficient": 0.2, "conv": 3, "num_memories": 3}},
    },
}
FIGURES = ("mom/max_load", "mom/min_load", "mom/balance_loss", "mom/entropy")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.mark.parametrize(
    "scope, compiles",
    [*((scope, False) for scope in RUNS), pytest.param("sequence", True, marks=pytest.mark.distributed_full)],
)
def test_memories_train_and_balance_alike_on_every_layout(
    ranks: RankPool, corpus: Path, tmp_path: Path, scope: str, compiles: bool
) -> None:
    def train(size: int, folder: str, *more: Settings) -> Result:
        cut: Settings = {"training": {"tokens_per_step": 4 * 48, "steps": 2}}
        return ranks(size, run, settings(corpus, tmp_path / folder, cut, RUNS[scope], *more))[0]

    one = train(1, "one", {"training": {"micro_batch_size": 4}})
    assert set(FIGURES) <= one.lines[0].keys() and {"moe/max_load", "moe/entropy"} <= one.lines[0].keys()
    compiled: Settings = {"training": {"compile": True, "compile_backend": "aot_eager"}}
    if compiles:
        found = train(2, "many", compiled)
    elif scope == "sequence":
        found = train(4, "many", {"parallel": {"tensor": 2}})
    else:
        found = train(2, "many")
    assert_same_training(found, one, cancelling=("A_log", "dt_bias"))
    for key in FIGURES:
        assert found.column(key) == pytest.approx(one.column(key), rel=1e-5), key
    assert not found.graph_breaks and bool(found.graphs) == compiles
