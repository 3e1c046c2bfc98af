"""What a model family declares: its presets, its softmax attention, the dimensions a preset brings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torchlinearmoe.models.families.huggingface import Architecture
from torchlinearmoe.registry import Registry

MODEL_DIMENSIONS = (
    "hidden_size",
    "num_layers",
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "ffn_hidden_size",
    "vocab_size",
    "max_length",
    "rope_theta",
    "norm_eps",
    "qkv_bias",
    "tie_embeddings",
    "init_std",
)
MOE_DIMENSIONS = (
    "num_experts",
    "top_k",
    "hidden_size",
    "shared_hidden_size",
    "shared_gate",
    "renormalize",
)

DENSE: dict[str, Any] = {
    "num_experts": 0,
    "top_k": 0,
    "hidden_size": 0,
    "shared_hidden_size": 0,
    "shared_gate": False,
    "renormalize": False,
}
"""`[moe]` of a preset without experts."""


@dataclass(frozen=True)
class Family:
    """A model family as data."""

    name: str
    attention: str
    """Mixer of the `N` layers."""
    common: Mapping[str, Any]
    """`[model]` values of every size."""
    presets: Mapping[str, tuple[Mapping[str, Any], Mapping[str, Any]]]
    """Size to (`[model]` values, `[moe]` values)."""
    published: tuple[Architecture, ...] = ()
    """The Hugging Face architectures whose weights the family reads and writes."""

    def preset(self, size: str) -> dict[str, dict[str, Any]]:
        """The `[model]` and `[moe]` values that `size` brings."""
        model, moe = self.presets[size]
        return {"model": {**self.common, **model}, "moe": {**DENSE, **moe}}

    @staticmethod
    def dimensions() -> dict[str, tuple[str, ...]]:
        """The keys a preset brings, by section; a new family or size on the command line replaces the file's."""
        return {"model": MODEL_DIMENSIONS, "moe": MOE_DIMENSIONS}


FAMILIES: Registry[Family] = Registry("family")
