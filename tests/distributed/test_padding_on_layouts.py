"""Rows that end in padding train alike on every layout: each loss and count is of the tokens that are none."""

import json
import random
from pathlib import Path

import pytest
from harness import RankPool
from tiny_run import Result, Settings, assert_same_training, every_run, run, settings, write_corpus

MODEL: Settings = {"model": {"layout": "LN", "num_layers": 2, "num_kv_heads": 2, "mixer": "gla"}}
ROUTERS: dict[str, Settings] = {
    "sequence": {"moe": {"balance_scope": "sequence"}},
    "global": {"moe": {"balance_scope": "global"}},
    "bias": {"moe": {"balance": "bias", "bias_rate": 0.01}},
    "memories": {"model": {"mixer": "mom_gla"}, "mixer": {"mom_gla": {"balance_coefficient": 0.2}}},
    "memories, global": {
        "model": {"mixer": "mom_gla"},
        "mixer": {"mom_gla": {"balance_coefficient": 0.2, "balance_scope": "global"}},
    },
}
COMPILED = "compiled, checkpointed"
LAYOUTS: dict[str, tuple[int, Settings]] = {
    "accumulation": (1, {}),
    "data": (2, {}),
    "tensor": (2, {"parallel": {"tensor": 2}}),
    "context": (2, {"parallel": {"context": 2}}),
    "pipeline": (2, {"parallel": {"pipeline": 2}}),
    COMPILED: (
        2,
        {"training": {"compile": True, "compile_backend": "aot_eager", "activation_checkpointing": "full"}},
    ),
}
CASES = {f"{router} {layout}": (router, layout) for router in ROUTERS for layout in LAYOUTS}


@pytest.fixture(scope="module")
def messages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    chooser = random.Random(3)
    path = tmp_path_factory.mktemp("messages") / "messages.jsonl"
    pairs = [{"prompt": "a b" * chooser.randint(1, 4), "response": "c " * chooser.choice([1, 3, 8])} for _ in range(40)]
    path.write_text(
        "".join(json.dumps({**pair, "prompt": f"{i} {pair['prompt']}"}) + "\n" for i, pair in enumerate(pairs))
    )
    return path


@pytest.fixture(scope="module")
def whole(ranks: RankPool, messages: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Result]:
    """Results of one process with all rows of a step at once, by router, as they are asked for."""
    return {}


def train(ranks: RankPool, messages: Path, output: Path, size: int, *changes: Settings) -> Result:
    base: Settings = {
        "data": {"format": "messages", "validation_fraction": 0.1},
        "training": {"tokens_per_step": 4 * 48, "steps": 2},
        "metrics": {"validation_interval": 1},
    }
    results = ranks(size, run, settings(messages, output, base, MODEL, *changes))
    first, *others = results
    for other in others:  # a pipeline's ranks have the gradients of their stages
        first.gradients.update(other.gradients)
        first.state.update(other.state)
    return first


@pytest.mark.parametrize(
    "case",
    every_run(
        CASES,
        *(f"sequence {layout}" for layout in LAYOUTS if layout != COMPILED),
        *("global tensor", "bias data", "memories tensor", "memories context"),
        slow=(
            f"sequence {COMPILED}",
            f"memories {COMPILED}",
            "global accumulation",
            "bias context",
            "memories, global data",
        ),
    ),
)
def test_padded_rows_train_alike_on_every_layout(
    ranks: RankPool, messages: Path, whole: dict[str, Result], tmp_path: Path, case: str
) -> None:
    router, layout = CASES[case]
    if router not in whole:
        at_once: Settings = {"training": {"micro_batch_size": 4}}
        whole[router] = train(ranks, messages, tmp_path / "whole", 1, ROUTERS[router], at_once)
    one, (size, changes) = whole[router], LAYOUTS[layout]
    found = train(ranks, messages, tmp_path / "found", size, ROUTERS[router], changes)
    assert_same_training(found, one)
    for key in ("moe/max_load", "moe/balance_loss", "moe/z_loss", "moe/entropy", "mom/max_load", "mom/balance_loss"):
        assert found.column(key) == pytest.approx(one.column(key), rel=1e-5), key
    biases = {name: value for name, value in one.state.items() if name.endswith("expert_bias")}
    assert bool(biases) == any(value.abs().max() > 0.005 for value in biases.values())
    assert all(found.state[name].equal(value) for name, value in biases.items())
    assert not found.graph_breaks


@pytest.mark.parametrize(
    "layout", every_run(LAYOUTS, "data", "context", slow=("accumulation", "tensor", "pipeline", COMPILED))
)
def test_documents_packed_by_best_fit_train_alike_on_every_layout(
    ranks: RankPool, whole: dict[str, Result], tmp_path: Path, layout: str
) -> None:
    data: Settings = {"data": {"format": "text", "packing": "best_fit", "min_length": 4}, "training": {"steps": 3}}
    corpus = write_corpus(tmp_path)
    one = train(ranks, corpus, tmp_path / "whole", 1, data, {"training": {"micro_batch_size": 4}})
    size, changes = LAYOUTS[layout]
    found = train(ranks, corpus, tmp_path / "found", size, data, changes)
    assert_same_training(found, one)
    for key in ("data/padding", "data/cut_documents", "moe/max_load", "moe/balance_loss"):
        # No document begins in some steps.
        assert [value or 0 for value in found.column(key)] == pytest.approx(
            [value or 0 for value in one.column(key)]
        ), key
    assert max(one.column("data/padding")) > 0 and 0 < sum(value or 0 for value in one.column("data/cut_documents")) < 3
