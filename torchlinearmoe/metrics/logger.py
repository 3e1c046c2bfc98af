"""The trainer's one door to the outside: a logged step goes to the file, to TensorBoard, to Weights & Biases where that
is asked for, and to the terminal."""

import math
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

import torch

from torchlinearmoe.metrics.console import Console
from torchlinearmoe.metrics.record import Record, truncate_after
from torchlinearmoe.metrics.tensorboard import TensorBoard
from torchlinearmoe.metrics.wandb import WeightsAndBiases

METRIC_KEYS = ("loss", "grad_norm", "lr", "tokens", "tokens_per_second", "mfu", "memory_gib", "skipped_steps")
"""What every line of a logged step holds beside `step`; a value that is not known is None.

Every line has `time` too, in Unix seconds, and the perplexity a token of its losses: `perplexity`,
`validation_perplexity`.
"""


class MetricsLogger:
    """Rank 0 writes `output_dir/metrics.jsonl`, `output_dir/tensorboard/` and the terminal; other ranks do nothing.

    On every rank the calls are the same. No call is a collective: the values given on rank 0 are the ones told.

    resumed_step: the step whose checkpoint was loaded, 0 for a fresh start: lines and events after it are removed.
    recipe, settings: the run's recipe as text, and flat; wandb: a project of Weights & Biases, or empty.
    clock: seconds since 1970.
    """

    def __init__(
        self,
        output_dir: str | Path,
        *,
        total_steps: int,
        resumed_step: int = 0,
        rank: int = 0,
        tensorboard: bool = True,
        wandb: str = "",
        recipe: str = "",
        settings: Mapping[str, Any] | None = None,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._active = rank == 0
        self._clock = clock
        if not self._active:
            return
        folder = Path(output_dir)
        truncate_after(folder / "metrics.jsonl", resumed_step)
        self._record = Record(folder / "metrics.jsonl")
        self._tensorboard = TensorBoard(folder / "tensorboard", resumed_step=resumed_step) if tensorboard else None
        if self._tensorboard is not None and recipe:
            self._tensorboard.recipe(recipe, settings or {}, resumed_step)
        self._wandb = WeightsAndBiases(wandb, folder, settings or {}) if wandb else None
        self._console = Console(total_steps=total_steps, step=resumed_step, stream=stream)
        self._validated: tuple[int, dict[str, float]] | None = None  # validation losses that wait for their step's line

    def advance(self, step: int) -> None:
        """Step `step` is done, logged or not: moves the bar of a terminal."""
        if self._active:
            self._write_waiting_validation()
            self._console.advance(step)

    def validation(
        self,
        step: int,
        loss: float | torch.Tensor | None,
        others: Mapping[str, float | torch.Tensor] | None = None,
        accuracies: Mapping[str, float] | None = None,
    ) -> None:
        """The loss on held-out data after step `step`, and on `others` by their names, and the accuracies on either,
        that on the held-out data under the name "". Call it before `log` of the same step, whose line takes them in as
        `validation_loss` and `validation_loss/NAME`; without such a call they get a line of their own."""
        own = {} if loss is None else {"": loss}
        losses = {_named("validation_loss", name): float(value) for name, value in {**own, **(others or {})}.items()}
        hits = {_named("validation_accuracy", name): value for name, value in (accuracies or {}).items()}
        self._measured(step, losses | hits)

    def evaluation(self, step: int, figures: Mapping[str, float]) -> None:
        """What tasks found after step `step`, `evaluation/TASK/METRIC` each; as `validation`."""
        self._measured(step, figures)

    def _measured(self, step: int, figures: Mapping[str, float]) -> None:
        if not self._active:
            return
        waiting: dict[str, float] = {}
        if self._validated is not None and self._validated[0] == step:
            waiting = self._validated[1]
        else:
            self._write_waiting_validation()
        self._validated = (step, {**waiting, **figures})
        if self._console.is_terminal:  # where the figures that hold it are soon replaced
            self._say_measured(step, figures)

    def log(
        self,
        step: int,
        values: Mapping[str, Any],
        *,
        expert_load: torch.Tensor | None = None,
        seconds_left: float | None = None,
    ) -> None:
        """Tell step `step`.

        values: all of METRIC_KEYS and any more, such as the expert load figures; numbers, None or one-element tensors
            (fetched here, on rank 0 only).
        expert_load: [MoE layers, experts] tokens each expert got, for TensorBoard's picture and histograms.
        seconds_left: for the terminal.
        """
        if not self._active:
            return
        missing = [key for key in METRIC_KEYS if key not in values]
        assert not missing, f"a metrics line lacks {missing}"
        line = {key: value.item() if isinstance(value, torch.Tensor) else value for key, value in values.items()}
        if self._validated is not None and self._validated[0] == step:
            losses = self._validated[1]
            line |= losses
            self._validated = None
            if len(losses) > ("validation_loss" in losses) and not self._console.is_terminal:
                self._say_measured(step, losses)
        self._write_waiting_validation()
        self._write(step, line)
        if self._tensorboard is not None and expert_load is not None:
            self._tensorboard.expert_load(step, expert_load)
        self._console.figures(step, line, seconds_left)

    def message(self, text: str) -> None:
        """Say one line on the terminal, e.g. that a checkpoint was written."""
        if self._active:
            self._console.message(text)

    def close(self) -> None:
        """Write what is left and close; a second call does nothing."""
        if not self._active:
            return
        try:
            self._write_waiting_validation()
        finally:
            self._active = False
            self._console.close()
            self._record.close()
            for sink in (self._tensorboard, self._wandb):
                if sink is not None:
                    sink.close()

    def _write_waiting_validation(self) -> None:
        if self._validated is not None:
            step, losses = self._validated
            self._validated = None
            self._write(step, losses)
            if not self._console.is_terminal:
                self._say_measured(step, losses)

    def _say_measured(self, step: int, figures: Mapping[str, float]) -> None:
        """One line of the losses and accuracies, and one a task."""
        lines: dict[str, list[str]] = {}
        for name, value in figures.items():
            kind, _, rest = name.partition("/")
            task, _, metric = rest.partition("/")
            if kind == "evaluation":
                lines.setdefault(f"{task}: ", []).append(f"{metric} {value:.4f}")
            else:
                of = f"of {rest}" if rest and kind == "validation_loss" else f"{kind.replace('_', ' ')} {rest}".strip()
                lines.setdefault("", []).append(f"{of} {value:.4f}")
        for task, told in lines.items():
            self._console.message(f"step {step} | {task}{', '.join(told)}")

    def _write(self, step: int, line: dict[str, Any]) -> None:
        for key in _LOSSES & line.keys():
            line[key.replace("loss", "perplexity")] = _perplexity(line[key])
        self._record.write({"step": step, "time": round(self._clock(), 3), **line})
        for sink in (self._tensorboard, self._wandb):
            if sink is not None:
                sink.scalars(step, line)

    def __enter__(self) -> "MetricsLogger":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        with nullcontext() if error is None else suppress(OSError):  # the error on its way out matters more
            self.close()


def _named(kind: str, name: str) -> str:
    return f"{kind}/{name}" if name else kind


_LOSSES = {"loss", "validation_loss"}


def _perplexity(loss: float | None) -> float | None:
    """exp of a loss in nats; None where it is not finite."""
    if loss is None or not loss < 700:  # about where it no longer fits in 64 bits
        return None
    return math.exp(loss)
