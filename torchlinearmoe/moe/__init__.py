"""The sparse Mixture-of-Experts feed-forward: router, experts, dispatch, capacity, balance, statistics.

`layer.MoE` reads in order; every step of it is a file. Nothing here knows a mesh: the one thing that differs when
experts are spread over ranks is the dispatcher, and the one thing when tokens are is `Balance.layout`.
"""

from torchlinearmoe.moe.balance import TokenLayout, counting_pass, needs_counting_pass, update_bias
from torchlinearmoe.moe.layer import MoE
from torchlinearmoe.moe.statistics import collect_statistics
from torchlinearmoe.moe.totals import StepTotals

__all__ = [
    "MoE",
    "StepTotals",
    "TokenLayout",
    "collect_statistics",
    "counting_pass",
    "needs_counting_pass",
    "update_bias",
]
