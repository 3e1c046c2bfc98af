"""FLOPs of a model: two a weight that a token meets, plus what the mixers do between tokens.

Only the chosen experts count. Backward costs twice the forward; recomputation is not model work and is not counted.
"""

from __future__ import annotations

from torch import nn

from torchlinearmoe.mixers.base import Mixer
from torchlinearmoe.models.decoder import Decoder
from torchlinearmoe.moe.layer import MoE
from torchlinearmoe.recipe.schema import ModelRecipe


def forward_flops_per_token(model: Decoder, length: int) -> float:
    """FLOPs of one token's forward in documents of `length` tokens."""
    return head_flops(model.recipe) + sum(layer_flops(layer, length) for layer in model.layers.values())


def head_flops(recipe: ModelRecipe) -> float:
    """FLOPs of one token's projection to the vocabulary."""
    return 2.0 * recipe.hidden_size * recipe.vocab_size


def layer_flops(layer: nn.Module, length: int) -> float:
    """FLOPs of one token's forward through a layer, in documents of `length` tokens."""
    mixer = layer.mixer
    assert isinstance(mixer, Mixer)
    return mixer.flops_per_token(length) + 2.0 * active_parameters(layer.ffn)


def training_flops_per_token(model: Decoder, length: int) -> float:
    """Forward and backward."""
    return 3 * forward_flops_per_token(model, length)


def active_parameters(module) -> int:
    """Parameters of a feed-forward that one token meets."""
    every = sum(p.numel() for p in module.parameters())
    if not isinstance(module, MoE):
        return every
    experts = sum(p.numel() for p in module.experts.parameters())
    return every - experts + experts * module.router.top_k // module.router.num_experts
