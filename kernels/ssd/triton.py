"""Our Triton kernels of the linear recurrence, as state space duality."""

from torchlinearmoe.kernels.linear.triton import BACKEND as LINEAR
from torchlinearmoe.kernels.ssd.lowered import lowered

BACKEND = lowered(LINEAR)
