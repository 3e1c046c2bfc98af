"""Context parallelism over all ranks: LASP-2 (Sun et al. 2025, arXiv 2502.07563) and on hybrids LASP-2H.

Losses at a short length, of every linear mixer and of a hybrid whose softmax layers gather keys and values. Speed at a
long one: tokens of one sequence over all ranks beside pure data parallelism, where each rank has a sequence of its own
as long as its span was. How much of the gather of states a profile shows hidden. The longest sequence that fits.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torchlinearmoe.benchmark.multi.host import Host
from torchlinearmoe.benchmark.multi.models import small, timed
from torchlinearmoe.benchmark.multi.rows import Row, compared, failed, rated
from torchlinearmoe.benchmark.multi.shapes import longest_of, span_of, steps_of
from torchlinearmoe.mixers import MIXERS

LIMIT = 420
QUICK_MIXERS = ("linear_attention", "gla", "mamba2", "gated_delta_net")
"""One of each way to decay."""
GATHER = "gather"


def run(host: Host) -> Iterator[Row]:
    """What matters most comes first: the limit may end the rest."""
    yield from _speeds(host)
    yield from _losses(host)
    if not host.quick:
        yield from _longest(host)


def _speeds(host: Host) -> Iterator[Row]:
    span = span_of(host)
    linear, hybrid = {"layout": "L"}, {"layout": "LLLN"}
    data = {"data_shard": host.ranks}
    context = {"data_shard": 1, "context": host.ranks, "context_attention": GATHER}
    dp = timed(host, length=span, sequences=1, model=linear, **data)
    cp = timed(host, length=span * host.ranks, sequences=1, model=linear, **_linear(context))
    lasp2h = timed(host, length=span * host.ranks, sequences=1, model=hybrid, **context)
    steps = steps_of(host)
    alone, spread, profile, mixed = host.measure(
        [
            {"kind": "speed", "recipe": dp, "steps": steps},
            {"kind": "speed", "recipe": cp, "steps": steps},
            {"kind": "overlap", "recipe": cp, "steps": 3},
            {"kind": "speed", "recipe": lasp2h, "steps": steps},
        ]
    )
    yield rated("data parallel", alone)
    yield rated("LASP-2, speed", spread, alone, "data parallel")
    yield failed("LASP-2, gather", profile["error"]) if "error" in profile else _hidden(profile)
    yield rated("LASP-2H, speed", mixed)


def _hidden(profile: dict[str, Any]) -> Row:
    if profile["hidden_share"] is None:
        return {"case": "LASP-2, gather", "result": "left out", "note": "the profile has no kernels of a gather"}
    return {"case": "LASP-2, gather", "result": "timed", **profile}


def _linear(context: dict[str, Any]) -> dict[str, Any]:
    """Without what only softmax layers read."""
    return {key: value for key, value in context.items() if key != "context_attention"}


def _losses(host: Host) -> Iterator[Row]:
    context = {"data_shard": 1, "context": host.ranks, "context_attention": GATHER}
    names = QUICK_MIXERS if host.quick else [name for name in MIXERS if not MIXERS[name].keeps_past]
    models: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {"LASP-2H": ({}, context)}
    models |= {name: ({"mixer": name, "layout": "L", "num_layers": 2}, _linear(context)) for name in names}
    alone = host.measure([{"kind": "losses", "recipe": small(host, model=model)} for model, _ in models.values()], 1)
    spread = host.measure(
        [{"kind": "losses", "recipe": small(host, model=m, parallel=degrees)} for m, degrees in models.values()]
    )
    for name, found, expected in zip(models, spread, alone):
        yield compared(name if name == "LASP-2H" else f"LASP-2, {name}", found, expected, host.cuda)


def _longest(host: Host) -> Iterator[Row]:
    context = {"data_shard": 1, "context": host.ranks, "context_attention": GATHER}
    lengths = []
    length = 2 * span_of(host) * host.ranks
    while length <= longest_of(host):
        lengths.append(length)
        length *= 2
    for name, layout, degrees in (("LASP-2", "L", _linear(context)), ("LASP-2H", "LLLN", context)):
        recipes = [
            timed(host, length=length, sequences=1, model={"layout": layout}, checkpointing="full", **degrees)
            for length in lengths
        ]
        found = host.measure([{"kind": "speed", "recipe": recipe, "steps": 2} for recipe in recipes])
        fit = [(length, figures) for length, figures in zip(lengths, found) if "error" not in figures]
        wrong = [(length, figures["error"]) for length, figures in zip(lengths, found) if "error" in figures]
        case = f"{name}, longest"
        if not fit:
            yield failed(case, wrong[0][1])
            continue
        row = rated(case, fit[-1][1]) | {"tokens": fit[-1][0]}
        yield row | ({"note": f"{wrong[0][0]} tokens: {wrong[0][1]}"[:100]} if wrong else {})
