"""flash-linear-attention's kernel of the linear recurrence, as state space duality."""

from torchlinearmoe.kernels.linear.fla import BACKEND as LINEAR
from torchlinearmoe.kernels.ssd.lowered import lowered

BACKEND = lowered(LINEAR)
