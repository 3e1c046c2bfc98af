"""Checkpoints of a training run: saved while training goes on, complete or invisible, loadable on any layout.

A checkpoint is a folder `step-N` in torch's distributed checkpoint format plus `state.json` (step, counters) and the
small files that make it usable by itself (recipe, tokenizer). Reading order: `folder` (names, completeness, renames),
`storage` (tensor files, without arbitrary pickles), `state` (which tensors, under which names), `load`, `manager`.
"""

from torchlinearmoe.checkpoint.folder import CheckpointError, find_latest, read_extra, read_file
from torchlinearmoe.checkpoint.load import load_model_weights
from torchlinearmoe.checkpoint.manager import CheckpointManager

__all__ = [
    "CheckpointError",
    "CheckpointManager",
    "find_latest",
    "load_model_weights",
    "read_extra",
    "read_file",
]
