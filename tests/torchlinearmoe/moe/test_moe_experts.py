"""Experts against per-token arithmetic, with surplus rows, and compiled."""

import pytest
import torch
import torch.nn.functional as F

from torchlinearmoe.moe.experts import Experts

COUNTS = {
    "even": [4, 4, 4, 4],
    "ragged": [3, 1, 5, 2],
    "empty first, middle, last": [0, 7, 0, 6, 0],
    "all to one": [0, 9, 0],
    "one row": [0, 0, 1],
    "no row": [0, 0, 0],
}


every_activation = pytest.mark.parametrize("activation", ["swiglu", "relu2"])


def experts(E: int, D: int, F_: int, dtype: torch.dtype, backend: str, activation: str = "swiglu") -> Experts:
    module = Experts(D, F_, E, activation=activation, backend=backend).to(dtype)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0, 0.3)
    return module


def forward_backward(module, x, counts, dy, **options):
    x = x.detach().clone().requires_grad_()
    y = module(x, counts, **options)
    grads = torch.autograd.grad(y, [x, *module.parameters()], dy)
    return [y.detach(), *grads]


def dense(module: Experts, x: torch.Tensor, counts: list[int], dy: torch.Tensor) -> list[torch.Tensor]:
    """Row by row, with autograd of plain matrix products."""
    x = x.detach().clone().requires_grad_()
    width = module.down.shape[1]
    rows, r = [], 0
    for e, count in enumerate(counts):
        for _ in range(count):
            up = x[r] @ module.into[e][:, -width:]
            gate = x[r] @ module.into[e][:, :width] if module.gated else up
            rows.append((gate * (torch.sigmoid(gate) if module.gated else up > 0) * up) @ module.down[e])
            r += 1
    y = torch.stack(rows) if rows else x.new_empty(0, x.shape[1])
    grads = torch.autograd.grad(y, [x, *module.parameters()], dy, allow_unused=True)
    return [
        y.detach(),
        *(torch.zeros_like(p) if g is None else g for g, p in zip(grads, [x, *module.parameters()])),
    ]


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS.keys())
@every_activation
def test_loop_equals_row_by_row_arithmetic(activation: str, counts: list[int]) -> None:
    torch.manual_seed(sum(counts))
    module = experts(len(counts), 5, 3, torch.float64, "loop", activation)
    x, dy = torch.randn(2, sum(counts), 5, dtype=torch.float64)
    if not counts or not sum(counts):
        y = module(x, torch.tensor(counts))
        assert y.shape == (0, 5)
        return
    got = forward_backward(module, x, torch.tensor(counts), dy)
    torch.testing.assert_close(got, dense(module, x, counts, dy), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", ["grouped_mm", "loop"])
def test_expanded_gradients_are_taken(backend: str) -> None:
    module = experts(3, 8, 8, torch.float32, backend)
    x = torch.randn(9, 8, requires_grad=True)
    module(x, torch.tensor([2, 3, 4])).sum().backward()
    expected = forward_backward(module, x, torch.tensor([2, 3, 4]), torch.ones(9, 8))
    torch.testing.assert_close([x.grad, module.into.grad, module.down.grad], expected[1:])


@pytest.mark.parametrize("backend", ["grouped_mm", "loop"])
@every_activation
def test_surplus_rows_reach_nothing(activation: str, backend: str) -> None:
    torch.manual_seed(3)
    counts, real = torch.tensor([3, 0, 4]), 7
    module = experts(3, 8, 16, torch.float32, backend, activation)
    x, dy = torch.randn(2, real + 5, 8)
    expected = forward_backward(module, x[:real], counts, dy[:real])
    x[real:] = float("nan")
    dy[real:] = float("nan")
    # Freed blocks full of NaN: unspecified memory taken from them would show.
    for _ in range(4):
        torch.full((real + 5, 32), float("nan"))
        got = forward_backward(module, x, counts, dy, padded=True)
        torch.testing.assert_close(got[0], F.pad(expected[0], (0, 0, 0, 5)))
        torch.testing.assert_close(got[1], F.pad(expected[1], (0, 0, 0, 5)))
        torch.testing.assert_close(got[2:], expected[2:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("padded", [False, True])
@every_activation
def test_compiles_whole_in_every_dtype(activation: str, dtype: torch.dtype, padded: bool) -> None:
    torch.manual_seed(5)
    module = experts(4, 16, 8, dtype, "auto", activation)
    counts = torch.tensor([5, 0, 2, 4])
    x, dy = torch.randn(2, 11 + 3 * padded, 16).to(dtype)
    expected = forward_backward(module, x, counts, dy, padded=padded)
    torch.compiler.reset()  # one function is compiled so often and no more
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    got = forward_backward(compiled, x, counts, dy, padded=padded)
    torch.testing.assert_close(got, expected)
    assert all(torch.isfinite(t).all() for t in got)
