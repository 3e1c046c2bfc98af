"""FLOPs of a model: two a weight that a token meets, plus what the mixers do between tokens.

Only the chosen experts count. Backward costs twice the forward; recomputation is not model work and is not counted.
"""

from __future__ import annotations

from torchlinearmoe.mixers.base import Mixer
from torchlinearmoe.models.decoder import Decoder
from torchlinearmoe.moe.layer import MoE


def forward_flops_per_token(model: Decoder, length: int) -> float:
    """FLOPs of one token's forward in documents of `length` tokens."""
    recipe = model.recipe
    total = 2.0 * recipe.hidden_size * recipe.vocab_size
    for layer in model.layers.values():
        mixer = layer.mixer
        assert isinstance(mixer, Mixer)
        total += mixer.flops_per_token(length)
        total += 2.0 * active_parameters(layer.ffn)
    return total


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
