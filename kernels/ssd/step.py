"""One token of the linear recurrence, as state space duality."""

from torchlinearmoe.kernels.linear.step import BACKEND as LINEAR
from torchlinearmoe.kernels.ssd.lowered import lowered

BACKEND = lowered(LINEAR)
