"""The router: a token's scores over all experts, its top-k choice and the weights of the chosen.

Everything is fp32 (fp64 for fp64 inputs): the choice is discrete, so a rounding there is a different model.
Only what needs the router's weight or its selection bias lives here; losses, counts and the movement of tokens do not.

T tokens, D model width, E experts, k experts a token.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchlinearmoe.initialize import Normal, set_initializers
from torchlinearmoe.module import Module

LEAST_SUM = 1e-20
"""What sums of sigmoids are divided by at least, as in the published code."""


class Routing(NamedTuple):
    """A router's decision. A tuple, because FSDP finds the tensors of a module's output by walking its containers."""

    topk_ids_Tk: Tensor
    """int64 [T, k], distinct experts of each token, best first."""
    topk_weights_Tk: Tensor
    """fp32 [T, k], what the output of each chosen expert is multiplied by."""
    probs_TE: Tensor
    """fp32 [T, E], probabilities over all experts (rows sum to 1); of sigmoids, each over the sum of all."""
    logits_TE: Tensor
    """fp32 [T, E]."""


class Router(Module):
    """Scores over all experts, then top-k.

    `score` is a softmax over the logits, or the sigmoid of each (DeepSeek-AI 2024, DeepSeek-V3, arXiv 2412.19437,
    section 2.1.2), which knows nothing of the others: p = sigmoid(x W).

    With `renormalize` the k weights of a token are scaled to sum to one, which for the softmax equals one over the
    chosen logits; without it they are the scores. With `selection_bias` a persistent fp32 buffer
    `expert_bias` [E] is added to the scores when experts are chosen, and only then (Wang et al. 2024,
    "Auxiliary-Loss-Free Load Balancing", arXiv 2408.15664): weights and gradients never see it.

    With `num_groups` the experts fall into groups of consecutive ones, and a token chooses only among those of the
    `top_k_groups` groups that score highest, by their best expert (DeepSeek-AI 2024, DeepSeek-V2, arXiv 2405.04434,
    section 2.2.2: with a group a device, a token is sent to few devices) or by the sum of their two best, `top2`
    (DeepSeek-V3). `scaling` multiplies all weights.
    """

    keep_fp32 = True
    regions = ("forward",)
    expert_bias: Tensor | None

    def __init__(
        self,
        width: int,
        num_experts: int,
        top_k: int,
        *,
        score: Literal["softmax", "sigmoid"] = "softmax",
        renormalize: bool = True,
        selection_bias: bool = False,
        num_groups: int = 0,
        top_k_groups: int = 0,
        group_score: Literal["max", "top2"] = "max",
        scaling: float = 1.0,
        std: float = 0.02,
    ):
        super().__init__()
        if not 1 <= top_k <= num_experts:
            raise ValueError(f"moe.top_k = {top_k}: must lie between 1 and moe.num_experts = {num_experts}")
        self.num_experts = num_experts
        self.top_k = top_k
        self.sigmoid = score == "sigmoid"
        self.renormalize = renormalize
        self.num_groups, self.top_k_groups = num_groups, top_k_groups
        self.group_best = 2 if group_score == "top2" else 1
        self.scaling = scaling
        self.weight = nn.Parameter(torch.empty(num_experts, width, dtype=torch.float32))
        set_initializers(self, weight=Normal(std))
        self.register_buffer("expert_bias", torch.zeros(num_experts, dtype=torch.float32) if selection_bias else None)

    def reset_buffers(self) -> None:
        """Start from an unbiased selection."""
        if self.expert_bias is not None:
            self.expert_bias.zero_()

    def score(self, logits_TE: Tensor) -> Tensor:
        """[T, E] logits -> [T, E] scores between 0 and 1."""
        return logits_TE.sigmoid() if self.sigmoid else logits_TE.softmax(-1)

    def select(self, scores_TE: Tensor) -> Tensor:
        """[T, E] scores (selection bias included) -> int64 [T, k] distinct experts."""
        if self.num_groups:
            best_TG = scores_TE.unflatten(-1, (self.num_groups, -1)).topk(self.group_best, dim=-1).values.sum(-1)
            chosen_TG = torch.zeros_like(best_TG, dtype=torch.bool)
            chosen_TG.scatter_(-1, best_TG.topk(self.top_k_groups, dim=-1).indices, True)
            outside_TE = ~chosen_TG.repeat_interleave(self.num_experts // self.num_groups, dim=-1)
            scores_TE = scores_TE.masked_fill(outside_TE, -torch.inf)
        return scores_TE.topk(self.top_k, dim=-1).indices

    def weigh(self, logits_TE: Tensor, scores_TE: Tensor, topk_ids_Tk: Tensor) -> Tensor:
        """Weights [T, k] of the chosen experts."""
        if self.sigmoid:
            weights_Tk = scores_TE.gather(-1, topk_ids_Tk)
            if self.renormalize:
                weights_Tk = weights_Tk / (weights_Tk.sum(-1, keepdim=True) + LEAST_SUM)
        elif self.renormalize:  # p_i / sum(p) of the chosen, without dividing by a sum that may underflow
            weights_Tk = logits_TE.gather(-1, topk_ids_Tk).softmax(-1)
        else:
            weights_Tk = scores_TE.gather(-1, topk_ids_Tk)
        return weights_Tk if self.scaling == 1 else weights_Tk * self.scaling

    def forward(self, x_TD: Tensor) -> Routing:
        """Route x: [T, D] of any floating dtype."""
        dtype = torch.promote_types(x_TD.dtype, self.weight.dtype)  # the weight is fp32, or fp64 in a fp64 model
        logits_TE = F.linear(x_TD.to(dtype), self.weight.to(dtype))
        scores_TE = self.score(logits_TE)
        with torch.no_grad():
            topk_ids_Tk = self.select(scores_TE if self.expert_bias is None else scores_TE + self.expert_bias)
        probs_TE = scores_TE / (scores_TE.sum(-1, keepdim=True) + LEAST_SUM) if self.sigmoid else scores_TE
        return Routing(topk_ids_Tk, self.weigh(logits_TE, scores_TE, topk_ids_Tk), probs_TE, logits_TE)
