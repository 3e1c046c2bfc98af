"""What a run tells: the metrics file, TensorBoard, the terminal, and the clocks and counters behind the figures.

`MetricsLogger` is the one door for the trainer. Nothing here takes part in the computation: dropping a call to this
room changes no weight.
"""

from torchlinearmoe.metrics.logger import METRIC_KEYS, MetricsLogger
from torchlinearmoe.metrics.meter import Meter, peak_memory_gib
from torchlinearmoe.metrics.mfu import mfu, peak_flops
from torchlinearmoe.metrics.profiling import MemorySnapshot, StepProfiler
from torchlinearmoe.metrics.record import Record, truncate_after

__all__ = [
    "METRIC_KEYS",
    "MemorySnapshot",
    "Meter",
    "MetricsLogger",
    "Record",
    "StepProfiler",
    "mfu",
    "peak_flops",
    "peak_memory_gib",
    "truncate_after",
]
