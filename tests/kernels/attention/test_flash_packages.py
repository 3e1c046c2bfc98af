"""Optional packages of attention get what they take; stand-ins demand what these do, and compute on the CPU."""

from __future__ import annotations

import sys
import types
from itertools import accumulate
from typing import Any

import pytest
import torch
from torch import Tensor

from torchlinearmoe.documents import Documents
from torchlinearmoe.kernels import attention
from torchlinearmoe.kernels.attention import OPERATOR, cudnn, flash3, flash4, varlen
from torchlinearmoe.kernels.attention.rows import query_rows
from torchlinearmoe.kernels.choose import Machine, _is_there, decide

SCALE = 0.31
HOPPER, AMPERE, BLACKWELL = (9, 0), (8, 0), (10, 0)


def ragged(q: Tensor, k: Tensor, v: Tensor, borders: tuple[Tensor, Tensor], scale: float, left: int) -> Tensor:
    """Causal attention between borders, aligned at the last query and key; `left` keys before a query's own, or -1."""
    assert all(x.dtype == torch.int32 and x.is_contiguous() for x in borders)
    outputs = []
    for (a, b), (c, d) in zip(*(zip(x.tolist(), x[1:].tolist()) for x in borders)):
        query, key = torch.arange(d - c - (b - a), d - c)[:, None], torch.arange(d - c)
        sees = (key <= query) & (key >= query - (left if left >= 0 else d - c))
        times = q.shape[1] // k.shape[1]
        keys, values = (x[c:d].repeat_interleave(times, 1) for x in (k, v))
        scores = scale * torch.einsum("thd,shd->hts", q[a:b], keys).masked_fill(~sees, -torch.inf)
        outputs.append(torch.einsum("hts,shd->thd", scores.softmax(-1), values))
    return torch.cat(outputs)


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Stand-ins of both, and what they were called with."""
    calls: list[dict[str, Any]] = []

    def note(q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, int], borders: tuple[Tensor, Tensor]) -> None:
        calls.append({"widths": (q.shape[-1], k.shape[-1], v.shape[-1])})
        assert lengths == tuple(int(x.diff().max()) for x in borders)
        assert all(x.stride(-1) == 1 and x.shape[-1] % 8 == 0 for x in (q, k, v))

    def third(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, *, softmax_scale, causal, window_size,
        deterministic,
    ):  # fmt: skip
        note(q, k, v, (max_seqlen_q, max_seqlen_k), (cu_seqlens_q, cu_seqlens_k))
        width, value_width = q.shape[-1], v.shape[-1]
        assert width == value_width or (width <= 64 and value_width <= 512) or (
            128 < width <= 192 and 96 < value_width <= 128
        )  # fmt: skip
        assert causal and not deterministic and window_size[1] == (0 if window_size[0] >= 0 else -1)
        return ragged(q, k, v, (cu_seqlens_q, cu_seqlens_k), softmax_scale, window_size[0])

    def fourth(
        q, k, v, qv=None, *, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal, window_size,
        deterministic,
    ):  # fmt: skip
        note(q, k, v, (max_seqlen_q, max_seqlen_k), (cu_seqlens_q, cu_seqlens_k))
        assert causal and not deterministic and qv is None
        left = -1 if window_size == (None, None) else window_size[0]
        return ragged(q, k, v, (cu_seqlens_q, cu_seqlens_k), softmax_scale, left), None

    for name, function in (("flash_attn_interface", third), ("flash_attn.cute", fourth)):
        module = types.ModuleType(name)
        module.flash_attn_varlen_func = function  # pyright: ignore[reportAttributeAccessIssue]
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setitem(sys.modules, "flash_attn", types.ModuleType("flash_attn"))
    return calls


@pytest.mark.parametrize("backend", [flash3, flash4])
@pytest.mark.parametrize("window", [0, 1, 5, 40])
@pytest.mark.parametrize(
    ("lengths", "history", "heads", "width", "value_width"),
    [
        ((40, 1, 23), (), (4, 2), 16, 16),
        ((40, 1, 23), (), (3, 3), 12, 20),
        ((40, 1, 23), (), (2, 2), 192, 128),
        ((17, 3, 44), (9,), (4, 1), 24, 8),
    ],
)
def test_packages_compute_as_the_definition(packages, backend, window, lengths, history, heads, width, value_width):
    documents, keys = Documents.packed([0, *accumulate(lengths)]), sum(lengths) + sum(history)
    sizes = ((sum(lengths), heads[0], width), (keys, heads[1], width), (keys, heads[1], value_width))
    q, k, v = (torch.randn(size, dtype=torch.float64).requires_grad_() for size in sizes)
    rows, results = query_rows(documents, history), []
    gradient = torch.randn(sum(lengths), heads[0], value_width, dtype=torch.float64)
    for attend in (backend.attend, OPERATOR.find_backends()["reference"].run):
        o = attend(q, k, v, rows, SCALE, window)
        results.append([o.detach(), *torch.autograd.grad(o, (q, k, v), gradient)])
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-11)


def test_values_of_latent_attention_are_not_padded(packages):
    rows = query_rows(Documents.packed([0, 3, 8]))
    q, k, v = torch.randn(8, 2, 192), torch.randn(8, 2, 192), torch.randn(8, 2, 128)
    for backend in (flash3, flash4):
        backend.attend(q, k, v, rows, SCALE, 0)
        assert packages.pop()["widths"] == (192, 192, 128)
    assert flash3.widths(96, 64) == (96, 96) and flash3.widths(62, 130) == (64, 136)


def test_rows_of_one_document_go_to_cudnn_unpadded_and_others_to_flash_attention(monkeypatch):
    seen: list[Any] = []
    sdpa = torch.nn.functional.scaled_dot_product_attention

    def watched(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        assert torch.backends.cuda.cudnn_sdp_enabled() and not torch.backends.cuda.flash_sdp_enabled()
        seen.append((q.shape, v.shape))
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            return sdpa(q, k, v, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    monkeypatch.setattr(varlen, "attend", lambda q, k, v, rows, *_: seen.append("varlen") or q.new_zeros(q.shape))
    q, k, v = (torch.randn(size, dtype=torch.float64) for size in ((20, 4, 21), (20, 2, 21), (20, 2, 12)))
    rows = query_rows(Documents.packed([0, 10, 20], 10))
    o = cudnn.attend(q, k, v, rows, SCALE, 0)
    torch.testing.assert_close(o, OPERATOR.find_backends()["reference"].run(q, k, v, rows, SCALE, 0))
    assert seen == [((2, 4, 10, 24), (2, 2, 10, 16))]
    cudnn.attend(q, k, v, query_rows(Documents.packed([0, 7, 10, 20], 10)), SCALE, 0)
    cudnn.attend(q[10:], k, v, query_rows(Documents.packed([0, 10], 10), (10,)), SCALE, 0)
    assert seen[1:] == ["varlen", "varlen"]


def chosen(name: str, capability: tuple[int, int], missing: frozenset[str] = frozenset(), window: int = 0):
    machine = Machine(capability, (3, 6), missing, deterministic=False)
    return decide(OPERATOR, name, attention.call(window, 128, "cuda", torch.bfloat16), machine)


def test_packages_run_where_they_are_named_installed_and_on_their_gpus():
    for name in ("flash3", "flash4"):
        assert chosen(name, HOPPER)[0] == chosen(name, HOPPER, window=9)[0] == name
        assert "its kernels are not for this GPU; use 'auto' or 'varlen'" in chosen(name, AMPERE)[1]
    assert not chosen("flash3", BLACKWELL)[0] and chosen("flash4", BLACKWELL)[0] == "flash4"
    assert "pip install --pre flash-attn-4" in chosen("flash4", HOPPER, frozenset(("flash_attn.cute",)))[1]
    assert chosen("cudnn", HOPPER)[0] == "cudnn" and not chosen("cudnn", HOPPER, window=9)[0]
    assert chosen("auto", HOPPER)[0] == "varlen", "the others wait to be measured"
    assert not _is_there("no_such_package.part") and not _is_there("torch.no_such_part") and _is_there("torch.nn")
