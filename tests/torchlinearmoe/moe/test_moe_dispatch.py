"""Dispatch and combine: rows in order, exact inverses, the same bits every time."""

import pytest
import torch

from torchlinearmoe.moe.dispatch import LocalDispatch
from torchlinearmoe.moe.router import Routing


def routing(T: int, E: int, k: int, dtype: torch.dtype = torch.float64) -> Routing:
    scores = torch.rand(T, E, dtype=dtype)
    weights, ids = scores.topk(k)
    return Routing(ids, weights.requires_grad_(), scores, scores)


@pytest.mark.parametrize("T, E, k", [(1, 3, 2), (17, 5, 1), (32, 8, 8), (50, 64, 4)])
@pytest.mark.parametrize("drop", [False, True])
def test_rows_are_sorted_by_expert_then_token(T: int, E: int, k: int, drop: bool) -> None:
    torch.manual_seed(T)
    decision = routing(T, E, k)
    keep = torch.rand(T, k) < 0.6 if drop else None
    kept = torch.ones(T, k, dtype=torch.bool) if keep is None else keep
    x = torch.randn(T, 4, dtype=torch.float64)
    rows, counts, context = LocalDispatch(E).dispatch(x, decision, keep)
    expected = [
        t for e in range(E) for t in range(T) for j in range(k) if decision.topk_ids_Tk[t, j] == e and kept[t, j]
    ]
    assert torch.equal(rows[: len(expected)], x[expected]) and rows.shape[0] == T * k
    assert counts.tolist() == [int(((decision.topk_ids_Tk == e) & kept).sum()) for e in range(E)]
    assert context.padded == drop


def test_weights_are_applied_in_fp32() -> None:
    torch.manual_seed(7)
    decision = routing(64, 8, 4, torch.float32)
    x = torch.randn(64, 16).bfloat16().requires_grad_()
    dispatcher = LocalDispatch(8)
    rows, _, context = dispatcher.dispatch(x, decision)
    y = dispatcher.combine(rows, context)
    exact = x.detach().double() * decision.topk_weights_Tk.detach().double().sum(1, keepdim=True)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y.detach(), exact.bfloat16()) or (y.detach().double() - exact).abs().max() <= (
        exact.abs().max() * 2**-8
    )
    dx, dw = torch.autograd.grad(y, [x, decision.topk_weights_Tk], torch.ones_like(y))
    assert dx.dtype == torch.bfloat16 and dw.dtype == torch.float32
    torch.testing.assert_close(dw, x.detach().float().sum(1, keepdim=True).expand(64, 4))


@pytest.mark.parametrize("keep", [None, torch.arange(22).view(11, 2) % 3 > 0])
def test_compiles_whole(keep: torch.Tensor | None) -> None:
    torch.manual_seed(8)
    decision = routing(11, 4, 2, torch.float32)
    x = torch.randn(11, 8, requires_grad=True)
    dispatcher = LocalDispatch(4)

    def run(x, decision, keep):
        rows, counts, context = dispatcher.dispatch(x, decision, keep)
        return dispatcher.combine(rows * rows, context), counts

    expected, expected_counts = run(x, decision, keep)
    got, counts = torch.compile(run, fullgraph=True, backend="aot_eager")(x, decision, keep)
    inputs = [x, decision.topk_weights_Tk]
    dy = torch.randn_like(expected)
    torch.testing.assert_close(
        [got, *torch.autograd.grad(got, inputs, dy)], [expected, *torch.autograd.grad(expected, inputs, dy)]
    )
    assert torch.equal(counts, expected_counts)
