"""The layer on a GPU: equal to the loop there, never stopping for the host, the same bits every time."""

import pytest
import torch

from torchlinearmoe.documents import Documents
from torchlinearmoe.moe import StepTotals

pytestmark = pytest.mark.gpu

T, D = 1000, 64  # groups of no particular size


def results(layer, x, dy):
    y = layer(x, totals=StepTotals(T, 4), documents=Documents.batch(4, T // 4, x.device))
    return [y, *torch.autograd.grad(y, [x, *layer.parameters()], dy)]


@pytest.fixture
def case(build):
    torch.manual_seed(0)

    def make(backend: str, **options):
        options = {"hidden_size": 40, "num_experts": 16, "top_k": 4, "shared_hidden_size": 32, **options}
        layer = build(D, torch.float32, backend=backend, **options)
        for name, parameter in layer.named_parameters():
            if not name.startswith("router"):
                parameter.data = parameter.data.bfloat16()
        return layer.cuda()

    x = torch.randn(T, D, device="cuda").bfloat16().requires_grad_()
    return make, x, torch.randn(T, D, device="cuda").bfloat16()


@pytest.mark.parametrize("capacity_factor", [None, 0.5])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("backend", ["grouped_mm", "triton"])
def test_grouped_equals_loop(case, backend: str, capacity_factor: float | None, compiled: bool) -> None:
    make, x, dy = case
    grouped = make(backend, capacity_factor=capacity_factor)
    loop = make("loop", capacity_factor=capacity_factor)
    loop.load_state_dict(grouped.state_dict())
    if compiled:
        grouped.experts.compile(fullgraph=True)
    for got, expected in zip(results(grouped, x, dy), results(loop, x, dy)):
        assert (got - expected).abs().max() <= 0.02 * expected.abs().max()


@pytest.mark.parametrize("options", [{}, {"capacity_factor": 0.5}, {"balance_scope": "global"}, {"balance": "bias"}])
@pytest.mark.parametrize("backend", ["grouped_mm", "triton"])
def test_nothing_waits_for_the_host_and_bits_repeat(case, backend: str, options: dict) -> None:
    make, x, dy = case
    layer = make(backend, **options)
    first = results(layer, x, dy)
    torch.cuda.set_sync_debug_mode("error")
    try:
        second = results(layer, x, dy)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(a, b) for a, b in zip(first, second))
