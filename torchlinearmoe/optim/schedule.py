"""The learning rate as a pure function of the step, so that a resumed run needs nothing but its step number.

Steps count from 1: step s is the s-th optimizer step. With 10 steps, 3 of warm-up, lr 1 and min_lr 0.1 (cosine):

    step  1     2     3     4     5     6     7     8     9     10
    lr    1/3   2/3   1     .955  .831  .650  .450  .269  .145  .1
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from torch.optim import Optimizer

if TYPE_CHECKING:
    from torchlinearmoe.recipe.schema import Recipe

SCHEDULES = ("cosine", "wsd", "constant")
"""Legal values of `optimizer.schedule`."""


def learning_rate(
    step: int,
    *,
    total_steps: int,
    lr: float,
    min_lr: float = 0.0,
    warmup_steps: int = 0,
    schedule: str = "cosine",
    decay_fraction: float = 0.2,
) -> float:
    """Learning rate of step `step`, 1 <= step <= total_steps (a later step keeps the last one's).

    Warm-up is linear, lr * step / warmup_steps, and reaches `lr` at step `warmup_steps`. After it:
    - `cosine`: half a cosine from `lr` to `min_lr` (Loshchilov and Hutter, arXiv 1608.03983).
    - `wsd`: `lr`, then in the last `decay_fraction` of the steps (never before the warm-up is over) a decay with the
      shape 1 - sqrt(x) to `min_lr`, the best of the shapes tried by Haegele et al., arXiv 2405.18392. Because the
      rate is flat before, a run can be resumed from there with more steps.
    - `constant`: `lr` throughout; `min_lr` plays no part.
    The last step of `cosine` and `wsd` is at `min_lr`. A run that ends inside its warm-up only warms up.

    Raises ValueError for an unknown schedule, a decay_fraction outside (0, 1] and a step below 1.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"optimizer.schedule = {schedule!r}: must be one of {', '.join(SCHEDULES)}")
    if not 0 < decay_fraction <= 1:
        raise ValueError(f"optimizer.decay_fraction = {decay_fraction}: must lie in (0, 1]")
    if step < 1:
        raise ValueError(f"step = {step}: steps count from 1")
    if step <= warmup_steps:
        return lr * step / warmup_steps
    if schedule == "constant":
        return lr
    decay_start = warmup_steps
    if schedule == "wsd":
        decay_start = max(warmup_steps, total_steps - max(1, round(decay_fraction * total_steps)))
    if step <= decay_start:
        return lr
    progress = min(1.0, (step - decay_start) / max(1, total_steps - decay_start))  # in (0, 1]
    remaining = 0.5 * (1 + math.cos(math.pi * progress)) if schedule == "cosine" else 1 - math.sqrt(progress)
    return min_lr + (lr - min_lr) * remaining


def scheduled(recipe: Recipe, step: int) -> float:
    """The learning rate of a resolved recipe at step `step`."""
    optimizer, training = recipe.optimizer, recipe.training
    assert training.tokens_per_step is not None
    return learning_rate(
        step,
        total_steps=training.total_steps,
        lr=optimizer.lr,
        min_lr=optimizer.min_lr,
        warmup_steps=optimizer.warmup(training.tokens_per_step),
        schedule=optimizer.schedule,
        decay_fraction=optimizer.decay_fraction,
    )


def set_learning_rate(optimizer: Optimizer, lr: float) -> None:
    """Make `lr` the learning rate of every group of `optimizer`."""
    for group in optimizer.param_groups:
        group["lr"] = lr
