"""What a model family declares: its presets, its softmax attention, the dimensions a preset brings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torchlinearmoe.families.huggingface import Architecture
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
    "rope_scaling",
    "rope_factor",
    "rope_original_length",
    "rope_beta_slow",
    "rope_beta_fast",
    "rope_mscale",
    "rope_mscale_all_dim",
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
    "routed_scaling",
    "num_groups",
    "top_k_groups",
    "first_dense_layers",
)

PLAIN_ROPE: dict[str, Any] = {
    "rope_scaling": "none",
    "rope_factor": 1.0,
    "rope_original_length": 4096,
    "rope_beta_slow": 1.0,
    "rope_beta_fast": 32.0,
    "rope_mscale": 0.0,
    "rope_mscale_all_dim": 0.0,
}
"""`[model]` of a preset without rotary scaling; the rest are YaRN's defaults."""

DENSE: dict[str, Any] = {
    "num_experts": 0,
    "top_k": 0,
    "hidden_size": 0,
    "shared_hidden_size": 0,
    "shared_gate": False,
    "renormalize": False,
    "routed_scaling": 1.0,
    "num_groups": 0,
    "top_k_groups": 0,
    "first_dense_layers": 0,
}
"""`[moe]` of a preset without experts."""


def model_size(width: int, layers: int, heads: int, kv_heads: int, ffn: int, vocab: int, **more: Any) -> dict[str, Any]:
    """`[model]` of a preset."""
    return {
        "hidden_size": width,
        "num_layers": layers,
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "ffn_hidden_size": ffn,
        "vocab_size": vocab,
        **more,
    }


def moe_size(number: int, top_k: int, hidden: int, **more: Any) -> dict[str, Any]:
    """`[moe]` of a preset."""
    return {"num_experts": number, "top_k": top_k, "hidden_size": hidden, **more}


@dataclass(frozen=True)
class Family:
    """A model family as data."""

    name: str
    attention: str
    """Mixer of the `N` layers."""
    common: Mapping[str, Any]
    """`[model]` values of every size."""
    presets: Mapping[str, tuple[Mapping[str, Any], ...]]
    """Size to (`[model]` values, `[moe]` values), then the options of `attention` where it has its own dimensions."""
    published: tuple[Architecture, ...] = ()
    """The Hugging Face architectures whose weights the family reads and writes."""

    def __post_init__(self) -> None:
        """Raise ValueError for a size that leaves a dimension out; a head's width may be."""
        for size in self.presets:
            for section, values in self.preset(size).items():
                missing = [key for key in self.dimensions()[section] if key not in values and key != "head_dim"]
                if missing:
                    raise ValueError(f"family '{self.name}', size '{size}': no {section}.{missing[0]}")

    def preset(self, size: str) -> dict[str, dict[str, Any]]:
        """The `[model]` and `[moe]` values that `size` brings."""
        model, moe, *_ = self.presets[size]
        return {"model": {**PLAIN_ROPE, **self.common, **model}, "moe": {**DENSE, **moe}}

    def attention_options(self, size: str) -> dict[str, Any]:
        """The options of `attention` that `size` brings, `[mixer.ATTENTION]`."""
        _, _, *options = self.presets[size]
        return dict(options[0]) if options else {}

    @staticmethod
    def dimensions() -> dict[str, tuple[str, ...]]:
        """The keys a preset brings, by section; a new family or size on the command line replaces the file's."""
        return {"model": MODEL_DIMENSIONS, "moe": MOE_DIMENSIONS}

    @staticmethod
    def mixer_dimensions() -> dict[str, set[str]]:
        """The same of `[mixer.NAME]`, by mixer."""
        brought: dict[str, set[str]] = {}
        for family in FAMILIES.values():
            for size in family.presets:
                brought.setdefault(family.attention, set()).update(family.attention_options(size))
        return brought


FAMILIES: Registry[Family] = Registry("family")
