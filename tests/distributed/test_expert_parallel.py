"""Experts spread over ranks compute, and train as, one process that holds all of them."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from harness import RankPool
from tiny_run import Result, Settings, assert_same_training, every_run, run, settings, write_corpus
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from torchlinearmoe.moe import MoE
from torchlinearmoe.parallel.expert import apply_expert_parallel
from torchlinearmoe.parallel.local import shadow
from torchlinearmoe.recipe.schema import MoERecipe

D, E, K = 8, 8, 3


def layer(**changes: object) -> MoE:
    fields = {
        "num_experts": E,
        "top_k": K,
        "hidden_size": 4,
        "shared_hidden_size": 4,
        "shared_gate": True,
        "renormalize": True,
    }
    torch.manual_seed(1)
    module = MoE(D, MoERecipe(**fields | changes), 0.02, 0.02).double()  # pyright: ignore
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0, 0.5)
    return module


def tokens_of(rank: int, cut: list[int], favoured: bool) -> Tensor:
    """The tokens of one rank; `favoured` ones all go to the first K experts, so that most ranks receive none."""
    torch.manual_seed(2)
    x_TD = torch.randn(sum(cut), D, dtype=torch.float64)
    if favoured:
        x_TD = x_TD[:1] + 1e-3 * x_TD
    return x_TD.split(cut)[rank]


def whole(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def one_by_one(cut: list[int], changes: dict[str, object], favoured: bool) -> list[Tensor]:
    """Each rank's tokens by themselves through all experts in one process, and the summed gradients."""
    module = layer(**changes)
    inputs = [tokens_of(rank, cut, favoured).requires_grad_() for rank in range(len(cut))]
    outputs = [module(x_TD) for x_TD in inputs]
    torch.stack([(y_TD.sin() * (1 + y_TD)).sum() for y_TD in outputs]).sum().backward()
    grads = [whole(x_TD.grad) for x_TD in inputs]
    return [*(y.detach() for y in outputs), *grads, *(whole(p.grad) for p in module.parameters())]


def spread(rank: int, cases: list[tuple[list[int], dict[str, object], bool]]) -> list[list[Tensor]]:
    """The same with the experts spread over the ranks: (output, its tokens' gradient, gradients of the weights)."""
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("ep",))
    results = []
    for cut, changes, favoured in cases:
        module = layer(**changes)
        apply_expert_parallel(nn.ModuleList([module]), mesh)
        shadow(module.experts)
        x_TD = tokens_of(rank, cut, favoured).requires_grad_()
        y_TD = module(x_TD)
        (y_TD.sin() * (1 + y_TD)).sum().backward()
        for name, parameter in module.named_parameters():
            if not name.startswith("experts"):
                assert parameter.grad is not None
                dist.all_reduce(parameter.grad)
        results.append([y_TD.detach(), whole(x_TD.grad), *(whole(p.grad) for p in module.parameters())])
    return results


CASES: dict[str, tuple[dict[str, object], bool]] = {
    "dropless": ({}, False),
    "most ranks receive nothing": ({}, True),
    "capacity": ({"capacity_factor": 0.5}, False),
    "capacity, one expert a token": ({"capacity_factor": 0.5, "top_k": 1, "drop_policy": "position"}, True),
}


@pytest.mark.parametrize("size", [2, 4])
def test_spread_experts_give_the_outputs_and_gradients_of_one_process(ranks: RankPool, size: int) -> None:
    cuts = [[5, 9, 1, 2][:size], [7] * size]
    cases = [(cut, *case) for case in CASES.values() for cut in cuts]
    results = ranks(size, spread, cases)
    for index, case in enumerate(cases):
        expected = one_by_one(*case)
        for rank in range(size):
            y_TD, dx_TD, *weights = results[rank][index]
            torch.testing.assert_close(y_TD, expected[rank], rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(dx_TD, expected[size + rank], rtol=1e-11, atol=1e-11)
            torch.testing.assert_close(weights, expected[2 * size :], rtol=1e-11, atol=1e-11)


HYBRID: Settings = {"model": {"layout": "LN", "num_layers": 2, "mixer": "linear_attention"}}
BALANCES: dict[str, Settings] = {
    "sequence": {"moe": {"balance": "loss", "balance_scope": "sequence"}},
    "global": {"moe": {"balance": "loss", "balance_scope": "global"}},
    "bias": {"moe": {"balance": "bias", "bias_rate": 0.01, "num_experts": 6}},
}
LAYOUTS: dict[str, list[tuple[int, Settings]]] = {
    "sequence": [(4, {"parallel": {"expert": 4}})],
    "global": [(4, {"parallel": {"expert": 2, "data_replicate": 2}})],
    "bias": [(4, {"parallel": {"expert": 2}})],
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.mark.parametrize("balance", every_run(BALANCES, "sequence", "bias"))
def test_spread_experts_train_as_one_process_does(ranks: RankPool, corpus: Path, tmp_path: Path, balance: str) -> None:
    def train(size: int, name: str, *changes: Settings) -> list[Result]:
        cut: Settings = {"training": {"tokens_per_step": 8 * 48, "steps": 2}}
        changes = (HYBRID, BALANCES[balance], cut, *changes)
        return ranks(size, run, settings(corpus, tmp_path / name, *changes))

    (one,) = train(1, "one", {"training": {"micro_batch_size": 8}})
    for index, (size, layout) in enumerate(LAYOUTS[balance]):
        for result in train(size, f"{index}", layout):
            assert_same_training(result, one)
            for key, value in one.state.items():
                if key.endswith("expert_bias"):
                    assert torch.equal(result.state[key], value)
            for key in ("moe/max_load", "moe/balance_loss", "moe/z_loss", "moe/entropy"):
                assert result.column(key) == pytest.approx(one.column(key), rel=1e-5), key


@pytest.mark.distributed_full
def test_compiled_spread_experts_train_as_one_eager_process_does(ranks: RankPool, corpus: Path, tmp_path: Path) -> None:
    compiled: Settings = {"training": {"compile": True, "compile_backend": "aot_eager"}, "parallel": {"expert": 2}}
    short: Settings = {"training": {"steps": 2}}
    (one,) = ranks(1, run, settings(corpus, tmp_path / "one", HYBRID, short))
    for result in ranks(2, run, settings(corpus, tmp_path / "two", HYBRID, short, compiled)):
        assert_same_training(result, one)
        assert 10 <= result.graphs <= 30 and not result.graph_breaks, (result.graphs, result.graph_breaks)
