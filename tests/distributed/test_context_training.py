"""Runs whose ranks share their sequences have the losses and gradients of one process."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from harness import RankPool
from tiny_run import Result, Settings, assert_same_training, every_run, run, settings, write_corpus

MIXED = ["hgrn2", "hgrn2", "softmax_attention"]
BASE: Settings = {
    # Outputs near zero make a norm a step function, which magnifies the rounding of sums.
    "model": {"mixers": MIXED, "num_layers": len(MIXED), "num_kv_heads": 2, "norm_eps": 1e-2},
    "mixer": {"hgrn2": {"conv": 3}},
    "training": {"steps": 2, "micro_batch_size": 2, "tokens_per_step": 4 * 48},
}
COMPILED: Settings = {"training": {"compile": True, "compile_backend": "aot_eager"}}
LAYOUTS: dict[str, tuple[int, Settings]] = {
    "two spans, compiled": (2, {"parallel": {"context": 2}} | COMPILED),
    "four spans, heads stay": (4, {"parallel": {"context": 4, "context_attention": "gather"}}),
    "two spans, shards and heads traded": (
        4,
        {"parallel": {"context": 2, "data_shard": 2, "context_attention": "heads"}},
    ),
    "two spans, replicas, global balance": (
        4,
        {"parallel": {"context": 2, "data_replicate": 2}, "moe": {"balance_scope": "global"}},
    ),
    "two spans, two stages": (4, {"parallel": {"context": 2, "pipeline": 2}}),
    "two spans, heads and experts split": (4, {"parallel": {"context": 2, "tensor": 2, "expert": 2}}),
}


QUICK = every_run(
    LAYOUTS,
    "four spans, heads stay",
    "two spans, heads and experts split",
)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"), documents=60)


@pytest.fixture(scope="module")
def alone(ranks: RankPool, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Result]:
    """One process, by the scope of the balance loss."""
    folder = tmp_path_factory.mktemp("alone")

    @cache
    def alone_with(scope: str) -> Result:
        (one,) = ranks(1, run, settings(corpus, folder / scope, BASE, {"moe": {"balance_scope": scope}}))
        return one

    return alone_with


@pytest.mark.parametrize("layout", QUICK)
def test_spans_train_as_whole_rows_do(
    ranks: RankPool, corpus: Path, tmp_path: Path, alone: Callable[[str], Result], layout: str
) -> None:
    size, changes = LAYOUTS[layout]
    results = ranks(size, run, settings(corpus, tmp_path / "spans", BASE, changes))
    gradients = {name: gradient for result in results for name, gradient in result.gradients.items()}  # of all stages
    for result in results:
        one = alone("global" if "global" in layout else "sequence")
        assert_same_training(result._replace(gradients=gradients), one)
        assert (result.graphs > 10) == ("compiled" in layout)


def test_states_in_bfloat16_change_the_loss_a_little(
    ranks: RankPool, corpus: Path, tmp_path: Path, alone: Callable[[str], Result]
) -> None:
    half: Settings = {"parallel": {"context": 2, "context_states": "bfloat16"}}
    rounded = ranks(2, run, settings(corpus, tmp_path / "rounded", BASE, half))[0].gradients
    distances = [(rounded[name] - g).norm() / g.norm() for name, g in alone("sequence").gradients.items()]
    assert 1e-4 < max(distances) < 2e-2
