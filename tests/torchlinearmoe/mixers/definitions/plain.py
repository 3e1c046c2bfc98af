"""What the definitions share: a layer as they see it, and formulas in plain steps, of single tokens and heads.

Every other file here is a mixer as its paper has it, or a few papers' common part: `definition(layer, x [T, D])` is the
output [T, D] of one layer for one document that starts empty. It reads the layer's weights by their names and uses no
code of the library, so that an error which all of the library's ways to compute a mixer share is found.

A mixer whose state is read by a product with the query is said in four parts, of which mixtures of memories are made
too: `query(layer, x)`, what a token reads with; `write(layer, x)`, what it writes by, keys and values first;
`step(state, *what a token writes by)`, the recurrence of one head; `output(layer, reads, x)`.

Shapes: T tokens, D width, H heads, G heads of what is written, K and V key and value width of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layer:
    """One layer of a mixer: what it is made of and where it stands, and nothing of its code."""

    options: Any
    """Of the mixer."""
    sections: Mapping[str, Any]
    """Options of every mixer that this one reads the section of."""
    model: Any
    """The fields of `[model]`."""
    index: int
    """Among all layers, which are all of this mixer."""
    weights: Mapping[str, Tensor]
    shared: Mapping[str, Tensor]
    """Weights that all layers have together."""
    carried: dict[str, Tensor]
    """What an earlier layer left for later ones about the document, [T, ...] each."""

    @property
    def heads(self) -> int:
        return self.options.heads or self.model.num_heads

    @property
    def width(self) -> int:
        """Of a head."""
        return self.options.head_dim or self.model.hidden_size // self.model.num_heads

    def linear(self, name: str, x: Tensor) -> Tensor:
        """W x, + b where there is one."""
        y = x @ self.weights[f"{name}.weight"].T
        return y + self.weights[f"{name}.bias"] if f"{name}.bias" in self.weights else y

    def project(self, name: str, x: Tensor) -> Tensor:
        """The projection `name`, and its short convolution where there is one, without an activation."""
        y, convolution = self.linear(f"{name}_proj", x), f"convs.{name}"
        if f"{convolution}.weight" not in self.weights:
            return y
        taps = self.weights[f"{convolution}.weight"]
        last = taps.shape[1] - 1
        z = sum((taps[:, last - age] * delayed(y, age) for age in range(last + 1)), torch.zeros_like(y))
        return z + self.weights[f"{convolution}.bias"] if f"{convolution}.bias" in self.weights else z


def delayed(x: Tensor, age: int) -> Tensor:
    """What was there `age` tokens before each token; zeros before the document."""
    return torch.cat([torch.zeros_like(x[:age]), x])[: x.shape[0]]


def split(x: Tensor, width: int) -> Tensor:
    """[T, H K] -> [T, H, K]."""
    return torch.stack([x[:, n : n + width] for n in range(0, x.shape[1], width)], 1)


def join(x: Tensor) -> Tensor:
    """[T, H, K] -> [T, H K]."""
    return torch.cat([x[:, h] for h in range(x.shape[1])], 1)


def spread(x: Tensor, heads: int) -> Tensor:
    """[T, G, ...] -> [T, H, ...]: neighbouring heads have one of G in common."""
    return torch.stack([x[:, h * x.shape[1] // heads] for h in range(heads)], 1)


def recurrence(step: Callable[..., Tensor], q: Tensor, *written: Tensor) -> Tensor:
    """S_t = step(S_{t-1}, what token t writes by) [K, V], o_t = S_t^T q_t: [T, H, V]."""
    k, v = written[:2]
    reads = []
    for h in range(q.shape[1]):
        state, o = zeros(k.shape[2], v.shape[2]), []
        for q_t, *written_t in zip(*(x[:, h].unbind() for x in (q, *written))):
            state = step(state, *written_t)
            o.append(state.T @ q_t)
        reads.append(torch.stack(o))
    return torch.stack(reads, 1)


def gated_heads(layer: Layer, o: Tensor, x: Tensor) -> Tensor:
    """W_o (RMSNorm(o) * swish(W_g x)), a norm a head with the same weight for all: a common way out."""
    gate = split(layer.linear("g_proj", x), o.shape[2])
    return layer.linear("o_proj", join(normed(layer, o) * activated(layer, gate)))


def normed(layer: Layer, o: Tensor) -> Tensor:
    """RMSNorm(o), or o itself where the layer has no norm."""
    if layer.options.output_norm == "none":
        return o
    return rms(o, getattr(layer.options, "norm_eps", 0) or layer.model.norm_eps) * layer.weights["norm.weight"]


def activated(layer: Layer, gate: Tensor) -> Tensor:
    """swish of the gate, or its sigmoid."""
    return {"swish": swish, "sigmoid": sigmoid}[layer.options.gate_activation](gate)


def turned(a: Tensor, b: Tensor, theta: float) -> tuple[Tensor, Tensor]:
    """Real and imaginary part of (a + b i) e^(i t theta^(-n / N)) at token t, channel n of N; a, b: [T, ..., N]."""
    rows = []
    for t, (x, y) in enumerate(zip(a, b)):
        angle = t * theta ** -(torch.arange(a.shape[-1]).double() / a.shape[-1])
        c, s = torch.cos(angle), torch.sin(angle)
        rows.append((x * c - y * s, x * s + y * c))
    real, imaginary = zip(*rows)
    return torch.stack(real), torch.stack(imaginary)


def rotated(x: Tensor, theta: float) -> Tensor:
    """Rotary positions: channels n and n + K / 2 are one complex number."""
    half = x.shape[-1] // 2
    return torch.cat(turned(x[..., :half], x[..., half:], theta), -1)


def zeros(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.float64)


def eye(width: int) -> Tensor:
    return torch.eye(width, dtype=torch.float64)


def sigmoid(x: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-x))


def swish(x: Tensor) -> Tensor:
    return x * sigmoid(x)


def softplus(x: Tensor) -> Tensor:
    return torch.log(1 + torch.exp(x))


def softmax(x: Tensor) -> Tensor:
    """Over the last dim."""
    e = torch.exp(x - x.detach().amax(-1, keepdim=True))
    return e / e.sum(-1, keepdim=True)


def rms(x: Tensor, eps: float) -> Tensor:
    """Vectors over their root mean square."""
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps)


def normal(x: Tensor, eps: float) -> Tensor:
    """Vectors less their mean, over their standard deviation."""
    return rms(x - x.mean(-1, keepdim=True), eps)


def unit(x: Tensor, eps: float = 1e-6) -> Tensor:
    """Vectors over their length."""
    return x / torch.sqrt((x * x).sum(-1, keepdim=True) + eps)


MAPS: dict[str, Callable[[Tensor], Tensor]] = {
    "elu": lambda x: torch.where(x > 0, x + 1, torch.exp(x)),
    "relu": lambda x: torch.where(x > 0, x, 0.0),
    "silu": swish,
    "identity": lambda x: x,
}
"""Feature maps of single numbers."""
