"""Context parallelism over all ranks: LASP-2 (Sun et al. 2025, arXiv 2502.07563) and on hybrids LASP-2H.

Losses at a short length, of every linear mixer and of a hybrid whose softmax layers gather keys and values. Speed at a
long one: tokens of one sequence over all ranks beside pure data parallelism, where each rank has a sequence of its own
as long as its span was. How much of the gather of states a profile shows hidden. The longest sequence that fits.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torchlinearmoe.benchmark.multi.host import Host, Run, Runs
from torchlinearmoe.benchmark.multi.models import small, timed
from torchlinearmoe.benchmark.multi.rows import Row, compared, failed, rated
from torchlinearmoe.benchmark.multi.shapes import longest_of, span_of, steps_of
from torchlinearmoe.mixers import MIXERS

LIMIT = 420
QUICK_MIXERS = ("linear_attention", "gla", "mamba2", "gated_delta_net")
"""One of each way to decay."""
CONDITIONED = {"rwkv6": {"norm_eps": 0.1}, "rwkv7": {"norm_eps": 0.1}, "kda": {"norm_eps": 0.01}}
"""Their norms would amplify roundings of small outputs from step to step."""


def runs(host: Host) -> Runs:
    """Speeds, then losses; what matters most comes first: the limit may end the rest."""
    models = _models(host).values()
    alone = [{"kind": "losses", "recipe": small(host, model=model)} for model, _ in models]
    spread = [{"kind": "losses", "recipe": small(host, model=model, parallel=parallel)} for model, parallel in models]
    return Runs(alone, [*_speeds(host), *spread])


def run(host: Host) -> Iterator[Row]:
    """Rows of the speeds, of the losses, and of the longest sequences."""
    wanted, models = runs(host), _models(host)
    dp, cp, profile, hybrid, *spread = host.measure(wanted.every)
    yield rated("data parallel", dp)
    yield rated("LASP-2, speed", cp, dp, "data parallel")
    yield failed("LASP-2, gather", profile["error"]) if "error" in profile else _hidden(profile)
    yield rated("LASP-2H, speed", hybrid)
    for name, found, expected in zip(models, spread, host.measure(wanted.one, 1)):
        yield compared(name, found, expected, host.cuda)
    if not host.quick:
        yield from _longest(host)


def _speeds(host: Host) -> list[Run]:
    """Runs: data parallel, LASP-2, its profile, LASP-2H."""
    span, steps = span_of(host), steps_of(host)
    linear, hybrid = {"layout": "L"}, {"layout": "LLLN"}
    dp = timed(host, length=span, sequences=1, model=linear, parallel={"data_shard": host.ranks})
    cp = timed(host, length=span * host.ranks, sequences=1, model=linear, parallel=linear_only(host))
    lasp2h = timed(host, length=span * host.ranks, sequences=1, model=hybrid, parallel=gathered(host))
    return [
        {"kind": "speed", "recipe": dp, "steps": steps},
        {"kind": "speed", "recipe": cp, "steps": steps},
        {"kind": "overlap", "recipe": cp, "steps": 3},
        {"kind": "speed", "recipe": lasp2h, "steps": steps},
    ]


def _models(host: Host) -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """Models whose losses are compared, each with the degrees it is spread by."""
    names = QUICK_MIXERS if host.quick else [name for name in MIXERS if not MIXERS[name].keeps_past]
    models: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {"LASP-2H": ({}, gathered(host))}
    for name in names:
        layers = {"mixer": name, "layout": "L", "num_layers": 2, **CONDITIONED.get(name, {})}
        models[f"LASP-2, {name}"] = (layers, linear_only(host))
    return models


def linear_only(host: Host) -> dict[str, Any]:
    """The degrees of a model without softmax layers."""
    return {"data_shard": 1, "context": host.ranks}


def gathered(host: Host) -> dict[str, Any]:
    """And of one whose softmax layers gather keys and values."""
    return {**linear_only(host), "context_attention": "gather"}


def _hidden(profile: dict[str, Any]) -> Row:
    if profile["hidden_share"] is None:
        return {"case": "LASP-2, gather", "result": "left out", "note": "the profile has no kernels of a gather"}
    return {"case": "LASP-2, gather", "result": "timed", **profile}


def _longest(host: Host) -> Iterator[Row]:
    lengths = []
    length = 2 * span_of(host) * host.ranks
    while length <= longest_of(host):
        lengths.append(length)
        length *= 2
    for name, layout, degrees in (("LASP-2", "L", linear_only(host)), ("LASP-2H", "LLLN", gathered(host))):
        recipes = [
            timed(host, length=n, sequences=1, parallel=degrees, model={"layout": layout}, checkpointing="full")
            for n in lengths
        ]
        found = host.measure([{"kind": "speed", "recipe": recipe, "steps": 2} for recipe in recipes], rising=True)
        fit = [(length, figures) for length, figures in zip(lengths, found) if "error" not in figures]
        wrong = [(length, figures["error"]) for length, figures in zip(lengths, found) if "error" in figures]
        case = f"{name}, longest"
        if not fit:
            yield failed(case, wrong[0][1])
            continue
        row = rated(case, fit[-1][1]) | {"tokens": fit[-1][0]}
        yield row | ({"note": f"{wrong[0][0]} tokens: {wrong[0][1]}"[:100]} if wrong else {})
