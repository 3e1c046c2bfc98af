"""Models split over tensor-parallel ranks compute, and train as, one process that holds them whole."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import RankPool
from tiny_run import Result, Settings, assert_same_training, every_run, run, settings, unsettle, whole, write_corpus
from torch import Tensor

from torchlinearmoe.documents import Documents
from torchlinearmoe.initialize import initialize
from torchlinearmoe.kernels.cross_entropy import chunked
from torchlinearmoe.mixers import MIXERS
from torchlinearmoe.models.decoder import Decoder
from torchlinearmoe.parallel.local import shadow
from torchlinearmoe.parallel.tensor import apply_tensor_parallel, sum_partial_gradients
from torchlinearmoe.recipe import resolve
from torchlinearmoe.recipe.schema import ModelRecipe

T, V = 36, 24
Case = tuple[str, dict[str, Any]]
CASES: list[Case] = [(name, overrides) for name in MIXERS.names() for overrides in ({}, *MIXERS[name].variants)]


def model_recipe(name: str, overrides: dict[str, Any]) -> ModelRecipe:
    """Two layers of a mixer with dense feed-forwards, a few thousand parameters."""
    tables = {
        "model": {"mixer": name, "num_layers": 2, "num_heads": 2, "num_kv_heads": 2, "ffn_hidden_size": 48},
        "moe": {"num_experts": 0, "top_k": 0},
        "mixer": {name: overrides},
        "training": {"steps": 1},
    }
    recipe = resolve(tables).model
    return replace(recipe, vocab_size=V)


def cases_of(degree: int) -> dict[str, list[Case]]:
    """The cases whose heads so many ranks can share, by mixer; with more than two ranks one of each."""
    recipe = model_recipe("hgrn2", {})  # the dimensions, which are those of every mixer
    cases: dict[str, list[Case]] = {}
    for name, overrides in CASES:
        _, count = MIXERS[name].head_groups(MIXERS[name].Options(**overrides), recipe)
        if count % degree == 0 and (degree == 2 or name not in cases):
            cases.setdefault(name, []).append((name, overrides))
    return cases


def results_of(model: Decoder) -> dict[str, Tensor]:
    """Loss, logits and gradients of a stream of two documents, some labels ignored."""
    generator = torch.Generator().manual_seed(7)
    tokens = torch.randint(V, (T,), generator=generator)
    labels = tokens.roll(-1).masked_fill(torch.arange(T) % 5 == 0, -100)
    documents = Documents.packed([0, 11, T])
    loss = model(tokens, labels=labels, documents=documents)
    loss.backward()
    sum_partial_gradients(model)
    with torch.no_grad():
        logits = model(tokens, documents=documents)
    gradients = {name: p.grad for name, p in model.named_parameters()}
    return {"loss": loss.detach(), "logits": logits, **{n: whole(g) for n, g in gradients.items() if g is not None}}


def built(recipe: ModelRecipe, spread: bool) -> Decoder:
    from torch.distributed.device_mesh import init_device_mesh

    with torch.device("meta"):
        model = Decoder(recipe).double()
    if spread:
        apply_tensor_parallel(model, init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tensor",)))
    model.to_empty(device="cpu")
    initialize(model, 0)
    unsettle(model)
    if spread:
        shadow(model)
    return model


def spread_results(rank: int, cases: list[Case], chunk: int) -> list[dict[str, Tensor]]:
    usual, chunked.CHUNK_ELEMENTS = chunked.CHUNK_ELEMENTS, chunk
    try:
        return [results_of(built(model_recipe(*case), spread=True)) for case in cases]
    finally:
        chunked.CHUNK_ELEMENTS = usual


@pytest.mark.parametrize(
    "degree, mixer",
    [
        pytest.param(degree, name, marks=[pytest.mark.distributed_full] * (degree == 4))
        for degree in (2, 3, 4)
        for name in cases_of(degree)
    ],
)
def test_every_mixer_split_over_its_heads_equals_the_whole(
    once: Callable[..., list[Any]], selected: list[str], degree: int, mixer: str
) -> None:
    cases = [case for name, cases in cases_of(degree).items() if name in selected for case in cases]
    found = once(degree, spread_results, cases, 3 * V // degree)
    for index, case in enumerate(cases):
        if case[0] != mixer:
            continue
        expected = results_of(built(model_recipe(*case), spread=False))
        for results in found:
            assert results[index].keys() == expected.keys()
            for name, value in expected.items():
                error = (results[index][name] - value).norm() / value.norm()
                assert error < 1e-10, f"{case}: {name} is off by {error:.1e}"


def test_two_ranks_can_share_the_heads_of_every_mixer() -> None:
    assert cases_of(2).keys() == set(MIXERS.names())


DEEP: Settings = {"model": {"layout": "LLN", "num_layers": 3, "num_kv_heads": 2}}
HYBRID: Settings = {"model": {"layout": "LN", "num_layers": 2, "num_kv_heads": 2, "mixer": "gated_delta_net"}}
LOSS: Settings = {"moe": {"balance": "loss", "balance_scope": "sequence"}}
GLOBAL: Settings = {"moe": {"balance": "loss", "balance_scope": "global"}}
BIAS: Settings = {"moe": {"balance": "bias", "bias_rate": 0.01}}
RUNS: dict[str, tuple[Settings, list[tuple[int, Settings]]]] = {
    "hgrn2, balance by sequence": (
        {**DEEP, **LOSS},
        [(4, {"parallel": {"tensor": 2, "data_replicate": 2}})],
    ),
    "gated_delta_net, balance over the step, first layer dense": (
        {**HYBRID, "moe": {**GLOBAL["moe"], "first_dense_layers": 1}},
        [(4, {"parallel": {"tensor": 2, "expert": 4}})],
    ),
    "retention, balance by bias": (
        {"model": {**HYBRID["model"], "mixer": "retention"}, **BIAS},
        [(4, {"parallel": {"tensor": 2, "expert": 2}})],
    ),
    "tied embeddings, dense": (
        {"model": {**HYBRID["model"], "tie_embeddings": True, "ffn_hidden_size": 48}, "moe": {"num_experts": 0}},
        [(4, {"parallel": {"tensor": 2}})],
    ),
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.mark.parametrize(
    "name",
    every_run(RUNS, "gated_delta_net, balance over the step, first layer dense"),
)
def test_split_models_train_as_one_process_does(ranks: RankPool, corpus: Path, tmp_path: Path, name: str) -> None:
    changes, layouts = RUNS[name]

    def train(size: int, folder: str, *more: Settings) -> list[Result]:
        cut: Settings = {"training": {"tokens_per_step": 4 * 48, "steps": 2}}
        return ranks(size, run, settings(corpus, tmp_path / folder, changes, cut, *more))

    (one,) = train(1, "one", {"training": {"micro_batch_size": 4}})
    for index, (size, layout) in enumerate(layouts):
        for result in train(size, f"{index}", layout):
            assert_same_training(result, one)
            for key, value in one.state.items():
                if key.endswith("expert_bias"):
                    assert torch.equal(result.state[key], value)
            for key in ("moe/max_load", "moe/balance_loss", "moe/z_loss", "moe/entropy"):
                assert result.column(key) == pytest.approx(one.column(key), rel=1e-5), key


@pytest.mark.slow
def test_compiled_split_models_train_as_one_eager_process_does(ranks: RankPool, corpus: Path, tmp_path: Path) -> None:
    # The blocks are compiled, the embedding before them is not: its gradient has to arrive all the same.
    compiled: Settings = {"training": {"compile": True, "compile_backend": "aot_eager"}, "parallel": {"tensor": 2}}
    changes: tuple[Settings, ...] = (DEEP, {"training": {"steps": 2}})
    (one,) = ranks(1, run, settings(corpus, tmp_path / "one", *changes))
    for result in ranks(2, run, settings(corpus, tmp_path / "two", *changes, compiled)):
        assert_same_training(result, one)
        assert 10 <= result.graphs <= 30 and not result.graph_breaks, (result.graphs, result.graph_breaks)
