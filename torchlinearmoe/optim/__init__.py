"""The optimizer's room: which parameters decay, which optimizer runs, what the learning rate is at a step.

    adamw.py      the optimizer; launches.py: its one launch over all parameters of a kind
    masters.py    float32 masters behind bfloat16 weights
    sums.py       gradients of several micro-batches
    step.py       clip, and skip what is broken

The norm that gradients are clipped by needs the meshes and lives in `torchlinearmoe.parallel.clip`.
"""

from torchlinearmoe.optim.build import OPTIMIZERS, build_optimizer, parameter_groups
from torchlinearmoe.optim.schedule import SCHEDULES, learning_rate, set_learning_rate
from torchlinearmoe.optim.step import step_if_finite

__all__ = [
    "OPTIMIZERS",
    "SCHEDULES",
    "build_optimizer",
    "learning_rate",
    "parameter_groups",
    "set_learning_rate",
    "step_if_finite",
]
