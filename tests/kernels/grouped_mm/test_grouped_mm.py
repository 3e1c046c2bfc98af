"""The grouped product as an operator of the compiler, and which backend is taken."""

from __future__ import annotations

import pytest
import torch

from torchlinearmoe.errors import UserError
from torchlinearmoe.kernels import grouped_mm as products
from torchlinearmoe.kernels.choose import choose


@pytest.mark.parametrize(("backend", "name"), [("grouped_mm", "grouped_mm"), ("loop", "grouped_mm_loop")])
def test_operators_pass_the_library_checks(backend: str, name: str):
    assert _chosen(backend, torch.float32, 8, 4) == backend
    torch.manual_seed(6)
    x, dy = torch.randn(7, 8, requires_grad=True), torch.randn(7, 4)
    w = torch.randn(3, 8, 4, requires_grad=True)
    offsets = torch.tensor([2, 2, 7], dtype=torch.int32)
    torch.library.opcheck(getattr(torch.ops.torchlinearmoe, name), (x, w, offsets))
    torch.library.opcheck(getattr(torch.ops.torchlinearmoe, f"{name}_weight"), (x.detach(), dy, offsets))


def _chosen(requested: str, dtype: torch.dtype, inner: int, outer: int) -> str:
    return choose(products.OPERATOR, requested, products.call(inner, outer, "cpu", dtype)).name


def test_auto_multiplies_group_by_group_where_rows_are_not_multiples_of_16_bytes():
    assert _chosen("auto", torch.float32, 4, 8) == "grouped_mm"
    assert _chosen("auto", torch.bfloat16, 4, 8) == _chosen("auto", torch.bfloat16, 8, 4) == "loop"
    assert _chosen("auto", torch.bfloat16, 8, 24) == "grouped_mm"
    assert _chosen("auto", torch.float64, 8, 8) == "loop"
    assert _chosen("loop", torch.float32, 8, 8) == "loop"


def test_what_cannot_multiply_is_refused_by_the_recipes_key():
    with pytest.raises(UserError, match="^moe.backend = 'grouped_mm': .*: it does not take float64"):
        _chosen("grouped_mm", torch.float64, 8, 8)
    with pytest.raises(UserError, match="^moe.backend = 'grouped_mm': .*make their widths multiples of 8"):
        _chosen("grouped_mm", torch.bfloat16, 8, 12)
    with pytest.raises(UserError, match="^moe.backend = 'triton': cannot compute grouped_mm: it computes experts; "):
        _chosen("triton", torch.float32, 8, 8)
    with pytest.raises(
        UserError, match="^moe.backend = 'fused': legal: auto, reference, torch, triton, grouped_mm, loop"
    ):
        _chosen("fused", torch.float32, 8, 8)
