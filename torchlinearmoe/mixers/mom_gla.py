"""Mixture of memories over gated linear attention: memories in `mom.py`, what each of them is in `gla.py`."""

from __future__ import annotations

from dataclasses import dataclass

from torchlinearmoe.mixers import gla
from torchlinearmoe.mixers.base import register
from torchlinearmoe.mixers.mom import MemoryOptions, MoM


@dataclass(frozen=True, kw_only=True)
class Options(MemoryOptions, gla.Options):
    """`[mixer.mom_gla]`: the options of `[mixer.gla]`, and those of the memories."""


@register("mom_gla")
class MoMGLA(MoM[Options]):
    """Memories of gated linear attention."""

    memory = "gla"
    Options = Options
    variants = (
        {"num_memories": 3, "top_k": 1, "shared_memory": False, "renormalize": False, "conv": 3},
        {"inner": "linear_attention", "top_k": 3, "shared_projections": True},
    )
