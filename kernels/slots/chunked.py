"""Gated slot attention in two passes: the scores of every slot, then a linear recurrence read by their softmax.

The second pass, slot values under a decay per slot, is the linear recurrence with the slots as keys. The first is its
mirror image: its decay lies on what is read out, not on what is summed over. A query meets slot c with

    sum_{s <= t} (q_t k_s) w_sc a_(s+1)c ... a_tc        w: what a token writes into a slot, a: the slots' decays

so the scores q_t k_s are made once for all slots, and halving (see `halving.py`) splits the decay at a border between s
and t: a left block's writes carry theirs until the border, sums of a right block theirs since it.

Legend: H heads, M chunks, C tokens of a chunk, K/V key/value head dim, S slots, N segments.
"""

import torch
from torch import Tensor

from torchlinearmoe.kernels.chunked.blocks import blocks_below
from torchlinearmoe.kernels.chunked.channels import document_decays
from torchlinearmoe.kernels.chunked.decay import FLOOR, decay_factor, drop_negligible, shrink_negligible
from torchlinearmoe.kernels.chunked.layout import CHUNK_SIZE, Layout, layout_of, prepare
from torchlinearmoe.kernels.chunked.scan import scan_decay
from torchlinearmoe.kernels.linear.chunked import linear_recurrence
from torchlinearmoe.kernels.operator import Backend
from torchlinearmoe.kernels.slots.kinds import KINDS
from torchlinearmoe.precision import wide_type
from torchlinearmoe.segments import Segments


def slot_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    s: Tensor,
    log_decay: Tensor,
    scale: float,
    segments: Segments,
    initial_state: tuple[Tensor, Tensor] | None,
    want_final: bool,
) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    """As `definition.slot_attention`."""
    layout = layout_of(segments, CHUNK_SIZE, initial_state is not None or want_final)
    first_keys, first_values = (None, None) if initial_state is None else initial_state
    scores, keys = slot_scores(q, k, s, log_decay, first_keys, want_final, layout)
    weights = (scale * scores).softmax(-1).to(q.dtype)
    o, values = linear_recurrence(weights, s, v, log_decay, None, 1.0, segments, first_values, want_final)
    return o, None if keys is None or values is None else (keys, values)


def slot_scores(
    q: Tensor,
    k: Tensor,
    s: Tensor,
    log_decay: Tensor,
    initial_keys: Tensor | None,
    want_final: bool,
    layout: Layout,
) -> tuple[Tensor, Tensor | None]:
    """Every token's query times the slot keys after its write, [T, H, S] in fp32 (fp64), and the final slot keys."""
    dtype = wide_type(q.dtype)
    q_C, k_C, w_C, log_C = layout.split(q), layout.split(k), layout.split(s.to(dtype)), layout.split(log_decay)
    log_C = log_C.to(dtype)
    products = torch.matmul(q_C, k_C.transpose(-1, -2)) * layout.documents.same_MCC
    sums, prefix, w_out = halved_sums(products, w_C, decay_factor(log_C, dtype))
    if layout.edges is not None:
        prefix, _, suffix = document_decays(layout, log_C)
        w_out = w_C * suffix
    log_total = log_C.clamp(min=FLOOR).sum(-2)
    entered, final = _carry(layout, q_C, k_C, w_out, prefix, log_total, initial_keys, want_final)
    return layout.join(sums + entered), final


