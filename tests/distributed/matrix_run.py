"""A few steps of the real `Trainer` on rows made for the matrix of layouts, and how far two such runs are apart.

A step is four micro-batches of one row each, with 1, 2, 5 and 1 documents of uneven lengths and uneven numbers of
labels. Rank d of R data ranks takes the rows d, R + d, ...; context- and tensor-parallel ranks take parts of a row.
"""

from __future__ import annotations

from collections import defaultdict
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from tiny_run import Settings, build, in_float64, unsettle, watched
from torch import Tensor

DOCUMENTS = (1, 2, 5, 1)
LENGTH, STEPS, VOCABULARY = 96, 5, 1024

Choices = dict[str, Tensor]
"""By router, int64 [STEPS, rows, LENGTH, k]: what every token of every step was sent to."""


class Trace(NamedTuple):
    """What a run did."""

    losses: list[float]
    first: dict[str, Tensor]
    """Whole gradients of the first step."""
    last: dict[str, Tensor]
    """Of the last step."""
    choices: Choices
    graphs: int
    """Graphs that torch.compile made."""


class Part(NamedTuple):
    """One rank's share of a run, and which it is."""

    trace: Trace
    chosen: dict[str, list[Tensor]]
    """By router, the choices of its tokens in every forward."""
    data: tuple[int, int]
    """Data rank and how many there are."""
    context: tuple[int, int]
    tensor: tuple[int, int]


class Distance(NamedTuple):
    """How far two runs are apart, relative; the greatest and where."""

    losses: float
    first: tuple[float, str]
    last: tuple[float, str]


def rows_of(step: int) -> list[Any]:
    """The samples of a step."""
    from torchlinearmoe.data.packing import IGNORED, Sample

    chooser = np.random.default_rng([11, step])
    samples = []
    for documents in DOCUMENTS:
        ids = chooser.integers(VOCABULARY, size=LENGTH + 1)
        labels = np.where(chooser.random(LENGTH) < 0.3 * chooser.random(), IGNORED, ids[1:])
        starts = [0, *sorted((1 + chooser.choice(LENGTH - 1, documents - 1, replace=False)).tolist())]
        samples.append(Sample(ids[:-1], labels, starts))
    return samples


def trace(rank: int, tables: Settings, wide: bool = False) -> Part:
    """Train `STEPS` steps of a recipe; `wide` in float64."""
    from torch._dynamo.utils import counters

    from torchlinearmoe.data.packing import collate

    counters.clear()
    with in_float64(wide):
        trainer = build(tables)
    for part in trainer.parts:
        unsettle(part)
    meshes, degrees = trainer.meshes, trainer.meshes.degrees
    chosen: dict[str, list[Tensor]] = defaultdict(list)
    for part in trainer.parts:
        _note_choices(part, chosen)
    losses, gradients = [], []
    for step in range(STEPS):
        rows = rows_of(step)[meshes.data_rank :: degrees.data_ranks]
        with watched(found := {}, {}):
            loss, _, _ = trainer.train_step([collate([row]) for row in rows])
        losses.append(loss.item())
        gradients.append(found)
    trainer.metrics.close()
    return Part(
        Trace(losses, gradients[0], gradients[-1], {}, counters["stats"]["unique_graphs"]),
        dict(chosen),
        (meshes.data_rank, degrees.data_ranks),
        (meshes.world["context"].get_local_rank(), degrees.context),
        (meshes.tensor.get_local_rank(), degrees.tensor),
    )


def _note_choices(model: torch.nn.Module, chosen: dict[str, list[Tensor]]) -> None:
    """Write down what every router chooses from now on, MoM's memories included."""
    from torchlinearmoe.moe.router import Router

    for name, module in model.named_modules():
        if isinstance(module, Router):
            module.register_forward_hook(partial(_note, chosen, name))


def _note(chosen: dict[str, list[Tensor]], name: str, _: Any, __: Any, routing: Any) -> None:
    chosen[name].append(routing.topk_ids_Tk)


def joined(parts: list[Part]) -> Trace:
    """One trace of all ranks; gradients that several ranks hold must be equal among them."""
    first, last = {}, {}
    for part in parts:
        for whole, found in ((first, part.trace.first), (last, part.trace.last)):
            for name, gradient in found.items():
                assert name not in whole or torch.equal(whole[name], gradient), f"copies of {name} have other gradients"
                whole[name] = gradient
    losses = parts[0].trace.losses
    assert all(part.trace.losses == losses for part in parts), "ranks disagree on the loss"
    names = {name: None for part in parts for name in part.chosen}
    choices = {name: _in_rows([part for part in parts if name in part.chosen], name) for name in names}
    return Trace(losses, first, last, choices, min(part.trace.graphs for part in parts))


def _in_rows(parts: list[Part], name: str) -> Tensor:
    """All ranks' choices of one router in the order of the whole rows."""
    k = parts[0].chosen[name][0].shape[-1]
    whole = torch.full((STEPS, len(DOCUMENTS), LENGTH, k), -1)
    for part in parts:
        data, data_ranks = part.data
        context, spans = part.context
        span = LENGTH // spans
        for call, ids_Tk in enumerate(part.chosen[name]):
            step, index = divmod(call, len(DOCUMENTS) // data_ranks)
            # A router inside a mixer sees all tokens of the span, one behind it a tensor-parallel rank's share.
            share = len(ids_Tk)
            start = context * span + (part.tensor[0] * share if share < span else 0)
            whole[step, index * data_ranks + data, start : start + share] = ids_Tk
    assert (whole >= 0).all(), f"{name}: some tokens were not seen"
    return whole


def distance(found: Trace, expected: Trace) -> Distance:
    """How far a run is from another of the same model; fails where routers chose otherwise."""
    assert found.choices.keys() == expected.choices.keys()
    for name, whole in expected.choices.items():
        steps, *_ = (found.choices[name] != whole).any(-1).nonzero(as_tuple=True)
        if len(steps):
            raise AssertionError(f"{name} routes {len(steps)} tokens otherwise, the first in step {int(steps[0]) + 1}")
    losses = max(abs(a - b) / abs(b) for a, b in zip(found.losses, expected.losses, strict=True))
    return Distance(losses, _farthest(found.first, expected.first), _farthest(found.last, expected.last))


def _farthest(found: dict[str, Tensor], expected: dict[str, Tensor]) -> tuple[float, str]:
    assert found.keys() == expected.keys()
    errors = []
    for name, gradient in expected.items():
        assert gradient.norm() > 0, f"{name} has no gradient: nothing is shown"
        errors.append((float((found[name] - gradient).norm() / gradient.norm()), name))
    return max(errors)
