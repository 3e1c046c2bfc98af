"""What packed and cached attention must not see, tokens that see one key only, and the choice between backends."""

from __future__ import annotations

from itertools import accumulate

import pytest
import torch
from torch import Tensor

from torchlinearmoe.documents import Documents
from torchlinearmoe.errors import UserError
from torchlinearmoe.kernels import attention
from torchlinearmoe.kernels.attention import OPERATOR, packed_attention, seen_pairs, varlen
from torchlinearmoe.kernels.cached_attention import cached_attention
from torchlinearmoe.kernels.choose import Machine, choose, decide

SCALE = 0.31
MACHINE = Machine((9, 0), (3, 6), frozenset(), deterministic=False)


def _packed(lengths: tuple[int, ...], row: int, window: int, backend: str) -> list[Tensor]:
    """The output and the gradients of q, k and v."""
    documents = Documents.packed([0, *accumulate(lengths)], row)
    generator = torch.Generator().manual_seed(3)
    qkv = [torch.randn(sum(lengths), heads, 6, generator=generator, dtype=torch.float64) for heads in (4, 2, 2)]
    qkv = [x.requires_grad_() for x in qkv]
    q, k, v = qkv
    o = packed_attention(q, k, v, documents, scale=SCALE, window=window, backend=backend)
    return [o.detach(), *torch.autograd.grad(o, qkv, torch.randn(o.shape, generator=generator, dtype=torch.float64))]


@pytest.mark.parametrize(
    ("lengths", "row", "window"), [((1,), 1, 0), ((1, 1, 1), 3, 0), ((1, 1), 1, 2), ((7, 1, 8), 8, 1), ((8, 8), 8, 100)]
)
def test_a_token_that_sees_itself_alone_is_its_value_and_a_wide_window_is_none(lengths, row: int, window: int):
    actual, expected = _packed(lengths, row, window, "sdpa"), _packed(lengths, row, window % 100, "reference")
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


def test_what_lies_behind_a_sequences_own_tokens_in_a_cache_is_not_seen():
    starts, new, room = torch.tensor([0, 3, 5])[:, None], 2, 9
    q, k, v = (torch.randn(3, tokens, heads, 6) for tokens, heads in ((new, 4), (room, 2), (room, 2)))
    positions = starts + torch.arange(new)
    expected = cached_attention(q, k, v, positions, SCALE)
    behind = (torch.arange(room) >= starts + new)[:, :, None, None]
    actual = cached_attention(q, k.masked_fill(behind, 1e3), v.masked_fill(behind, 1e3), positions, SCALE)
    torch.testing.assert_close(actual, expected)


def _chosen(requested: str, device: str, dtype: torch.dtype, window: int = 0) -> tuple[str, str]:
    return decide(OPERATOR, requested, attention.call(window, 64, device, dtype), MACHINE)


def test_auto_takes_flash_attention_in_half_precision_on_gpus_and_sdpa_elsewhere():
    half = torch.bfloat16
    assert _chosen("auto", "cpu", half)[0] == "sdpa"
    assert _chosen("auto", "cuda", half)[0] == "varlen"
    assert _chosen("auto", "cuda", torch.float32)[0] == _chosen("auto", "cuda", torch.float32, 8)[0] == "sdpa"
    assert _chosen("flex", "cuda", torch.float32)[0] == "flex"


def test_a_torch_without_windows_in_varlen_takes_flex(monkeypatch):
    half = torch.bfloat16
    monkeypatch.setattr(varlen, "parameters", lambda: frozenset(("window_size",)))
    assert _chosen("auto", "cuda", half, 8)[0] == "varlen"
    monkeypatch.setattr(varlen, "parameters", frozenset)
    assert _chosen("auto", "cuda", half, 8)[0] == "flex"
    assert _chosen("auto", "cuda", half)[0] == _chosen("varlen", "cuda", half)[0] == "varlen"
    name, refusal = _chosen("varlen", "cuda", half, 8)
    assert not name and "this torch has it without windows; use 'auto' or 'flex'" in refusal


@pytest.mark.parametrize(
    ("backend", "dtype"), [("varlen", torch.bfloat16), ("flex", torch.float32), ("flash", torch.float32)]
)
def test_a_backend_that_cannot_run_here_is_refused_by_the_recipes_key(backend: str, dtype: torch.dtype):
    with pytest.raises(UserError, match=f"^model.attention_backend = '{backend}': "):
        choose(OPERATOR, backend, attention.call(0, 64, "cpu", dtype))
    assert not _chosen("varlen", "cuda", torch.float32)[0]


@pytest.mark.parametrize(("length", "window"), [(1, 0), (7, 0), (7, 3), (3, 7), (5, 1)])
def test_seen_pairs_are_counted(length: int, window: int):
    counted = sum(1 for t in range(length) for s in range(t + 1) if not window or s > t - window)
    assert seen_pairs(length, window) == counted
