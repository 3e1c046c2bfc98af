"""What a model family declares: its presets, its softmax attention, the dimensions a preset brings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torchlinearmoe.families.huggingface import Architecture
from torchlinearmoe.recipe.schema import ModelRecipe, MoERecipe, dimensions
from torchlinearmoe.registry import Registry

DIMENSIONS: dict[str, dict[str, Any]] = {"model": dimensions(ModelRecipe), "moe": dimensions(MoERecipe)}
"""What a size brings, by section, and the plain value of each key: no rotary scaling, no experts."""


def plain(section: str) -> dict[str, Any]:
    """The values of `section` in a size that does not name them."""
    return {key: value for key, value in DIMENSIONS[section].items() if value is not None}


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
    """`[model]` values of every size; a published hybrid's `mixer` and `layout` are among them."""
    presets: Mapping[str, tuple[Mapping[str, Any], ...]]
    """Size to (`[model]` values, `[moe]` values), then the options of `attention` where it has its own dimensions, then
    those of the published hybrid's `mixer`."""
    published: tuple[Architecture, ...] = ()
    """The Hugging Face architectures whose weights the family reads and writes."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Options of `attention` in every size, `[mixer.ATTENTION]`."""

    def __post_init__(self) -> None:
        """Raise ValueError for a size that leaves a dimension out; a head's width may be."""
        for size in self.presets:
            for section, values in self.preset(size).items():
                missing = [key for key in DIMENSIONS[section] if key not in values and key != "head_dim"]
                if missing:
                    raise ValueError(f"family '{self.name}', size '{size}': no {section}.{missing[0]}")

    def preset(self, size: str) -> dict[str, dict[str, Any]]:
        """The `[model]` and `[moe]` values that `size` brings."""
        model, moe, *_ = self.presets[size]
        return {"model": {**plain("model"), **self.common, **model}, "moe": {**plain("moe"), **moe}}

    def attention_options(self, size: str) -> dict[str, Any]:
        """The options of `attention` that `size` brings, `[mixer.ATTENTION]`."""
        _, _, *options = self.presets[size]
        return {**self.options, **(options[0] if options else {})}

    def mixer_options(self, size: str) -> dict[str, dict[str, Any]]:
        """The options that `size` brings, by mixer."""
        brought = {self.attention: self.attention_options(size)}
        if len(self.presets[size]) > 3:
            brought[self.common["mixer"]] = dict(self.presets[size][3])
        return brought

    @staticmethod
    def mixer_dimensions() -> dict[str, set[str]]:
        """The options of mixers that sizes bring, by mixer."""
        brought: dict[str, set[str]] = {}
        for family in FAMILIES.values():
            for size in family.presets:
                for mixer, options in family.mixer_options(size).items():
                    brought.setdefault(mixer, set()).update(options)
        return brought


FAMILIES: Registry[Family] = Registry("family")
