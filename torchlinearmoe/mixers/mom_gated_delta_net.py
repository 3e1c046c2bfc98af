"""Mixture of memories over Gated DeltaNet: memories in `mom.py`, what each of them is in `gated_delta_net.py`."""

from __future__ import annotations

from dataclasses import dataclass

from torchlinearmoe.mixers import gated_delta_net
from torchlinearmoe.mixers.base import register
from torchlinearmoe.mixers.mom import MemoryOptions, MoM


@dataclass(frozen=True, kw_only=True)
class Options(MemoryOptions, gated_delta_net.Options):
    """`[mixer.mom_gated_delta_net]`: the options of `[mixer.gated_delta_net]`, and those of the memories."""


@register("mom_gated_delta_net")
class MoMGatedDeltaNet(MoM[Options]):
    """Memories of Gated DeltaNet."""

    memory = "gated_delta_net"
    Options = Options
    variants = ({"shared_memory": False, "negative_eigenvalues": True, "expand_v": 1.0, "balance_scope": "global"},)