def halved_sums(products: Tensor, w: Tensor, a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """sum_{s <= t} products_ts w_s a_(s+1) ... a_t for every token t of a chunk.

    products: [..., C, C], read up to the diagonal; w: [..., C, S]; a: [..., C, S], decays in [0, 1]; C a power of two.
    Returns the sums, the decays since the chunk's start (a token's own included) and w decayed until the chunk's end,
    each [..., C, S].
    """
    sums = products.diagonal(dim1=-2, dim2=-1).unsqueeze(-1) * w
    blocks = tuple(x.unsqueeze(-2) for x in (sums.to(w.dtype), a, w))  # [..., C / size, size, S] each
    size = 1
    while size < products.shape[-1]:
        blocks = _merged(blocks_below(products, size), *(x.unflatten(-3, (-1, 2)) for x in blocks))
        size *= 2
    sums, since, until = (x.squeeze(-3) for x in blocks)
    return sums, since, until


def _merged(between: Tensor, sums: Tensor, since: Tensor, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Two neighbours become one: between [..., size, size]; the others [..., 2, size, S] -> [..., 2 size, S]."""
    sums_left, sums_right = sums.unbind(-3)
    since_left, since_right = since.unbind(-3)
    w_left, w_right = w.unbind(-3)
    passed = w_left.to(between.dtype)
    passed = between * passed if between.shape[-1] == 1 else torch.matmul(between, passed)
    return (
        torch.cat([sums_left, sums_right + since_right * passed], -2),
        torch.cat([since_left, drop_negligible(since_left[..., -1:, :] * since_right)], -2),
        torch.cat([shrink_negligible(w_left * since_right[..., -1:, :]), w_right], -2),
    )


def _carry(
    layout: Layout,
    q: Tensor,
    k: Tensor,
    w_out: Tensor,
    prefix: Tensor,
    log_total: Tensor,
    initial_keys: Tensor | None,
    want_final: bool,
) -> tuple[Tensor, Tensor | None]:
    """Products with the slot keys that enter the chunks, [1, H, M, C, S], and the final slot keys [N, H, K, S].

    q, k: [1, H, M, C, K]; w_out: writes decayed until their document leaves the chunk, and prefix: decays since it
    entered, [1, H, M, C, S]; log_total: [1, H, M, S]. Slot keys lie transposed inside, [..., S, K].
    """
    documents, edges = layout.documents, layout.edges
    read = prefix * documents.carried_MC.unsqueeze(-1)
    log_total = log_total.masked_fill(~documents.keep_M.unsqueeze(-1), -torch.inf)
    b = _written(w_out * documents.last_MC.unsqueeze(-1), k)
    start = None
    if initial_keys is not None:
        assert edges is not None
        start = initial_keys.transpose(-1, -2).transpose(0, 1).unsqueeze(0)  # [1, H, N, S, K]
        left = prefix.index_select(2, edges.start_chunk_N)[..., -1, :].unsqueeze(-1) * start
        b = b.index_add(2, edges.start_chunk_N, left * edges.leaves_start_N.view(-1, 1, 1))
    states = scan_decay(log_total.transpose(-1, -2), b.transpose(2, 3)).transpose(2, 3)
    entered = _products(q, states, read)
    if start is not None and edges is not None:
        q_N, prefix_N = (x.index_select(2, edges.start_chunk_N) for x in (q, prefix))
        first = _products(q_N, start, prefix_N * edges.in_start_NC.unsqueeze(-1))
        entered = entered.index_add(2, edges.start_chunk_N, first)
    if not want_final:
        return entered, None
    assert edges is not None
    w_N, k_N, prefix_N, states_N = (x.index_select(2, edges.end_chunk_N) for x in (w_out, k, prefix, states))
    start = torch.zeros_like(states_N) if start is None else start
    entering = torch.where(edges.crosses_N.view(-1, 1, 1), states_N, start)
    at_end = edges.end_position_N.view(-1, 1, 1).expand(*prefix_N.shape[:2], -1, 1, prefix_N.shape[-1])
    left = prefix_N.gather(-2, at_end).transpose(-1, -2) * entering
    final = left + _written(w_N * edges.in_end_NC.unsqueeze(-1), k_N)
    final = torch.where(edges.empty_N.view(-1, 1, 1), start, final)
    return entered, final.squeeze(0).transpose(0, 1).transpose(-1, -2)


def _written(w: Tensor, k: Tensor) -> Tensor:
    """sum over a chunk's tokens of w k^T, [..., S, K]."""
    return torch.matmul(w.to(k.dtype).transpose(-1, -2), k).to(w.dtype)


def _products(q: Tensor, states: Tensor, decay: Tensor) -> Tensor:
    """q [..., C, K] times slot keys [..., S, K], decayed, [..., C, S]."""
    return torch.matmul(q, states.to(q.dtype).transpose(-1, -2)) * decay


BACKEND = Backend("torch", slot_attention, KINDS, order=0, fused=True, prepare=prepare(CHUNK_SIZE))
