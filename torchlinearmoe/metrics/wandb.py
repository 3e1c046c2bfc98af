"""The metrics lines as a run of Weights & Biases, which the extra `wandb` brings.

    OUTPUT_DIR/wandb/          what its client keeps
    OUTPUT_DIR/wandb/run.id    the run's id: a run that goes on, goes on there too

Lines carry their step as a figure of their own, so that a run may go back to a checkpoint. Where there is no network,
WANDB_MODE=offline keeps all of it in the folder.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torchlinearmoe.errors import UserError


def check_wandb() -> None:
    """Raise UserError where there is no client."""
    try:
        import wandb  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise UserError(
            "metrics.wandb needs wandb, which is not installed; pip install wandb, or the extra 'torchlinearmoe[wandb]'"
        ) from None


class WeightsAndBiases:
    """Writes into the run of `folder`, in `project`. Raises UserError where the service cannot be had."""

    def __init__(self, project: str, folder: Path, settings: Mapping[str, Any]) -> None:
        """settings: the recipe, flat."""
        check_wandb()
        wandb: Any = importlib.import_module("wandb")
        kept = folder / "wandb" / "run.id"
        kept.parent.mkdir(parents=True, exist_ok=True)
        known = kept.read_text(encoding="utf-8").strip() if kept.exists() else None
        try:
            self._run = wandb.init(
                project=project, name=folder.name, dir=str(folder), config=dict(settings), id=known, resume="allow"
            )
        except wandb.Error as error:
            raise UserError(
                f"metrics.wandb = '{project}': {' '.join(str(error).split())}; `wandb login`, or set WANDB_MODE=offline"
            ) from None
        kept.write_text(f"{self._run.id}\n", encoding="utf-8")
        self._run.define_metric("*", step_metric="step")

    def scalars(self, step: int, values: Mapping[str, Any]) -> None:
        """The numbers in `values`, under their keys; other values are passed over."""
        self._run.log({"step": step} | {key: value for key, value in values.items() if isinstance(value, (int, float))})

    def close(self) -> None:
        """Send what is left."""
        self._run.finish()
