"""One decoder layer: x += s mixer(norm(x)); x += s feed_forward(norm(x)), s being `model.residual_scale`.

Shapes: T packed tokens, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from torchlinearmoe.layers.mlp import FEED_FORWARDS, NoFeedForward
from torchlinearmoe.layers.norm import RMSNorm
from torchlinearmoe.mixers.base import Carried, Context, Mixer, State
from torchlinearmoe.models.layer_feed_forwards import EXPERTS, NONE, feed_forwards
from torchlinearmoe.module import Module
from torchlinearmoe.moe.layer import MoE
from torchlinearmoe.recipe.schema import ModelRecipe


class Block(Module):
    """Pre-norm residual layer of a token mixer and a feed-forward: dense, a Mixture-of-Experts, or none."""

    ffn_norm: RMSNorm
    regions = ("norm_mixer", "add_norm")

    def __init__(self, model: ModelRecipe, mixer: Mixer, layer: int) -> None:
        super().__init__()
        self.mixer_norm = RMSNorm(model.hidden_size, model.norm_eps, model.norm_offset)
        self.mixer = mixer
        kind = feed_forwards(model)[layer]
        self.register_module("ffn_norm", None)
        if kind != NONE:
            self.ffn_norm = RMSNorm(model.hidden_size, model.norm_eps, model.norm_offset)
        self.ffn = _feed_forward(model, kind)
        self.residual_scale = model.residual_scale

    def norm_mixer(self, x_TD: Tensor) -> Tensor:
        """Input of the mixer."""
        return self.mixer_norm(x_TD)

    def add_norm(self, x_TD: Tensor, y_TD: Tensor) -> tuple[Tensor, Tensor]:
        """The residual stream after the mixer, and the input of the feed-forward."""
        x_TD = torch.add(x_TD, y_TD, alpha=self.residual_scale)
        return x_TD, self.ffn_norm(x_TD)

    def forward(
        self, x_TD: Tensor, context: Context, state: State | None = None, carried: Carried | None = None
    ) -> tuple[Tensor, State | None, Carried]:
        """[T, D] -> [T, D]; `state` and `carried` as in the mixer's contract."""
        y_TD, after, passed_on = self.mixer(self.norm_mixer(x_TD), context, state, carried)
        if isinstance(self.ffn, NoFeedForward):
            return torch.add(x_TD, y_TD, alpha=self.residual_scale), after, passed_on
        x_TD, h_TD = self.add_norm(x_TD, y_TD)
        if isinstance(self.ffn, MoE):
            h_TD = self.ffn(h_TD, totals=context.totals, documents=context.documents)
        else:
            h_TD = self.ffn(h_TD)
        return torch.add(x_TD, h_TD, alpha=self.residual_scale), after, passed_on


def _feed_forward(model: ModelRecipe, kind: str) -> nn.Module:
    """A feed-forward of `kind`, one of `layer_feed_forwards.KINDS`."""
    std, out_std = model.init_std, model.init_std / (2 * model.num_layers) ** 0.5
    if kind == NONE:
        return NoFeedForward()
    if kind == EXPERTS:
        return MoE(model.hidden_size, model.moe, std, out_std, model.activation)
    return FEED_FORWARDS[model.activation](model.hidden_size, model.ffn_hidden_size, std, out_std)
