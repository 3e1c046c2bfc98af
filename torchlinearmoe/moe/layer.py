"""The sparse feed-forward: route, dispatch, experts, combine.

x_TD is a flat stream of packed sequences; tokens do not see each other here, so document borders do not matter. Padding
is nobody's: it goes to no expert, takes no one's place and counts in no loss.

Routing and accounting (losses, statistics) run eagerly: the router may be a sharded unit of its own, and counts go
through collectives. The dispatcher's two methods, the experts' forward and `add_shared` take and give tensors, each fit
to be compiled by itself; `parallel` swaps `dispatcher` for one that exchanges tokens between ranks.

T tokens, D model width, L width of what enters an expert (D, or `moe.latent_size`), k experts a token, R rows given to
experts, E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from torchlinearmoe.documents import Documents
from torchlinearmoe.initialize import linear
from torchlinearmoe.late import to_device
from torchlinearmoe.layers.mlp import FEED_FORWARDS
from torchlinearmoe.module import Module
from torchlinearmoe.moe.accounting import account
from torchlinearmoe.moe.balance import Balance, attach_loss
from torchlinearmoe.moe.capacity import DROP_POLICIES, expert_capacity, keep_within_capacity
from torchlinearmoe.moe.dispatch import Dispatcher, LocalDispatch
from torchlinearmoe.moe.experts import Assigned, Experts
from torchlinearmoe.moe.router import Router, Routing
from torchlinearmoe.moe.statistics import LoadStatistics
from torchlinearmoe.moe.totals import StepTotals
from torchlinearmoe.recipe.schema import MoERecipe


class MoE(Module):
    """Sparse mixture of experts, plus an optional shared expert that every token passes.

    y_t = sum over the chosen experts e of w_te * expert_e(x_t)  [+ sigmoid(g . x_t) * shared(x_t)]

    With a `latent_size` experts work on fewer channels than router and shared expert: the sum is U times that over the
    e of w_te * expert_e(V x_t), V [L, D] and U [D, L].

    activation: of all experts, as `model.activation`.
    std, out_std: of the initial weights and of those that write into the residual stream.
    """

    step_counts_E: Tensor

    def __init__(self, width: int, recipe: MoERecipe, std: float, out_std: float, activation: str = "swiglu"):
        super().__init__()
        if recipe.drop_policy not in DROP_POLICIES:
            raise ValueError(f"moe.drop_policy = {recipe.drop_policy!r}: must be one of {', '.join(DROP_POLICIES)}")
        E = recipe.num_experts
        self.bias_rate = recipe.bias_rate if recipe.balance == "bias" else 0.0
        self.capacity_factor = recipe.capacity_factor
        self.eval_capacity_factor = recipe.eval_capacity_factor
        self.drop_policy = recipe.drop_policy
        self.router = Router(
            width,
            E,
            recipe.top_k,
            score=recipe.score,
            renormalize=recipe.renormalize,
            selection_bias=recipe.selection_bias or recipe.balance == "bias",
            num_groups=recipe.num_groups,
            top_k_groups=recipe.top_k_groups,
            group_score=recipe.group_score,
            scaling=recipe.routed_scaling,
            std=std,
        )
        latent, shared = recipe.latent_size, recipe.shared_hidden_size
        self.latent_down = linear(width, latent, std) if latent else None
        self.latent_up = linear(latent, width, out_std) if latent else None
        self.experts = Experts(
            latent or width,
            recipe.hidden_size,
            E,
            activation=activation,
            backend=recipe.backend,
            std=std,
            out_std=std if latent else out_std,
        )
        self.shared = FEED_FORWARDS[activation](width, shared, std, out_std) if shared else None
        self.shared_gate = linear(width, 1, std) if recipe.shared_hidden_size and recipe.shared_gate else None
        self.balance = Balance(
            E,
            kind=recipe.balance,
            coefficient=recipe.balance_coefficient,
            scope=recipe.balance_scope,
            z_loss_coefficient=recipe.z_loss_coefficient,
        )
        self.statistics = LoadStatistics(E)
        self.use(LocalDispatch(E))
        self.register_buffer("step_counts_E", torch.zeros(E, dtype=torch.int64), persistent=False)

    def use(self, dispatcher: Dispatcher) -> None:
        """Let `dispatcher` move the tokens; its regions and the shared expert are compiled."""
        self.dispatcher = dispatcher
        self.regions = (*(f"dispatcher.{name}" for name in dispatcher.regions), "add_shared")

    def reset_buffers(self) -> None:
        """Forget the counts that `update_bias` reads."""
        self.step_counts_E.zero_()

    def forward(self, x_TD: Tensor, *, totals: StepTotals | None = None, documents: Documents | None = None) -> Tensor:
        """[T, D] -> [T, D].

        totals: of the optimizer step; None (outside training) leaves the auxiliary losses out.
        documents: of the whole stream, of which `balance.layout` says what part x_TD is: its packed sequences and what
        of them is padding. None: one sequence, and no balance loss of scope "sequence".
        """
        routing = self.router(x_TD)
        counted_T = None
        if documents is not None and documents.counted is not None:
            counted_T = self.balance.layout.own(documents.counted)
        keep_Tk = self._keep(routing, documents, counted_T)
        routing = self._account(routing, keep_Tk, totals, documents, counted_T)
        x_TL = x_TD if self.latent_down is None else self.latent_down(x_TD)
        if self.dispatcher.stays_here and self.experts.take_tokens(x_TL):
            assigned = Assigned(routing.topk_ids_Tk, routing.topk_weights_Tk, keep_Tk)
            y_TL = self.experts(x_TL, assigned=assigned)
        else:
            x_RL, counts_E, context = self.dispatcher.dispatch(x_TL, routing, keep_Tk)
            y_RL = self.experts(x_RL, counts_E, context.padded)
            y_TL = self.dispatcher.combine(y_RL, context)
        y_TD = y_TL if self.latent_up is None else self.latent_up(y_TL)
        return y_TD if self.shared is None else self.add_shared(y_TD, x_TD)

    def _keep(self, routing: Routing, documents: Documents | None, counted_T: Tensor | None) -> Tensor | None:
        """Which assignments fit the capacity of this mode; None for all.

        In training of all tokens of this rank together. Outside it of each whole sequence by itself, over all ranks
        that have parts of it, so that no text depends on what it is computed beside or where; decoding drops nothing,
        for a token's experts are distinct.
        """
        ids_Tk, probs_TE, layout = routing.topk_ids_Tk, routing.probs_TE, self.balance.layout
        factor = self.capacity_factor if self.training else self.eval_capacity_factor
        everything = None if counted_T is None else counted_T.unsqueeze(1).expand_as(ids_Tk)
        if factor is None:
            return everything
        if self.training or documents is None:
            part = (layout.stream_part, layout.stream_parts)
            count = ids_Tk.shape[0] if documents is None else sum(documents.count_sequences(*part))
            capacity = expert_capacity(count, self.router.top_k, self.router.num_experts, factor)
            if capacity >= count:
                return everything
            return keep_within_capacity(ids_Tk, probs_TE, capacity, self.drop_policy, counted_T=counted_T)
        length = documents.row_length
        counts, sequence_T = self._sequences(documents, counted_T)
        capacities = [expert_capacity(count, self.router.top_k, self.router.num_experts, factor) for count in counts]
        if all(capacity >= count for capacity, count in zip(capacities, counts)):
            return everything
        keep_Tk = keep_within_capacity(
            layout.gather(ids_Tk, length),
            layout.gather(probs_TE, length),
            to_device(torch.tensor(capacities), ids_Tk.device),
            self.drop_policy,
            counted_T=None if counted_T is None else layout.gather(counted_T, length),
            sequence_T=sequence_T,
        )
        return layout.own_of_rows(keep_Tk, length)

    def _sequences(self, documents: Documents, counted_T: Tensor | None) -> tuple[list[int], Tensor]:
        """Counting tokens of each whole sequence, on the host; and the sequence of each token of all that share it."""
        layout, length = self.balance.layout, documents.row_length
        if layout.row_parts == 1:
            return documents.count_sequences(), documents.sequence_ids
        whole = length * layout.row_parts
        sequence_T = torch.arange(documents.num_rows, device=documents.ids.device).repeat_interleave(whole)
        if counted_T is None:
            return [whole] * documents.num_rows, sequence_T
        return layout.gather(counted_T, length).view(-1, whole).sum(1).tolist(), sequence_T

    def _account(
        self,
        routing: Routing,
        keep_Tk: Tensor | None,
        totals: StepTotals | None,
        documents: Documents | None,
        counted_T: Tensor | None,
    ) -> Routing:
        """Count what was routed and attach the auxiliary losses to the weights."""
        if not self.training:
            return routing
        loss, counts_E = account(
            routing,
            self.balance,
            self.statistics,
            totals=totals,
            row_length=None if documents is None else documents.row_length,
            keep_Tk=keep_Tk,
            counted_T=counted_T,
        )
        if counts_E is not None and self.bias_rate:
            self.step_counts_E += counts_E
        return routing if loss is None else routing._replace(topk_weights_Tk=attach_loss(routing.topk_weights_Tk, loss))

    def add_shared(self, y_TD: Tensor, x_TD: Tensor) -> Tensor:
        """Add the shared expert's output, gated where there is a gate."""
        assert self.shared is not None
        shared_TD = self.shared(x_TD)
        if self.shared_gate is not None:
            shared_TD = self.shared_gate(x_TD).sigmoid() * shared_TD
        return y_TD + shared_TD
