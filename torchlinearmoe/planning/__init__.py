"""What a recipe will cost before it runs: the real model, sharded over a pretended world, and asked.

    world.py           a process group of any size in one process, and the model laid out over it without memory
    layers.py          parameters and FLOPs, by kind of layer
    communication.py   the units that FSDP gathers and what they send, and what experts exchange
    tensor.py          what tensor parallelism sends
    memory.py          bytes a rank holds
    rank.py            what one rank holds and sends
    overview.py        all of it together, as plain data
    time.py            seconds of a step, estimated
    choice.py          the fastest layout that fits, for lists of ranks and lengths
    report.py          as text

Nothing here trains, reads data or needs a GPU.
"""

from torchlinearmoe.planning.choice import choose_layouts
from torchlinearmoe.planning.overview import plan
from torchlinearmoe.planning.time import Machine

__all__ = ["Machine", "choose_layouts", "plan"]
