"""Keeping experts (and memories) evenly loaded: the balance loss, the z-loss, and the loss-free selection bias.

Balance loss (Fedus et al. 2021, Switch Transformer, arXiv 2101.03961, eq. 4, for top-k):

    L = E * sum_i f_i P_i      f_i = assignments to expert i / (tokens * k)     P_i = mean probability of expert i

which is 1 under perfect balance; f is a count, so gradients flow through P. Its scope says over which tokens f and P
are taken: each packed sequence by itself, averaged over the sequences, or the whole optimizer step (Qiu et al. 2025,
arXiv 2501.11873). z-loss (Zoph et al. 2022, ST-MoE, arXiv 2202.08906): the token mean of logsumexp(logits)^2.

Every loss here carries its whole normalisation (totals of the step), so micro-batches and ranks simply add up, and is
attached to an activation: it never travels to the trainer, and its gradient needs no other path than the model's own.

Padding counts nowhere: tokens are those that count, `counted_T` says which. A sequence of nothing else has loss zero.

T local tokens, k experts a token, E experts, S packed sequences, L their length.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from torchlinearmoe.module import Module
from torchlinearmoe.moe.router import Router, Routing
from torchlinearmoe.moe.totals import StepTotals

Losses = tuple[Tensor | None, Tensor | None]
"""The balance loss and the z-loss of a layer, 0-dim; None for one that is not in use: it costs no launch."""


class _AttachLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, loss):
        ctx.loss_dtype = loss.dtype
        return x.view_as(x)

    @staticmethod
    def backward(ctx, *grads):
        (grad,) = grads
        return grad, grad.new_ones((), dtype=ctx.loss_dtype)


def attach_loss(x: Tensor, loss: Tensor) -> Tensor:
    """Return x unchanged; backward through it adds exactly d loss (factor 1) to the gradients. loss: 0-dim."""
    return _AttachLoss.apply(x, loss)  # type: ignore[return-value]


def count_assignments(topk_ids_Tk: Tensor, num_experts: int, counted_T: Tensor | None = None) -> Tensor:
    """Assignments to each expert, int64 [E]; no host synchronisation. counted_T: bool [T], None for all."""
    ids_A = topk_ids_Tk.flatten()
    one_A = torch.ones_like(ids_A) if counted_T is None else counted_T.long().repeat_interleave(topk_ids_Tk.shape[1])
    return torch.zeros(num_experts, dtype=torch.int64, device=ids_A.device).scatter_add_(0, ids_A, one_A)


def z_loss(logits_TE: Tensor, total_tokens: int | Tensor, counted_T: Tensor | None = None) -> Tensor:
    """sum_t logsumexp(logits_t)^2 / total_tokens."""
    squares_T = logits_TE.logsumexp(-1).square()
    if counted_T is not None:
        squares_T = torch.where(counted_T, squares_T, 0)
    return (squares_T.sum() / total_tokens).to(logits_TE.dtype)


@dataclass(frozen=True)
class TokenLayout:
    """Which part of the packed sequences the local stream is; the default is all of it.

    A stream is rows of `row_length` tokens. Context parallelism cuts every row into `row_parts` spans, one a rank
    (`row_length` is then the span's). Tensor parallelism cuts the stream so obtained into `stream_parts` equal
    contiguous parts, of which this rank holds number `stream_part`, wherever in a row that falls.
    """

    group: ProcessGroup | None = None
    """Scope "sequence": the row_parts * stream_parts ranks that share the same sequences. Scope "global": all ranks
    whose tokens make up a step. None: this process alone."""
    row_parts: int = 1
    stream_parts: int = 1
    stream_part: int = 0
    rows: ProcessGroup | None = None
    """The row_parts * stream_parts ranks that share the same sequences, whatever the scope; None: this process alone.
    Their order is that of spans, and within a span that of its stream's parts."""

    def own(self, x_T: Tensor) -> Tensor:
        """This rank's part of something that a stream has for each token, [stream_parts * T, ...] -> [T, ...]."""
        return x_T.chunk(self.stream_parts)[self.stream_part]

    def gather(self, x_T: Tensor, row_length: int) -> Tensor:
        """What all ranks of `rows` have for their tokens, in the order of whole rows; every one of them calls.

        [T, ...] -> [row_parts * stream_parts * T, ...]. row_length: of this rank's stream, a span's.
        """
        if self.rows is None:
            return x_T
        parts = [torch.empty_like(x_T) for _ in range(self.rows.size())]
        dist.all_gather(parts, x_T.contiguous(), group=self.rows)
        return torch.cat(parts).unflatten(0, (self.row_parts, -1, row_length)).transpose(0, 1).flatten(0, 2)

    def own_of_rows(self, x: Tensor, row_length: int) -> Tensor:
        """The inverse: this rank's part of what whole rows have for each token."""
        if self.rows is None:
            return x
        span = self.rows.rank() // self.stream_parts
        return self.own(x.unflatten(0, (-1, self.row_parts, row_length))[:, span].flatten(0, 1))


def _sum_rows(values_TE: Tensor, row_length: int, parts: int, part: int) -> Tensor:
    """Sums over the local tokens of each row of the uncut stream: [T, E] -> [S, E], zero where no token is local.

    The local tokens are number `part` of `parts` of the stream. Tokens 4..7 of a stream of rows of 3, 12 tokens:
    row = token // 3

        token    . . . . 4 5 6 7 . . . .        padded to whole rows  [_ 4 5] [6 7 _]   rows 1 and 2 of 4
    """
    T, E = values_TE.shape
    start = part * T
    first, end = start // row_length, -(-(start + T) // row_length)
    rows = parts * T // row_length
    whole_TE = F.pad(values_TE, (0, 0, start - first * row_length, end * row_length - start - T))
    return F.pad(whole_TE.view(end - first, row_length, E).sum(1), (0, 0, first, rows - end))


def count_rows(
    topk_ids_Tk: Tensor, probs_TE: Tensor, counted_T: Tensor | None, row_length: int, parts: int, part: int
) -> Tensor:
    """Local assignments of each row to each expert, [S, E] in the probabilities' type."""
    with torch.no_grad():  # a decorator around it would be what is compiled
        chosen_TE = torch.zeros_like(probs_TE).scatter_(1, topk_ids_Tk, 1.0)
        if counted_T is not None:
            chosen_TE = chosen_TE * counted_T.unsqueeze(1)
        return _sum_rows(chosen_TE, row_length, parts, part)


def weigh_rows(counts_SE: Tensor, probs_TE: Tensor, row_length: int, parts: int, part: int) -> Tensor:
    """Sum over rows and experts of the counts times the local probabilities, 0-dim."""
    return (counts_SE * _sum_rows(probs_TE, row_length, parts, part)).sum()


def sequence_balance_loss(
    topk_ids_Tk: Tensor,
    probs_TE: Tensor,
    row_length: int,
    total_sequences: int,
    layout: TokenLayout | None = None,
    *,
    counted_T: Tensor | None = None,
    coefficient: float = 1.0,
    count: Callable[..., Tensor] = count_rows,
    weigh: Callable[..., Tensor] = weigh_rows,
) -> Tensor:
    """`coefficient` times the sum over the sequences of E * sum_i f_i P_i, over `total_sequences`: this rank's share.

    Shares of all micro-batches and ranks add up to the mean over the sequences. Counts are summed over
    `layout.group` (no gradient flows through them); probabilities stay local. `count` and `weigh` are its two halves,
    compiled ones perhaps. counted_T: bool [T], False for padding, whose probabilities are zero.
    Raises ValueError when the stream is not whole rows.
    """
    layout = layout or TokenLayout()
    T, E = probs_TE.shape
    if T * layout.stream_parts % row_length:
        raise ValueError(f"row_length = {row_length}: must divide the stream of {T * layout.stream_parts} tokens")
    place = (row_length, layout.stream_parts, layout.stream_part)
    counts_SE = count(topk_ids_Tk, probs_TE.detach(), counted_T, *place)
    if layout.group is not None:
        dist.all_reduce(counts_SE, group=layout.group)
    length = row_length * layout.row_parts
    scale = coefficient * E / (length * topk_ids_Tk.shape[1] * length * total_sequences)
    if counted_T is not None:  # f and P of a row are means over its n tokens, of which the counts tell k n
        counts_SE = counts_SE * (length * topk_ids_Tk.shape[1] / counts_SE.sum(1, keepdim=True).clamp(min=1)).square()
    return weigh(counts_SE * scale, probs_TE, *place)  # of counts, which have no gradient, rather than of the sum


def global_balance_loss(counts_E: Tensor, probs_TE: Tensor, top_k: int, total_tokens: int | Tensor) -> Tensor:
    """E * sum_i f_i P_i over the step: this rank's share. counts_E: assignments of all `total_tokens` tokens."""
    fractions_E = counts_E.to(probs_TE.dtype) / (total_tokens * top_k)
    return (counts_E.shape[0] * (fractions_E * probs_TE.sum(0)).sum() / total_tokens).to(probs_TE.dtype)


class Balance(Module):
    """The auxiliary losses of one layer: which, how much, and the counts the global scope needs.

    kind: "loss" adds the balance loss; "bias" and "none" do not. `z_loss_coefficient` counts under every kind.
    `layout` is set by whoever spreads the model.
    """

    regions = ("count_rows", "weigh_rows")

    def __init__(
        self,
        num_experts: int,
        *,
        kind: str = "loss",
        coefficient: float = 0.0,
        scope: str = "sequence",
        z_loss_coefficient: float = 0.0,
    ):
        super().__init__()
        if kind not in ("loss", "bias", "none"):
            raise ValueError(f"moe.balance = {kind!r}: must be one of loss, bias, none")
        if scope not in ("sequence", "global"):
            raise ValueError(f"moe.balance_scope = {scope!r}: must be one of sequence, global")
        self.coefficient = coefficient if kind == "loss" else 0.0
        self.scope = scope
        self.z_loss_coefficient = z_loss_coefficient
        self.layout = TokenLayout()
        self.count_rows, self.weigh_rows = count_rows, weigh_rows
        self.counting = False
        self.has_global_counts = False
        self.register_buffer("global_counts_E", torch.zeros(num_experts, dtype=torch.int64), persistent=False)

    global_counts_E: Tensor

    def reset_buffers(self) -> None:
        """Forget the counts of the last step."""
        self.set_global_counts(None)

    def set_global_counts(self, counts_E: Tensor | None) -> None:
        """Hand in the whole step's assignments, integer [E], over all micro-batches and ranks; None forgets them."""
        self.has_global_counts = counts_E is not None
        self.global_counts_E.copy_(torch.zeros_like(self.global_counts_E) if counts_E is None else counts_E)

    def forward(
        self, routing: Routing, totals: StepTotals, row_length: int | None, counted_T: Tensor | None = None
    ) -> Losses | None:
        """This micro-batch's losses, weighted and normalised; None when neither is in use.

        counted_T: bool [T], False for padding, whose probabilities are zero.
        Raises ValueError when the global scope has to know other micro-batches and nobody counted them.
        """
        if not self.coefficient and not self.z_loss_coefficient:
            return None
        balance, z = None, None
        if self.coefficient and self.scope == "sequence":
            if row_length is None:
                raise ValueError("moe.balance_scope = 'sequence' needs row_length, the tokens of a packed sequence")
            balance = sequence_balance_loss(
                routing.topk_ids_Tk,
                routing.probs_TE,
                row_length,
                totals.sequences,
                self.layout,
                counted_T=counted_T,
                coefficient=self.coefficient,
                count=self.count_rows,
                weigh=self.weigh_rows,
            )
        elif self.coefficient:
            balance = self.coefficient * global_balance_loss(
                self._step_counts(routing, totals, counted_T),
                routing.probs_TE,
                routing.topk_ids_Tk.shape[1],
                totals.counted,
            )
        if self.z_loss_coefficient:
            z = self.z_loss_coefficient * z_loss(routing.logits_TE, totals.counted, counted_T)
        return balance, z

    @torch.no_grad()
    def _step_counts(self, routing: Routing, totals: StepTotals, counted_T: Tensor | None) -> Tensor:
        if self.has_global_counts:
            return self.global_counts_E
        group = self.layout.group
        seen = routing.topk_ids_Tk.shape[0] * (1 if group is None else group.size())
        if seen != totals.tokens:
            raise ValueError(
                f"moe.balance_scope = 'global': this forward and its group see {seen} of the step's {totals.tokens} "
                "tokens; run the micro-batches under counting_pass first"
            )
        counts_E = count_assignments(routing.topk_ids_Tk, self.global_counts_E.shape[0], counted_T)
        if group is not None:
            dist.all_reduce(counts_E, group=group)
        return counts_E


def needs_counting_pass(model: nn.Module) -> bool:
    """Whether a step of several micro-batches needs `counting_pass`."""
    return any(b.scope == "global" and b.coefficient for b in model.modules() if isinstance(b, Balance))


def forget_global_counts(model: nn.Module) -> None:
    """Drop what the last `counting_pass` gave every layer: the weights have changed."""
    for balance in model.modules():
        if isinstance(balance, Balance) and balance.has_global_counts:
            balance.set_global_counts(None)


@contextmanager
def counting_pass(model: nn.Module, group: ProcessGroup | None = None) -> Iterator[None]:
    """Count the assignments of a whole step for the global scope, before its training passes.

    Run every micro-batch's forward inside, in training mode; no gradient is recorded, no statistic touched. On exit one
    all-reduce over `group` (all ranks whose tokens make up the step, of one pipeline stage) gives each layer the
    step's counts. They hold until the next counting pass: weights must not change in between.
    """
    balances = [module for module in model.modules() if isinstance(module, Balance)]
    for balance in balances:
        balance.set_global_counts(None)
        balance.counting = True
    try:
        with torch.no_grad():
            yield
    finally:
        for balance in balances:
            balance.counting = False
    if not balances:
        return
    counts = torch.cat([balance.global_counts_E for balance in balances])
    if group is not None:
        dist.all_reduce(counts, group=group)
    for balance, counts_E in zip(balances, counts.split([b.global_counts_E.shape[0] for b in balances])):
        balance.set_global_counts(counts_E)


class BiasedLayer(Protocol):
    """What `update_bias` needs of an MoE layer."""

    router: Router
    bias_rate: float
    step_counts_E: Tensor


@torch.no_grad()
def update_bias(
    layers: Iterable[BiasedLayer], group: ProcessGroup | None = None, skipped: Tensor | None = None
) -> None:
    """Move every layer's selection bias one step toward balance: bias_i += rate * sign(mean count - count_i).

    Once an optimizer step, after its last micro-batch, from the counts of the whole step (which are then reset):
    one all-reduce over `group`, all ranks whose tokens make up the step, for all layers together. Each change is
    recentred to mean zero: a shift of all biases does not alter the selection, but signs need not cancel, so without it
    the biases would drift away from the scores and lose precision. Source: arXiv 2408.15664, algorithm 1.
    Layers whose rate is zero keep their bias. Where `skipped`, 0-dim, is 1 the biases stay, and the counts are
    forgotten.
    """
    layers = [layer for layer in layers if layer.router.expert_bias is not None and layer.bias_rate]
    if not layers:
        return
    counts = torch.cat([layer.step_counts_E for layer in layers])
    if group is not None:
        dist.all_reduce(counts, group=group)
    for layer, counts_E in zip(layers, counts.split([layer.step_counts_E.shape[0] for layer in layers])):
        load_E = counts_E.double()
        change_E = layer.bias_rate * (load_E.mean() - load_E).sign()
        if skipped is not None:
            change_E = change_E * (1 - skipped)
        assert layer.router.expert_bias is not None
        layer.router.expert_bias += (change_E - change_E.mean()).to(layer.router.expert_bias.dtype)
        layer.step_counts_E.zero_()
