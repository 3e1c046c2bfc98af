"""The chunk-parallel linear recurrence, as state space duality."""

from torchlinearmoe.kernels.linear.chunked import BACKEND as LINEAR
from torchlinearmoe.kernels.ssd.lowered import lowered

BACKEND = lowered(LINEAR)
