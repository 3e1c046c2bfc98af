"""Quadratic attention (Based, Rebased) in chunks, without ever holding the second-order features of all tokens.

Inside a chunk the score is the polynomial of q . k itself, and no features are made. Only what passes between chunks
is written and read through features, for a group of `GROUP` chunks at a time:

    1. b_m = phi(k_m)^T v_m                      what chunk m writes of the document that it ends with
    2. E_m = S + sum of b before m               what enters chunk m; nothing does across a border
    3. o_m = score(q_m k_m^T) v_m + phi(q_m) E_m
    4. S   = what leaves the group

Saved for the backward pass are q, k, v and one S a group; it goes over the groups from the last to the first and makes
the features of each once more. Since nothing decays, initial states are simply added to E, final ones are sums of b.

Legend: T tokens, H heads, M chunks, C tokens a chunk, K query/key width, F features, Y value columns (the ones
of a normaliser among them), N segments.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from torchlinearmoe.kernels.chunked.layout import Layout, layout_of, prepare
from torchlinearmoe.kernels.operator import Backend
from torchlinearmoe.kernels.quadratic.features import KINDS, QuadraticFeatures
from torchlinearmoe.precision import in_float32, wide_type
from torchlinearmoe.segments import Segments

CHUNK_SIZE = 128
"""Longer than for other recurrences: with 16 channels a state has 153 rows."""
GROUP = 32
"""Chunks whose features are held at once."""


def quadratic_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kind: str,
    scale: float,
    normalize: bool,
    eps: float,
    segments: Segments,
    initial_state: Tensor | None,
    want_final: bool,
    group: int = GROUP,
) -> tuple[Tensor, Tensor | None]:
    """As `definition.quadratic_attention`, the features of `group` chunks at a time."""
    if normalize:
        v = torch.cat([v, torch.ones_like(v[..., :1])], -1)
    o, final = quadratic_recurrence(q, k, v, kind, scale, segments, initial_state, want_final, group)
    if normalize:
        wide = in_float32(o)
        o = (wide[..., :-1] / (wide[..., -1:] + eps)).to(q.dtype)
    return o, final


def quadratic_recurrence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kind: str,
    scale: float,
    segments: Segments,
    initial_state: Tensor | None,
    want_final: bool,
    group: int,
) -> tuple[Tensor, Tensor | None]:
    """S_t = S_{t-1} + phi(k_t) v_t^T and o_t = S_t^T phi(q_t).

    q, k: [T, H, K]; v: [T, H, Y]; initial_state: [N, H, F, Y]. Returns o [T, H, Y] in v's dtype and the final
    states [N, H, F, Y] or None.
    """
    layout = layout_of(segments, CHUNK_SIZE, initial_state is not None or want_final)
    q_C, k_C, v_C = layout.split(q), layout.split(k), layout.split(v)
    documents, edges = layout.documents, layout.edges
    number_M = None if edges is None else _document_of_chunk(layout, segments.borders)
    place_M = (~documents.keep_M).cumsum(0)
    masks = (documents.same_MCC, documents.carried_MC, documents.last_MC, place_M, number_M)
    o, written = _Groups.apply(  # pyright: ignore[reportGeneralTypeIssues]
        q_C, k_C, v_C, initial_state, *masks, segments.count, kind, scale, group
    )
    if edges is None or number_M is None:
        return layout.join(o), None
    # What the groups left out: documents that start inside a chunk, and those that end there before another one.
    phi = QuadraticFeatures(kind, q.shape[-1], scale, q.device)
    if initial_state is not None:
        q_start = phi.features(q_C.index_select(2, edges.start_chunk_N)) * edges.in_start_NC.unsqueeze(-1)
        o = o.index_add(2, edges.start_chunk_N, torch.matmul(q_start, _heads_first(initial_state).to(q.dtype)))
    if not want_final:
        return layout.join(o), None
    ends_before_another = number_M[edges.end_chunk_N] != torch.arange(segments.count, device=q.device)
    k_end, v_end = (x.index_select(2, edges.end_chunk_N) for x in (k_C, v_C))
    v_end = v_end * (edges.in_end_NC & ends_before_another.unsqueeze(-1)).unsqueeze(-1)
    inside = torch.matmul(phi.features(k_end).transpose(-1, -2), v_end)
    final = written + inside.squeeze(0).transpose(0, 1).to(written.dtype)
    return layout.join(o), final if initial_state is None else final + initial_state


def _document_of_chunk(layout: Layout, borders: Tensor) -> Tensor:
    """int64 [M]: the document that each chunk ends with."""
    ends = torch.arange(1, layout.M + 1, device=borders.device) * layout.C - 1
    return torch.searchsorted(borders, ends.clamp(max=layout.T - 1).to(borders.dtype), right=True) - 1


def _heads_first(states: Tensor) -> Tensor:
    """[N, H, F, Y] -> [1, H, N, F, Y]."""
    return states.transpose(0, 1).unsqueeze(0)


@dataclass(frozen=True)
class _Group:
    """Some neighbouring chunks: [1, H, G, C, ...] of q, k and v and their share of the masks."""

    phi: QuadraticFeatures
    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor
    """[G, C, C]"""
    carried: Tensor
    """[G, C, 1]: tokens that read what enters the chunk."""
    last: Tensor
    """[G, C, 1]: tokens that write what leaves it."""
    survives: Tensor
    """[G + 1, G + 1]: row m, what enters chunk m (row G: what leaves the group); column 0, S; column j + 1, b_j."""
    before: Tensor | None
    """int64 [G] with states: the document that the chunk before ends with."""
    number: Tensor | None
    """int64 [G] with states: the document that the chunk ends with."""

    def key_features(self) -> Tensor:
        return self.phi.features(self.k) * self.last

    def query_features(self) -> Tensor:
        return self.phi.features(self.q) * self.carried

    def entering(self, key_features: Tensor, state: Tensor, initial: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """E [1, H, G, F, Y], what leaves the group [1, H, F, Y], b [1, H, G, F, Y]."""
        b = torch.matmul(key_features.transpose(-1, -2), self.v).to(state.dtype)
        stacked = torch.cat([state.unsqueeze(2), b], 2).flatten(-2)
        E = torch.matmul(self.survives, stacked).unflatten(-1, state.shape[-2:])
        E, after = E[:, :, :-1], E[:, :, -1]
        if initial is not None:
            E = E + _heads_first(initial[self.before])
        return E, after, b


def _groups(phi, q, k, v, mask, carried, last, place, number, size: int) -> list[_Group]:
    """Cut the arguments of `_Groups` into groups of `size` chunks."""
    groups, dtype = [], wide_type(q.dtype)
    for first in range(0, q.shape[2], size):
        g = slice(first, min(first + size, q.shape[2]))
        count = g.stop - first
        survives = torch.ones(count + 1, count + 1, device=q.device, dtype=dtype).tril()
        ends_with = torch.cat([place[max(first - 1, 0)].unsqueeze(0), place[g]])
        survives = survives * (ends_with.unsqueeze(0) == ends_with.unsqueeze(1))
        before = None
        if number is not None:
            before = torch.cat([number[max(first - 1, 0)].unsqueeze(0), number[first : g.stop - 1]])
        groups.append(
            _Group(
                phi,
                q[:, :, g],
                k[:, :, g],
                v[:, :, g],
                mask[g],
                carried[g].unsqueeze(-1),
                last[g].unsqueeze(-1),
                survives,
                before,
                None if number is None else number[g],
            )
        )
    return groups


class _Groups(torch.autograd.Function):
    """(q, k, v [1, H, M, C, ...], initial, ...) -> o [1, H, M, C, Y] and what was written, [N, H, F, Y].

    mask: [M, C, C]; carried, last: [M, C]; place: [M], the same for chunks that end with the same document. With states
    `number` [M] and the `count` of documents are given: `initial` reaches carried tokens only, and `written` leaves out
    documents that do not end their chunk. Without states `written` is empty.
    """

    @staticmethod
    def forward(ctx, q, k, v, initial, mask, carried, last, place, number, count, kind, scale, size):
        phi = QuadraticFeatures(kind, q.shape[-1], scale, q.device)
        state = torch.zeros(*q.shape[:2], phi.count, v.shape[-1], device=q.device, dtype=wide_type(q.dtype))
        written = state.new_zeros(0 if number is None else count, *state.shape[1:])
        outputs, entered = [], []
        for group in _groups(phi, q, k, v, mask, carried, last, place, number, size):
            entered.append(state)
            E, state, b = group.entering(group.key_features(), state, initial)
            if group.number is not None:
                written.index_add_(0, group.number, b.squeeze(0).transpose(0, 1))
            scores = phi.score(torch.matmul(group.q, group.k.transpose(-1, -2))) * group.mask
            inside = torch.matmul(scores.to(v.dtype), group.v)
            outputs.append(inside.add_(torch.matmul(group.query_features(), E.to(q.dtype))))
        ctx.save_for_backward(q, k, v, initial, mask, carried, last, place, number, torch.stack(entered))
        ctx.kind, ctx.scale, ctx.size = kind, scale, size
        return torch.cat(outputs, 2), written

    @staticmethod
    def backward(ctx, d_o, d_written):  # pyright: ignore[reportIncompatibleMethodOverride]
        q, k, v, initial, mask, carried, last, place, number, entered = ctx.saved_tensors
        phi = QuadraticFeatures(ctx.kind, q.shape[-1], ctx.scale, q.device)
        d_state = torch.zeros_like(entered[0])
        d_initial = None if initial is None else torch.zeros_like(initial)
        d_q, d_k, d_v = [], [], []
        groups = _groups(phi, q, k, v, mask, carried, last, place, number, ctx.size)
        for index in range(len(groups) - 1, -1, -1):
            group, g = groups[index], slice(index * ctx.size, (index + 1) * ctx.size)
            d_out, low = d_o[:, :, g], q.dtype
            key_features, query_features = group.key_features(), group.query_features()
            E, _, _ = group.entering(key_features, entered[index], initial)
            d_E = torch.matmul(query_features.transpose(-1, -2), d_out).to(E.dtype)
            if d_initial is not None and group.before is not None:
                d_initial.index_add_(0, group.before, d_E.squeeze(0).transpose(0, 1))
            d_stacked = torch.matmul(group.survives.t(), torch.cat([d_E, d_state.unsqueeze(2)], 2).flatten(-2))
            d_stacked = d_stacked.unflatten(-1, d_state.shape[-2:])
            d_state, d_b = d_stacked[:, :, 0], d_stacked[:, :, 1:]
            if group.number is not None:
                d_b = d_b + _heads_first(d_written[group.number])
            d_b = d_b.to(low)
            d_query = torch.matmul(d_out, E.to(low).transpose(-1, -2))
            d_query = d_query * group.carried
            d_key = torch.matmul(group.v, d_b.transpose(-1, -2))
            d_key = d_key * group.last
            products = torch.matmul(group.q, group.k.transpose(-1, -2))
            scores = (phi.score(products) * group.mask).to(low)
            d_products = torch.matmul(d_out, group.v.transpose(-1, -2)) * (phi.slope(products) * group.mask)
            d_products = d_products.to(low)
            d_v.append(torch.matmul(key_features, d_b) + torch.matmul(scores.transpose(-1, -2), d_out))
            d_q.append(phi.gradient(group.q, d_query).to(low) + torch.matmul(d_products, group.k))
            d_k.append(phi.gradient(group.k, d_key).to(low) + torch.matmul(d_products.transpose(-1, -2), group.q))
        d_q, d_k, d_v = (torch.cat(parts[::-1], 2) for parts in (d_q, d_k, d_v))
        return d_q, d_k, d_v, d_initial, *(None,) * 9


BACKEND = Backend("torch", quadratic_attention, KINDS, order=0, fused=True, prepare=prepare(CHUNK_SIZE))
