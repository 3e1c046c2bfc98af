"""Stand-ins for fla and mamba-ssm: their signatures and demands, computed by our definitions on the CPU.

A stand-in checks what the real kernel checks, or silently gets wrong, so that an adapter that forgets a conversion
fails here. Tensors are [B, T, ...], documents of a single row by cu_seqlens.
"""

import sys
import types

import torch
from torch import Tensor

from torchlinearmoe.kernels.delta.definition import delta_rule
from torchlinearmoe.kernels.dplr.definition import dplr_rule
from torchlinearmoe.kernels.linear.definition import linear_recurrence
from torchlinearmoe.kernels.slots.definition import slot_attention
from torchlinearmoe.segments import Segments


class FakeFla(types.ModuleType):
    """`fla.ops`, with the names of the functions called so far in `calls` and their arguments in `last`."""

    def __init__(self) -> None:
        super().__init__("fla.ops")
        self.calls: list[str] = []
        self.last: dict = {}

    def _compute(
        self, name, definition, tokens, fixed, scale, initial_state, output_final_state, cu_seqlens, cu_seqlens_cpu
    ):
        """`definition` of flattened tokens, which stand in its order, and the rest of its arguments."""
        self.calls.append(name)
        given = {key: x for key, x in tokens.items() if x is not None}
        self.last = {**given, "cu_seqlens": cu_seqlens}
        for x in given.values():
            assert x.is_contiguous()
        assert tokens["k"].shape[-1] % 2 == 0 and tokens["v"].shape[-1] % 2 == 0
        states = initial_state if isinstance(initial_state, tuple) else (initial_state,)
        for state in states:
            assert state is None or (state.is_contiguous() and state.dtype != torch.bfloat16)
        B, T = tokens["k"].shape[:2]
        lengths = (T,) * B
        if cu_seqlens is not None:
            assert cu_seqlens_cpu.device.type == "cpu" and torch.equal(cu_seqlens.cpu(), cu_seqlens_cpu)
            assert B == 1 and bool((cu_seqlens.diff() > 0).all())
            lengths = tuple(cu_seqlens_cpu.diff().tolist())
        flat = [None if x is None else x.flatten(0, 1) for x in tokens.values()]
        segments = Segments.of_lengths(lengths)
        scale = tokens["k"].shape[-1] ** -0.5 if scale is None else scale
        o, final = definition(*flat, *fixed, scale, segments, initial_state, output_final_state)
        return o.unflatten(0, (B, T)), final

    def chunk_simple_gla(
        self, q, k, v, g=None, g_gamma=None, scale=None, initial_state=None, output_final_state=False, cu_seqlens=None,
        cu_seqlens_cpu=None,
    ):  # fmt: skip
        assert g is None or g_gamma is None, "the kernel takes both and computes garbage"
        assert g_gamma is None or not (output_final_state or g_gamma.requires_grad), "NaN states, no gradient"
        assert q.shape == k.shape, "grouped heads give outputs of the wrong shape"

        def definition(q, k, v, g, *rest):
            return linear_recurrence(q, k, v, g if g_gamma is None else g_gamma, None, *rest)

        tokens, states = {"q": q, "k": k, "v": v, "g": g}, (initial_state, output_final_state)
        return self._compute("chunk_simple_gla", definition, tokens, (), scale, *states, cu_seqlens, cu_seqlens_cpu)

    def chunk_gla(
        self, q, k, v, g, scale=None, initial_state=None, output_final_state=False, cu_seqlens=None,
        cu_seqlens_cpu=None,
    ):  # fmt: skip
        assert q.shape == k.shape == g.shape
        tokens, states = {"q": q, "k": k, "v": v, "g": g}, (initial_state, output_final_state)
        return self._compute(
            "chunk_gla", linear_recurrence, tokens, (None,), scale, *states, cu_seqlens, cu_seqlens_cpu
        )

    def chunk_rwkv6(
        self, r, k, v, w, u, scale=None, initial_state=None, output_final_state=False, cu_seqlens=None,
        cu_seqlens_cpu=None,
    ):  # fmt: skip
        assert r.shape == k.shape == w.shape and u.shape == r.shape[2:]
        tokens, states = {"r": r, "k": k, "v": v, "w": w}, (initial_state, output_final_state)
        return self._compute("chunk_rwkv6", linear_recurrence, tokens, (u,), scale, *states, cu_seqlens, cu_seqlens_cpu)

    def chunk_delta_rule(
        self, q, k, v, beta, scale=None, initial_state=None, output_final_state=False, cu_seqlens=None,
        cu_seqlens_cpu=None,
    ):  # fmt: skip
        assert q.dtype == k.dtype == v.dtype != torch.float32, "refused"
        assert q.shape[2] == k.shape[2] == v.shape[2], "no grouped heads"
        tokens, states = {"q": q, "k": k, "v": v, "beta": beta}, (initial_state, output_final_state)
        return self._compute(
            "chunk_delta_rule", delta_rule, tokens, (None,), scale, *states, cu_seqlens, cu_seqlens_cpu
        )

    def chunk_gated_delta_rule(
        self, q, k, v, g, beta, scale=None, initial_state=None, output_final_state=False, cu_seqlens=None,
        cu_seqlens_cpu=None,
    ):  # fmt: skip
        assert g.shape == beta.shape == v.shape[:3]
        tokens, states = {"q": q, "k": k, "v": v, "beta": beta, "g": g}, (initial_state, output_final_state)
        return self._compute("gated_delta", delta_rule, tokens, (), scale, *states, cu_seqlens, cu_seqlens_cpu)

    def chunk_kda(
        self, q, k, v, g, beta, scale=None, initial_state=None, output_final_state=False, cu_seqlens=None,
        cu_seqlens_cpu=None,
    ):  # fmt: skip
        assert g.shape == (*v.shape[:3], k.shape[-1]) and beta.shape == v.shape[:3]
        assert q.dtype == torch.float64 or initial_state is None or initial_state.dtype == torch.float32, "asserted"
        tokens, states = {"q": q, "k": k, "v": v, "beta": beta, "g": g}, (initial_state, output_final_state)
        return self._compute("chunk_kda", delta_rule, tokens, (), scale, *states, cu_seqlens, cu_seqlens_cpu)

    def chunk_rwkv7(
        self, r, w, k, v, a, b, scale=1.0, initial_state=None, output_final_state=False, cu_seqlens=None,
        cu_seqlens_cpu=None, lower_bound=None,
    ):  # fmt: skip
        assert lower_bound is None or bool((w >= lower_bound).all() and (w < 0).all()), "the caller's promise"
        assert r.shape == w.shape == k.shape == a.shape == b.shape
        tokens, states = {"r": r, "k": k, "v": v, "a": a, "b": b, "w": w}, (initial_state, output_final_state)
        found = self._compute("chunk_rwkv7", dplr_rule, tokens, (None,), scale, *states, cu_seqlens, cu_seqlens_cpu)
        self.last["lower_bound"] = lower_bound
        return found

    def chunk_gsa(
        self, q, k, v, s, g, scale=None, initial_state=None, output_final_state=False, cu_seqlens=None,
        cu_seqlens_cpu=None,
    ):  # fmt: skip
        tokens, states = {"q": q, "k": k, "v": v, "s": s, "g": g}, (initial_state, output_final_state)
        return self._compute("chunk_gsa", slot_attention, tokens, (), scale, *states, cu_seqlens, cu_seqlens_cpu)


