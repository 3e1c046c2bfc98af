"""Context parallelism over all ranks: LASP-2 (Sun et al. 2025, arXiv 2502.07563) and on hybrids LASP-2H.

Losses at a short length, of every linear mixer and of a hybrid whose softmax layers gather keys and values. Speed at a
long one: tokens of one sequence over all ranks beside pure data parallelism, where each rank has a sequence of its own
as long as its span was. How much of the gather of states a profile shows hidden. The longest sequence that fits.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torchlinearmoe.benchmark.multi.host import Host, Run, Runs
from torchlinearmoe.benchmark.multi.models import Tables, small, timed
from torchlinearmoe.benchmark.multi.rows import Row, compared, failed, rated
from torchlinearmoe.benchmark.multi.shapes import longest_of, span_of, steps_of
from torchlinearmoe.mixers import MIXERS

LIMIT = 540
TIMED_MIXERS = ("hgrn2", "gated_delta_net")
"""A diagonal A, and a dense one."""
WARM_SECONDS = 100
"""For compilers, before anything is timed."""
TIMED_STEPS = 9
QUICK_MIXERS = ("linear_attention", "gla", "mamba2", "gated_delta_net")
"""One of each way to decay."""
CONDITIONED = {"rwkv6": {"norm_eps": 0.1}, "rwkv7": {"norm_eps": 0.1}, "kda": {"norm_eps": 0.01}}
"""Their norms would amplify roundings of small outputs from step to step."""


def runs(host: Host) -> Runs:
    """Speeds, then losses; what matters most comes first: the limit may end the rest."""
    models = _models(host).values()
    alone = [{"kind": "losses", "recipe": small(host, model=model)} for model, _ in models]
    spread = [{"kind": "losses", "recipe": small(host, model=model, parallel=parallel)} for model, parallel in models]
    speeds = [run for pair in _pairs(host).values() for run in pair]
    return Runs(alone, [*speeds, *_others(host), *spread])


def run(host: Host) -> Iterator[Row]:
    """Rows of the speeds, of the losses, and of the longest sequences, each as it is found."""
    wanted, models = runs(host), _models(host)
    if host.cuda and not host.quick:
        host.beside(_warm(host), WARM_SECONDS)
    figures = host.each(wanted.every)
    for name in _pairs(host):
        dp, cp = next(figures), next(figures)
        yield rated(f"data parallel, {name}", dp)
        yield rated(f"LASP-2, {name}", cp, dp, "data parallel")
    profile, hybrid = next(figures), next(figures)
    yield failed("LASP-2, gather", profile["error"]) if "error" in profile else _hidden(profile)
    yield rated("LASP-2H, speed", hybrid)
    spread = list(figures)
    for name, found, expected in zip(models, spread, host.each(wanted.one, 1)):
        yield compared(name, found, expected, host.cuda)
    if not host.quick:
        yield from _longest(host)


def _pairs(host: Host) -> dict[str, tuple[Run, Run]]:
    """Data parallel and LASP-2, by mixer and whether it is compiled."""
    given = host.overrides.get("model", {}).get("mixer")
    mixers = (given,) if given else TIMED_MIXERS[:1] if host.quick else TIMED_MIXERS
    steps = min(steps_of(host), TIMED_STEPS)
    ways = (False, True) if host.cuda and not host.quick else (host.compiled,)
    return {
        f"{mixer}, {'compiled' if compiled else 'eager'}": (
            {"kind": "speed", "recipe": _apart(host, mixer, compiled), "steps": steps},
            {"kind": "speed", "recipe": _together(host, mixer, compiled), "steps": steps},
        )
        for mixer in mixers
        for compiled in ways
    }


def _others(host: Host) -> list[Run]:
    """The profile of LASP-2, and the speed of LASP-2H."""
    length = span_of(host) * host.ranks
    lasp2h = timed(host, length=length, sequences=1, model={"layout": "LLLN"}, parallel=gathered(host))
    return [
        {"kind": "overlap", "recipe": _together(host, TIMED_MIXERS[0], host.compiled), "steps": 3},
        {"kind": "speed", "recipe": lasp2h, "steps": steps_of(host)},
    ]


def _warm(host: Host) -> list[list[Run]]:
    """The kernels and graphs of all that is timed, of models with one layer: all of them compile at once."""
    return [
        [
            {"kind": "warm", "recipe": run["recipe"] | {"model": run["recipe"]["model"] | {"num_layers": 1}}}
            for run in pair
        ]
        for pair in _pairs(host).values()
    ]


def _apart(host: Host, mixer: str, compiled: bool) -> Tables:
    return timed(
        host,
        length=span_of(host),
        sequences=1,
        model={"layout": "L", "mixer": mixer},
        parallel={"data_shard": host.ranks},
        compiled=compiled,
    )


def _together(host: Host, mixer: str, compiled: bool) -> Tables:
    return timed(
        host,
        length=span_of(host) * host.ranks,
        sequences=1,
        model={"layout": "L", "mixer": mixer},
        parallel=linear_only(host),
        compiled=compiled,
    )


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
