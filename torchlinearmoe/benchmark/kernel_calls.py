"""The calls that `benchmark kernels` times: inputs as a model makes them, and the operator's budget beside them.

Shapes: T tokens, H heads of width K = V; Mamba2 has 4 H heads of half that width, its state is K wide.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from torchlinearmoe.kernels import convolution, delta, dplr, linear, quadratic, slots, ssd, token_shift
from torchlinearmoe.kernels.operator import Budget, Operator
from torchlinearmoe.kernels.slots.kinds import FEWEST
from torchlinearmoe.segments import Segments

SLOTS = 64
FEATURES = 16
"""Width of queries and keys under quadratic attention, as in Based."""
TAPS = 4
RWKV7_BOUND = -math.exp(-0.5)
"""Of its log decays."""


@dataclass(frozen=True)
class Timed:
    """One call with its cost."""

    operator: Operator
    kind: str
    function: Callable[..., Any]
    inputs: dict[str, Tensor]
    """With gradients."""
    options: dict[str, Any]
    budget: Budget
    channels: int

    def run(self, backend: str) -> Tensor:
        """The output."""
        return self.function(**self.inputs, **self.options, backend=backend)[0]


def timed_call(
    operator: str, kind: str, lengths: tuple[int, ...], heads: int, width: int, device: torch.device, dtype: torch.dtype
) -> Timed:
    """A call of the kind over documents of `lengths` tokens."""
    draw = _Draw(sum(lengths), heads, width, device, dtype)
    inputs, options, budget, channels = _CALLS[operator](draw, kind)
    module = {m.OPERATOR.name: m for m in (convolution, delta, dplr, linear, quadratic, slots, ssd, token_shift)}
    function = getattr(module[operator], _FUNCTIONS[operator])
    leaves = {name: x.requires_grad_() for name, x in inputs.items()}
    options |= {"segments": Segments.of_lengths(lengths, device)}
    return Timed(module[operator].OPERATOR, kind, function, leaves, options, budget, channels)


@dataclass(frozen=True)
class _Draw:
    T: int
    H: int
    K: int
    device: torch.device
    dtype: torch.dtype

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, device=self.device).to(self.dtype)

    def unit(self, *shape: int) -> Tensor:
        return F.normalize(torch.randn(*shape, device=self.device), dim=-1).to(self.dtype)

    def decays(self, *shape: int) -> Tensor:
        """float32 log decays, mostly mild."""
        return F.logsigmoid(torch.randn(*shape, device=self.device) + 3)


Call = tuple[dict[str, Tensor], dict[str, Any], Budget, int]


def _linear(d: _Draw, kind: str) -> Call:
    inputs = {"q": d.normal(d.T, d.H, d.K), "k": d.unit(d.T, d.H, d.K), "v": d.normal(d.T, d.H, d.K)}
    options: dict[str, Any] = {}
    if kind == "constant":
        options["log_decay"] = -torch.rand(d.H, device=d.device) / 16
    elif kind != "identity":
        inputs["log_decay"] = d.decays(*((d.T, d.H) if kind == "scalar" else (d.T, d.H, d.K)))
    if kind == "bonus":
        inputs["bonus"] = torch.randn(d.H, d.K, device=d.device)
    return inputs, options, linear.budget(kind, d.T, d.H, d.K, d.K, d.dtype.itemsize), d.K


def _delta(d: _Draw, kind: str) -> Call:
    inputs = {"q": d.unit(d.T, d.H, d.K), "k": d.unit(d.T, d.H, d.K), "v": d.normal(d.T, d.H, d.K)}
    inputs["beta"] = torch.rand(d.T, d.H, device=d.device)
    if kind != "plain":
        inputs["log_decay"] = d.decays(*((d.T, d.H) if kind == "gated" else (d.T, d.H, d.K)))
    return inputs, {}, delta.budget(kind, d.T, d.H, d.K, d.K, d.dtype.itemsize), d.K


def _dplr(d: _Draw, kind: str) -> Call:
    inputs = {name: d.normal(d.T, d.H, d.K) for name in ("q", "k", "v")}
    removal = d.unit(d.T, d.H, d.K)
    decay = RWKV7_BOUND * torch.sigmoid(torch.randn(d.T, d.H, d.K, device=d.device))
    inputs |= {"a": -removal, "b": removal * torch.rand_like(removal), "log_decay": decay}
    return inputs, {"lower_bound": RWKV7_BOUND}, dplr.budget(kind, d.T, d.H, d.K, d.K, d.dtype.itemsize), d.K


def _slots(d: _Draw, kind: str) -> Call:
    number = SLOTS if kind == "slots" else FEWEST // 2
    decay = d.decays(d.T, d.H, number)
    inputs = {"q": d.normal(d.T, d.H, d.K), "k": d.normal(d.T, d.H, d.K), "v": d.normal(d.T, d.H, d.K)}
    inputs |= {"s": (1 - decay.exp()).to(d.dtype), "log_decay": decay}
    return inputs, {}, slots.budget(d.T, d.H, d.K, d.K, number, d.dtype.itemsize), d.K


def _quadratic(d: _Draw, kind: str) -> Call:
    inputs = {"q": d.normal(d.T, d.H, FEATURES), "k": d.normal(d.T, d.H, FEATURES), "v": d.normal(d.T, d.H, d.K)}
    budget = quadratic.budget(kind, d.T, d.H, FEATURES, d.K, d.dtype.itemsize)
    return inputs, {"kind": kind, "eps": 1.0}, budget, FEATURES


def _ssd(d: _Draw, kind: str) -> Call:
    H, V = 4 * d.H, d.K // 2
    inputs = {"x": d.normal(d.T, H, V), "dt": F.softplus(torch.randn(d.T, H, device=d.device) - 3)}
    inputs |= {"A": -torch.rand(H, device=d.device) - 0.5, "B": d.normal(d.T, 1, d.K), "C": d.normal(d.T, 1, d.K)}
    return inputs, {}, ssd.budget(d.T, H, 1, d.K, V, d.dtype.itemsize), d.K


def _convolution(d: _Draw, kind: str) -> Call:
    D = d.H * d.K
    inputs = {"x": d.normal(d.T, D), "weight": d.normal(D, TAPS)}
    return inputs, {"activation": "silu"}, convolution.budget(d.T, D, TAPS, d.dtype.itemsize), 0


def _token_shift(d: _Draw, kind: str) -> Call:
    D = d.H * d.K
    return {"x": d.normal(d.T, D)}, {}, token_shift.budget(d.T, D, d.dtype.itemsize), 0


_CALLS: dict[str, Callable[[_Draw, str], Call]] = {
    "linear": _linear,
    "ssd": _ssd,
    "delta": _delta,
    "dplr": _dplr,
    "slots": _slots,
    "quadratic": _quadratic,
    "convolution": _convolution,
    "token_shift": _token_shift,
}
_FUNCTIONS = {
    "linear": "linear_recurrence",
    "ssd": "ssd",
    "delta": "delta_rule",
    "dplr": "dplr_rule",
    "slots": "slot_attention",
    "quadratic": "quadratic_attention",
    "convolution": "short_convolution",
    "token_shift": "token_shift",
}
OPERATORS = tuple(_CALLS)
