"""The linear recurrence without a decay, with one per head, or one per token and head, by our Triton kernels.

States are kept for every chunk of 64 tokens while a pass runs, and made again in the backward pass. Matrix products
take the type of the inputs, float32 without TF32, and add up in float32.

Legend: B rows, T tokens of all rows, H heads, K/V key/value head dim, N documents, M chunks.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from torchlinearmoe.kernels.backends.borders import find_borders
from torchlinearmoe.kernels.backends.call import States, outside_graphs
from torchlinearmoe.kernels.fused import scalar_kernels
from torchlinearmoe.kernels.fused.chunks import CHUNK, ChunkTable, chunk_table

LARGEST_TILE = 64
kernels: Any = scalar_kernels  # Triton turns numbers into its own constants


@outside_graphs
def linear_recurrence(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, scale: float, states: States
) -> tuple[Tensor, Tensor | None]:
    """`reference.linear.linear_recurrence` for log_decay None, [H] or [B, T, H]; `states` fp32."""
    B, T, H, _ = q.shape
    borders = find_borders(states)
    table = chunk_table((T,) * B if borders is None else borders.lengths, q.device)
    flat = [x.to(q.dtype).flatten(0, 1).contiguous() for x in (q, k, v)]
    decay = None if log_decay is None else log_decay.float().expand(B, T, H).flatten(0, 1).contiguous()
    initial = states.initial
    if initial is not None:
        initial = (initial if borders is None else borders.select(initial)).float().contiguous()
    o, final = _Recurrence.apply(*flat, decay, initial, scale, states.want_final, table)  # pyright: ignore
    if states.want_final and borders is not None:
        final = borders.restore(final, states.initial)
    return o.unflatten(0, (B, T)), final if states.want_final else None


class _Recurrence(torch.autograd.Function):
    """q, k: [T, H, K]; v: [T, H, V]; g: [T, H] or None, initial: [N, H, K, V] or None, both fp32."""

    @staticmethod
    def forward(ctx: Any, q, k, v, g, initial, scale, want_final, table):
        sizes = _Sizes(q, v, table)
        states, final = sizes.enter(k, v, g, initial, want_final)
        o = torch.empty_like(v)
        kernels.read_chunks[sizes.grid_v](
            q, k, v, _given(g, q), states, o, table.start_M, table.end_M, scale, *sizes.dims, **sizes.tiles,
            HAS_G=g is not None,
        )  # fmt: skip
        ctx.save_for_backward(q, k, v, g, initial)
        ctx.scale, ctx.table = scale, table
        ctx.set_materialize_grads(False)
        return o, final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do, dfinal):
        q, k, v, g, initial = ctx.saved_tensors
        table, scale = ctx.table, ctx.scale
        sizes = _Sizes(q, v, table)
        do = torch.zeros_like(v) if do is None else do.to(v.dtype).contiguous()
        states, _ = sizes.enter(k, v, g, initial, False)
        dstates = torch.empty_like(states)
        dinitial = None if initial is None else torch.empty_like(initial)
        kernels.leave_chunks[sizes.grid_state](
            q, do, _given(g, q), do if dfinal is None else dfinal.float().contiguous(), dstates,
            dstates if dinitial is None else dinitial, table.start_M, table.end_M, table.first_N1, scale,
            *sizes.dims, **sizes.tiles, HAS_G=g is not None, HAS_FINAL=dfinal is not None,
            WANT_INITIAL=dinitial is not None,
        )  # fmt: skip
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        kernels.query_key_gradients[sizes.grid_k](
            q, k, v, do, _given(g, q), states, dstates, dq, dk, table.start_M, table.end_M, scale,
            *sizes.dims, **sizes.tiles, HAS_G=g is not None,
        )  # fmt: skip
        kernels.value_gradients[sizes.grid_v](
            q, k, do, _given(g, q), dstates, dv, table.start_M, table.end_M, scale, *sizes.dims, **sizes.tiles,
            HAS_G=g is not None,
        )  # fmt: skip
        dg = None
        if g is not None and ctx.needs_input_grad[3]:
            dg = torch.empty_like(g)
            kernels.decay_gradients[(sizes.heads, table.chunks)](
                q, k, v, do, g, states, dstates, dg, table.start_M, table.end_M, scale, *sizes.dims, **sizes.tiles
            )
        return dq, dk, dv, dg, dinitial, None, None, None


class _Sizes:
    """Grids and tiles of a call."""

    def __init__(self, q: Tensor, v: Tensor, table: ChunkTable) -> None:
        self.table = table
        self.heads, self.K, self.V = q.shape[1], q.shape[2], v.shape[2]
        BK, BV = (max(16, min(LARGEST_TILE, 1 << (width - 1).bit_length())) for width in (self.K, self.V))
        precision = "ieee" if q.dtype == torch.float32 else "tf32"  # of float32 only
        self.dims = self.heads, self.K, self.V
        self.tiles = {"C": CHUNK, "BK": BK, "BV": BV, "PRECISION": precision, "num_warps": 4}
        over_k, over_v = -(-self.K // BK), -(-self.V // BV)
        self.grid_state = over_k * over_v, self.heads, table.documents
        self.grid_k = over_k, self.heads, table.chunks
        self.grid_v = over_v, self.heads, table.chunks

    def enter(
        self, k: Tensor, v: Tensor, g: Tensor | None, initial: Tensor | None, want_final: bool
    ) -> tuple[Tensor, Tensor | None]:
        """The states that enter the chunks, [M, H, K, V] in fp32, and the final ones of the documents."""
        table = self.table
        states = k.new_empty(table.chunks, *self.dims, dtype=torch.float32)
        final = k.new_empty(table.documents, *self.dims, dtype=torch.float32) if want_final else None
        kernels.enter_chunks[self.grid_state](
            k, v, _given(g, k), _given(initial, k), states, _given(final, k),
            table.start_M, table.end_M, table.first_N1, *self.dims, **self.tiles,
            HAS_G=g is not None, HAS_INITIAL=initial is not None, WANT_FINAL=want_final,
        )  # fmt: skip
        return states, final


def _given(x: Tensor | None, other: Tensor) -> Tensor:
    """A kernel's pointer; one that it does not use where there is none."""
    return other if x is None else x
