"""The metrics lines as TensorBoard events, with the expert load as a picture.

Legend: N MoE layers, E experts.
"""

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from torchlinearmoe.disk import refusal

_CELL = 8  # pixels a side of one expert in the picture


class TensorBoard:
    """Writes event files into `folder`. `resumed_step` hides what an earlier run wrote after that step."""

    def __init__(self, folder: str | Path, *, resumed_step: int = 0) -> None:
        from torch.utils.tensorboard import SummaryWriter  # slow to import, and only one rank needs it

        self._excepthook, threading.excepthook = threading.excepthook, self._hear
        self._writer = SummaryWriter(str(folder), purge_step=resumed_step + 1 if resumed_step else 0)

    def recipe(self, text: str, settings: Mapping[str, Any], step: int) -> None:
        """The recipe, to be read, and its keys as hyperparameters beside the curves of the losses."""
        from torch.utils.tensorboard.summary import hparams

        self._writer.add_text("recipe", f"```toml\n{text}\n```", step)
        plain = {
            key: value if isinstance(value, (bool, int, float, str)) else str(value) for key, value in settings.items()
        }
        for summary in hparams(plain, dict.fromkeys(("loss", "validation_loss"), 0.0)):
            self._writer._get_file_writer().add_summary(summary)

    def scalars(self, step: int, values: Mapping[str, Any]) -> None:
        """One scalar for each number in `values`, under its key; other values are passed over."""
        for key, value in values.items():
            if isinstance(value, (int, float)):
                self._writer.add_scalar(key, value, step)

    def expert_load(self, step: int, expert_load: torch.Tensor) -> None:
        """A heat map `moe/expert_load` and a histogram `moe/expert_load/layer_i` a layer, of the relative load.

        expert_load: [N, E], any unit (see `relative_load`). One row a layer, one column an expert.
        """
        relative_NE = relative_load(expert_load)
        self._writer.add_image("moe/expert_load", heat_map(relative_NE), step)
        for layer, relative_E in enumerate(relative_NE):
            self._writer.add_histogram(f"moe/expert_load/layer_{layer}", relative_E.numpy(), step)

    def close(self) -> None:
        """Write what is buffered and close."""
        try:
            self._writer.close()
        finally:
            threading.excepthook = self._excepthook

    def _hear(self, told: threading.ExceptHookArgs) -> None:
        """What the disk refuses to the writer's own thread is raised by the next call here, and said once."""
        if not type(told.thread).__module__.startswith("tensorboard.") or refusal(told.exc_value) is None:
            self._excepthook(told)


def relative_load(expert_load: torch.Tensor) -> torch.Tensor:
    """Load of each expert over the load it would have if all were equal: 1 is balanced, E is "takes everything".

    expert_load: [N, E] tokens (or any share proportional to them) an expert got in a layer. Returns float32 [N, E]
    on the CPU; a layer without any token counts as balanced.
    """
    load_NE = expert_load.detach().to("cpu", torch.float64)
    mean_N1 = load_NE.mean(dim=1, keepdim=True)
    return torch.where(mean_N1 > 0, load_NE / mean_N1.clamp_min(1e-30), 1.0).to(torch.float32)


def heat_map(relative_NE: torch.Tensor) -> torch.Tensor:
    """Picture of relative loads: white at 1, to blue at a quarter and less, to red at four times and more.

    Returns uint8 [3, N * cell, E * cell].
    """
    scale_NE = (relative_NE.clamp(0.25, 4.0).log2() / 2).float()  # -1 .. 1
    over_NE, under_NE = scale_NE.clamp_min(0), (-scale_NE).clamp_min(0)
    colour_3NE = torch.stack([1 - under_NE, 1 - torch.maximum(over_NE, under_NE), 1 - over_NE])
    pixels = (colour_3NE * 255).round().to(torch.uint8)
    return pixels.repeat_interleave(_CELL, dim=1).repeat_interleave(_CELL, dim=2)