def install_fla(monkeypatch) -> FakeFla:
    """Put the stand-in where `import fla.ops` finds it."""
    package = types.ModuleType("fla")
    package.__path__ = []
    ops = FakeFla()
    monkeypatch.setitem(sys.modules, "fla", package)
    monkeypatch.setitem(sys.modules, "fla.ops", ops)
    return ops


def fake_scan(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, chunk_size: int, *, initial_states=None, seq_idx=None,
    return_final_states=False,
):  # fmt: skip
    """mamba-ssm's `mamba_chunk_scan_combined`: states [rows, H, V, K], documents by `seq_idx`, no states with them."""
    assert chunk_size > 0 and all(part.is_contiguous() for part in (x, dt, B, C))
    rows, tokens = x.shape[:2]
    lengths = (tokens,) * rows
    if seq_idx is not None:
        assert seq_idx.dtype == torch.int32 and seq_idx.shape == x.shape[:2] and seq_idx.is_contiguous()
        assert initial_states is None and not return_final_states, "one state a row, whatever the documents"
        lengths = tuple(torch.unique_consecutive(seq_idx[0], return_counts=True)[1].tolist())
    assert initial_states is None or initial_states.is_contiguous()
    groups = x.shape[2] // B.shape[2]
    q, k, v, g = (
        part.flatten(0, 1)
        for part in (C.repeat_interleave(groups, 2), B.repeat_interleave(groups, 2), x * dt.unsqueeze(-1), dt * A)
    )
    initial = None if initial_states is None else initial_states.mT
    y, final = linear_recurrence(q, k, v, g, None, 1.0, Segments.of_lengths(lengths), initial, return_final_states)
    y = y.unflatten(0, (rows, tokens))
    return (y, final.mT) if final is not None else y
