"""One decoder layer: a mixer and a feed-forward around a stream of hidden states, and where its norms stand.

    pre       x += mixer(norm(x));              x += feed_forward(norm(x))
    post      x += norm(mixer(x));              x += norm(feed_forward(x))
    stream    x = norm(x);  x += mixer(x);      x = norm(x);  x += feed_forward(x)

A sum may weigh its two parts: x = a x + b y. There are layers without a feed-forward, which end with the mixer's sum.

Shapes: T packed tokens, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from torchlinearmoe.layers.mlp import FEED_FORWARDS, FeedForward, NoFeedForward
from torchlinearmoe.layers.norm import RMSNorm
from torchlinearmoe.mixers.base import Carried, Context, Mixer, State
from torchlinearmoe.models.layer_feed_forwards import EXPERTS, NONE, feed_forwards
from torchlinearmoe.module import Module
from torchlinearmoe.moe.layer import MoE
from torchlinearmoe.recipe.schema import ModelRecipe

Scales = tuple[float, float]
"""Of the stream, and of what is added to it."""


class Block(Module):
    """Residual layer of a token mixer and a feed-forward: dense, a Mixture-of-Experts, or none."""

    ffn_norm: RMSNorm
    regions = ("norm_mixer", "add_norm", "add_last")

    def __init__(self, model: ModelRecipe, mixer: Mixer, layer: int) -> None:
        super().__init__()
        placement, scales = placed(model, mixer.keeps_past)
        self.mixer_scales, self.ffn_scales = (
            (ours, theirs * model.residual_scale) for ours, theirs in (scales, model.ffn_scales)
        )
        self.norms_behind, self.norms_stream = placement == "post", placement == "stream"
        self.mixer_norm = RMSNorm(model.hidden_size, model.norm_eps, model.norm_offset)
        self.mixer = mixer
        kind = feed_forwards(model)[layer]
        self.register_module("ffn_norm", None)
        if kind != NONE:
            self.ffn_norm = RMSNorm(model.hidden_size, model.norm_eps, model.norm_offset)
        self.ffn = _feed_forward(model, kind)
        if isinstance(self.ffn, FeedForward):  # experts have regions of their own
            self.regions = (*Block.regions, "ffn.forward")

    def norm_mixer(self, x_TD: Tensor) -> Tensor:
        """Input of the mixer, where a norm makes it."""
        return self.mixer_norm(x_TD)

    def add_norm(self, x_TD: Tensor, y_TD: Tensor) -> tuple[Tensor, Tensor]:
        """The residual stream after the mixer, and the input of the feed-forward."""
        if self.norms_behind:
            x_TD = add(x_TD, self.mixer_norm(y_TD), self.mixer_scales)
            return x_TD, x_TD
        x_TD = add(x_TD, y_TD, self.mixer_scales)
        h_TD = self.ffn_norm(x_TD)
        return (h_TD if self.norms_stream else x_TD), h_TD

    def add_last(self, x_TD: Tensor, y_TD: Tensor) -> Tensor:
        """The residual stream after the feed-forward, where a norm stands behind that."""
        return add(x_TD, self.ffn_norm(y_TD), self.ffn_scales)

    def forward(
        self, x_TD: Tensor, context: Context, state: State | None = None, carried: Carried | None = None
    ) -> tuple[Tensor, State | None, Carried]:
        """[T, D] -> [T, D]; `state` and `carried` as in the mixer's contract."""
        h_TD = x_TD if self.norms_behind else self.norm_mixer(x_TD)
        y_TD, after, passed_on = self.mixer(h_TD, context, state, carried)
        x_TD = h_TD if self.norms_stream else x_TD
        if isinstance(self.ffn, NoFeedForward):
            y_TD = self.mixer_norm(y_TD) if self.norms_behind else y_TD
            return add(x_TD, y_TD, self.mixer_scales), after, passed_on
        x_TD, h_TD = self.add_norm(x_TD, y_TD)
        if isinstance(self.ffn, MoE):
            h_TD = self.ffn(h_TD, totals=context.totals, documents=context.documents)
        else:
            h_TD = self.ffn(h_TD)
        x_TD = self.add_last(x_TD, h_TD) if self.norms_behind else add(x_TD, h_TD, self.ffn_scales)
        return x_TD, after, passed_on


def placed(model: ModelRecipe, softmax: bool) -> tuple[str, Scales]:
    """Where the norms stand in layers of softmax attention or of linear mixers, and the weights of the mixer's sum."""
    if softmax:
        return model.attention_norm_placement or model.norm_placement, model.attention_scales
    return model.norm_placement, model.linear_scales


def add(x: Tensor, y: Tensor, scales: Scales) -> Tensor:
    """Their weighted sum; weights of one cost nothing."""
    ours, theirs = scales
    return torch.add(x if ours == 1 else ours * x, y, alpha=theirs)


def _feed_forward(model: ModelRecipe, kind: str) -> nn.Module:
    """A feed-forward of `kind`, one of `layer_feed_forwards.KINDS`."""
    std, out_std = model.init_std, model.init_std / (2 * model.num_layers) ** 0.5
    if kind == NONE:
        return NoFeedForward()
    if kind == EXPERTS:
        return MoE(model.hidden_size, model.moe, std, out_std, model.activation)
    return FEED_FORWARDS[model.activation](model.hidden_size, model.ffn_hidden_size, std, out_std)
