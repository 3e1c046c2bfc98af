"""Quadratic attention: both polynomials, with and without the division, states, awkward documents."""

from __future__ import annotations

from functools import partial

from cases import Case
from cases.recurrences import STREAMS, normal, stream, strided
from torchlinearmoe.kernels.quadratic import quadratic_attention
from torchlinearmoe.kernels.quadratic.features import KINDS, feature_width


def case(
    kind: str, lengths: tuple[int, ...], states: str, H: int = 2, K: int = 4, V: int = 6, normalize: bool = True
) -> Case:
    """A call of the kind; denominators of squares stay away from zero."""
    T, F = sum(lengths), feature_width(kind, K)
    inputs = {"q": strided(T, H, K), "k": normal(T, H, K), "v": strided(T, H, V)}
    if "in" in states:
        inputs["initial_state"] = normal(len(lengths), H, F, V + normalize)
        inputs["initial_state"][..., -1] = normal(len(lengths), H, F).abs()
    options = stream(lengths, states) | {"kind": kind, "normalize": normalize, "eps": 1.0, "scale": 0.3}
    return Case(kind, quadratic_attention, inputs, options, wide=("initial_state",), tolerance=10, channels=K)


CASES = [
    *(partial(case, kind, *where) for kind in KINDS for where in STREAMS),
    *(partial(case, kind, (140, 3), "in out", K=5, V=3, normalize=False) for kind in KINDS),
    *(partial(case, kind, (1,) * 5, "in out") for kind in KINDS),
]
