"""What passes between chunks: every family reads the entering state, writes a summary and leaves final states alike.

A family reduces its chunk to effective queries, keys and writes: a token of a document reads q_in^T E, where E is the
state with which its document entered the chunk (the scan's, or the initial state of a document that starts here), and
the document leaves the chunk with A E + k_out^T u, where A = diag(decay) for linear recurrences and
A = diag(decay) - k_out^T w for the delta rule. Where the state is changed along other vectors than the keys, the
document leaves with A E + k_out^T u + b_out^T x, and A = diag(decay) - b_out^T w.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from torchlinearmoe.kernels.chunked.decay import shrink_negligible
from torchlinearmoe.kernels.chunked.layout import Edges, Layout
from torchlinearmoe.kernels.chunked.scan import scan_decay, scan_dense


@dataclass(frozen=True)
class Chunks:
    """The effective queries, keys and writes of every chunk. P is 1 (one decay a head) or K."""

    q_in: Tensor
    """[B, H, M, C, K]: queries, decayed since their document entered the chunk."""
    k_out: Tensor
    """[B, H, M, C, K]: keys, decayed until their document leaves the chunk."""
    u: Tensor
    """[B, H, M, C, V]: what is written under the keys."""
    log_total: Tensor
    """[B, H or 1, M, P]: the log decay over a whole chunk."""
    w: Tensor | None = None
    """[B, H, M, C, K]: what the delta rule erases under the keys, per entering state."""
    prefix: Tensor | None = None
    """[B, H, M, C, P]: the decay since the document entered the chunk; None stands for 1. Read with packed states."""
    b_out: Tensor | None = None
    """[B, H, M, C, K]: the vectors under which `w` erases, decayed until their document leaves; None: the keys."""
    x: Tensor | None = None
    """[B, H, M, C, V]: what is written under `b_out`."""


def carry(
    layout: Layout, chunks: Chunks, initial_state: Tensor | None, want_final: bool
) -> tuple[Tensor, Tensor | None]:
    """Read the entering states: [B, H, M, C, V], and the final states [N, H, K, V] when wanted."""
    documents, edges = layout.documents, layout.edges
    last, carried = documents.last_MC.unsqueeze(-1), documents.carried_MC.unsqueeze(-1)
    k_write, q_read = chunks.k_out * last, chunks.q_in * carried
    b_write = None if chunks.b_out is None else chunks.b_out * last
    w = None if chunks.w is None else chunks.w * carried
    log_total = chunks.log_total.masked_fill(~documents.keep_M.unsqueeze(-1), -torch.inf)
    b = _written(k_write, b_write, chunks).to(chunks.log_total.dtype)
    s0 = None if initial_state is None else initial_state.transpose(0, 1).unsqueeze(0)
    if s0 is not None:
        assert edges is not None
        start = edges.start_chunk_N
        left = _through(_take(chunks, start, edges.in_start_NC), s0, layout.C - 1)
        b = b.index_add(2, start, left * edges.leaves_start_N.view(-1, 1, 1))
    states = _scan(log_total, k_write if b_write is None else b_write, w, b)
    o = torch.matmul(q_read, states.to(q_read.dtype))
    if s0 is not None and edges is not None:
        q_start = chunks.q_in.index_select(2, edges.start_chunk_N) * edges.in_start_NC.unsqueeze(-1)
        o = o.index_add(2, edges.start_chunk_N, torch.matmul(q_start, s0.to(q_start.dtype)))
    if not want_final:
        return o, None
    assert edges is not None
    return o, _final(chunks, edges, states, s0)


def _written(k_out: Tensor, b_out: Tensor | None, chunks: Chunks) -> Tensor:
    """What a chunk adds to the state, whatever entered."""
    written = torch.matmul(k_out.transpose(-1, -2), chunks.u)
    if b_out is None:
        return written
    assert chunks.x is not None
    return written + torch.matmul(b_out.transpose(-1, -2), chunks.x)


def _scan(log_total: Tensor, erase: Tensor, w: Tensor | None, b: Tensor) -> Tensor:
    """The states that enter the chunks."""
    K, V = b.shape[-2:]
    if w is not None:
        a = torch.diag_embed(log_total.exp().expand(*log_total.shape[:-1], K))
        a = a - torch.matmul(erase.to(w.dtype).transpose(-1, -2), w)
        return scan_dense(shrink_negligible(a), b)
    P = log_total.shape[-1]
    b = b.unflatten(-2, (P, K // P)).transpose(2, 3).flatten(-2)  # [1, H, P, M, Y]
    states = scan_decay(log_total.transpose(-1, -2), b)
    return states.transpose(2, 3).unflatten(-1, (K // P, V)).flatten(3, 4)


def _take(chunks: Chunks, chunk_N: Tensor, mask_NC: Tensor) -> Chunks:
    """The chunks `chunk_N`, with the keys of other documents removed."""

    def pick(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.index_select(2, chunk_N)

    k_out, u, q_in = (x.index_select(2, chunk_N) for x in (chunks.k_out, chunks.u, chunks.q_in))
    k_out, b_out = k_out * mask_NC.unsqueeze(-1), pick(chunks.b_out)
    b_out = None if b_out is None else b_out * mask_NC.unsqueeze(-1)
    return Chunks(q_in, k_out, u, chunks.log_total, pick(chunks.w), pick(chunks.prefix), b_out, pick(chunks.x))


def _through(taken: Chunks, state: Tensor, position: int | Tensor) -> Tensor:
    """A E for the taken chunks [B, H, N, K, V]: what is left of E after the token at `position`."""
    if taken.prefix is None:
        left = state
    elif isinstance(position, int):
        left = taken.prefix[:, :, :, position].unsqueeze(-1) * state
    else:
        documents = torch.arange(position.shape[0], device=position.device)
        left = taken.prefix[:, :, documents, position].unsqueeze(-1) * state
    if taken.w is None:
        return left
    erased = torch.matmul(taken.w, state)
    erase = taken.k_out if taken.b_out is None else taken.b_out
    return left - torch.matmul(erase.to(erased.dtype).transpose(-1, -2), erased)


def _final(chunks: Chunks, edges: Edges, states: Tensor, s0: Tensor | None) -> Tensor:
    taken = _take(chunks, edges.end_chunk_N, edges.in_end_NC)
    entering = states.index_select(2, edges.end_chunk_N)
    starts = torch.zeros_like(entering) if s0 is None else s0
    entering = torch.where(edges.crosses_N.view(-1, 1, 1), entering, starts)
    written = _written(taken.k_out, taken.b_out, taken).to(states.dtype)
    final = _through(taken, entering, edges.end_position_N) + written
    final = torch.where(edges.empty_N.view(-1, 1, 1), starts, final)
    return final.squeeze(0).transpose(0, 1)
