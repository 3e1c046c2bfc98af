"""Stand-ins for fla and mamba-ssm: their signatures and demands, computed by our definitions on the CPU.

A stand-in checks what the real kernel checks, or silently gets wrong, so that an adapter that forgets a conversion
fails here.
"""

import sys
import types

import torch
from torch import Tensor

from torchlinearmoe.kernels.reference.delta import delta_rule
from torchlinearmoe.kernels.reference.dplr import dplr_rule
from torchlinearmoe.kernels.reference.gsa import slot_attention
from torchlinearmoe.kernels.reference.linear import linear_recurrence


class FakeFla(types.ModuleType):
    """`fla.ops`, with the names of the functions called so far in `calls` and their arguments in `last`."""

    def __init__(self) -> None:
        super().__init__("fla.ops")
        self.calls: list[str] = []
        self.last: dict = {}

    def _states(self, name, tokens, initial_state, output_final_state, cu_seqlens, cu_seqlens_cpu) -> dict:
        self.calls.append(name)
        self.last = {**tokens, "cu_seqlens": cu_seqlens}
        for x in tokens.values():
            assert x.is_contiguous()
        assert tokens["k"].shape[-1] % 2 == 0 and tokens["v"].shape[-1] % 2 == 0
        for state in initial_state if isinstance(initial_state, tuple) else (initial_state,):
            assert state is None or (state.is_contiguous() and state.dtype != torch.bfloat16)
        if cu_seqlens is not None:
            assert cu_seqlens_cpu.device.type == "cpu" and torch.equal(cu_seqlens.cpu(), cu_seqlens_cpu)
            assert tokens["k"].shape[0] == 1 and bool((cu_seqlens.diff() > 0).all())
        return {"initial_state": initial_state, "output_final_state": output_final_state, "cu_seqlens": cu_seqlens}

    def chunk_simple_gla(
        self, q, k, v, g=None, g_gamma=None, scale=None, initial_state=None, output_final_state=False, cu_seqlens=None,
        cu_seqlens_cpu=None,
    ):  # fmt: skip
        assert g is None or g_gamma is None, "the kernel takes both and computes garbage"
        assert g_gamma is None or not (output_final_state or g_gamma.requires_grad), "NaN states, no gradient"
        assert q.shape == k.shape, "grouped heads give outputs of the wrong shape"
        tokens = {"q": q, "k": k, "v": v, **({} if g is None else {"g": g})}
        states = self._states("chunk_simple_gla", tokens, initial_state, output_final_state, cu_seqlens, cu_seqlens_cpu)
        return linear_recurrence(q, k, v, g if g_gamma is None else g_gamma, scale=scale, **states)

    def chunk_gla(
        self, q, k, v, g, scale=None, initial_state=None, output_final_state=False, cu_seqlens=None, cu_seqlens_cpu=None
    ):
        assert q.shape == k.shape == g.shape
        tokens = {"q": q, "k": k, "v": v, "g": g}
        states = self._states("chunk_gla", tokens, initial_state, output_final_state, cu_seqlens, cu_seqlens_cpu)
        return linear_recurrence(q, k, v, g, scale=scale, **states)

    def chunk_rwkv6(
        self, r, k, v, w, u, scale=None, initial_state=None, output_final_state=False, cu_seqlens=None,
        cu_seqlens_cpu=None,
    ):  # fmt: skip
        assert r.shape == k.shape == w.shape and u.shape == r.shape[2:]
        tokens = {"r": r, "k": k, "v": v, "w": w}
        states = self._states("chunk_rwkv6", tokens, initial_state, output_final_state, cu_seqlens, cu_seqlens_cpu)
        return linear_recurrence(r, k, v, w, bonus=u, scale=scale, **states)

    def chunk_delta_rule(
        self, q, k, v, beta, scale=None, initial_state=None, output_final_state=False, cu_seqlens=None,
        cu_seqlens_cpu=None,
    ):  # fmt: skip
        assert q.dtype == k.dtype == v.dtype != torch.float32, "refused"
        assert q.shape[2] == k.shape[2] == v.shape[2], "no grouped heads"
        tokens = {"q": q, "k": k, "v": v, "beta": beta}
        states = self._states("chunk_delta_rule", tokens, initial_state, output_final_state, cu_seqlens, cu_seqlens_cpu)
        return delta_rule(q, k, v, beta, scale=scale, **states)

    def chunk_gated_delta_rule(
        self, q, k, v, g, beta, scale=None, initial_state=None, output_final_state=False, cu_seqlens=None,
        cu_seqlens_cpu=None,
    ):  # fmt: skip
        tokens = {"q": q, "k": k, "v": v, "g": g, "beta": beta}
        states = self._states("gated_delta", tokens, initial_state, output_final_state, cu_seqlens, cu_seqlens_cpu)
        return delta_rule(q, k, v, beta, g, scale=scale, **states)

    def chunk_kda(
        self, q, k, v, g, beta, scale=None, initial_state=None, output_final_state=False, cu_seqlens=None,
        cu_seqlens_cpu=None,
    ):  # fmt: skip
        assert g.shape == (*v.shape[:3], k.shape[-1]) and beta.shape == v.shape[:3]
        assert q.dtype == torch.float64 or initial_state is None or initial_state.dtype == torch.float32, "asserted"
        tokens = {"q": q, "k": k, "v": v, "g": g, "beta": beta}
        states = self._states("chunk_kda", tokens, initial_state, output_final_state, cu_seqlens, cu_seqlens_cpu)
        return delta_rule(q, k, v, beta, g, scale=scale, **states)

    def chunk_rwkv7(
        self, r, w, k, v, a, b, scale=1.0, initial_state=None, output_final_state=False, cu_seqlens=None,
        cu_seqlens_cpu=None, lower_bound=None,
    ):  # fmt: skip
        assert lower_bound is None or bool((w >= lower_bound).all() and (w < 0).all()), "the caller's promise"
        assert r.shape == w.shape == k.shape == a.shape == b.shape
        tokens = {"r": r, "w": w, "k": k, "v": v, "a": a, "b": b}
        states = self._states("chunk_rwkv7", tokens, initial_state, output_final_state, cu_seqlens, cu_seqlens_cpu)
        self.last["lower_bound"] = lower_bound
        return dplr_rule(r, k, v, a, b, w, scale=scale, **states)

    def chunk_gsa(
        self, q, k, v, s, g, scale=None, initial_state=None, output_final_state=False, cu_seqlens=None,
        cu_seqlens_cpu=None,
    ):  # fmt: skip
        tokens = {"q": q, "k": k, "v": v, "s": s, "g": g}
        states = self._states("chunk_gsa", tokens, initial_state, output_final_state, cu_seqlens, cu_seqlens_cpu)
        return slot_attention(q, k, v, s, g, scale=scale, **states)


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
    groups = x.shape[2] // B.shape[2]
    q, k = C.repeat_interleave(groups, 2), B.repeat_interleave(groups, 2)
    cu_seqlens = None
    if seq_idx is not None:
        assert seq_idx.dtype == torch.int32 and seq_idx.shape == x.shape[:2]
        assert initial_states is None and not return_final_states, "one state a row, whatever the documents"
        lengths = torch.unique_consecutive(seq_idx[0], return_counts=True)[1]
        cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    y, final = linear_recurrence(
        q,
        k,
        x * dt.unsqueeze(-1),
        dt * A,
        scale=1.0,
        initial_state=None if initial_states is None else initial_states.mT,
        output_final_state=return_final_states,
        cu_seqlens=cu_seqlens,
    )
    return (y, final.mT) if final is not None else y
