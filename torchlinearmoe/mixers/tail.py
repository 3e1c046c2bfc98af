"""Parts that linear mixers share: short convolutions, the token shift, the norms before the output, grouped heads.

Shapes: T tokens, H heads, V value width of a head, W convolution width, C channels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import Placement, Shard

from torchlinearmoe.initialize import ONES, Uniform, set_initializers
from torchlinearmoe.kernels.convolution import short_convolution
from torchlinearmoe.kernels.heads import repeat_heads
from torchlinearmoe.kernels.norm import rms_norm
from torchlinearmoe.kernels.operator import outside_graphs
from torchlinearmoe.kernels.token_shift import token_shift as shift_kernel
from torchlinearmoe.mixers.base import Carry, StateSpec
from torchlinearmoe.mixers.past import After, Past, Spanned
from torchlinearmoe.parallel.exchange.tails import entering_inputs


class ShortConvolution(nn.Module):
    """Causal depthwise convolution over a document's last W tokens (Fu et al. 2022, arXiv 2212.14052).

    `activation`: None or "silu". Stops at document borders; its state is the last W - 1 inputs.
    """

    def __init__(self, width: int, taps: int, bias: bool = False, activation: str | None = "silu") -> None:
        super().__init__()
        self.taps = taps
        self.activation = activation
        self.weight = nn.Parameter(torch.empty(width, taps))
        self.bias = nn.Parameter(torch.empty(width)) if bias else None
        reach = taps**-0.5
        set_initializers(self, weight=Uniform(-reach, reach), **({"bias": Uniform(-reach, reach)} if bias else {}))

    def state_spec(self) -> StateSpec:
        """The last W - 1 inputs."""
        return StateSpec((self.taps - 1, self.weight.shape[0]), Carry.LAST_TOKENS, fp32=False)

    def forward(
        self, x: Tensor, past: Past, state: Tensor | None, entering: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """[T, C] -> [T, C], and the state that comes out where one went in: [N, W - 1, C].

        entering: what `entering_inputs` gives for x under context parallelism, where it is known.
        """
        if isinstance(past, Spanned) and self.taps > 1:
            return self._spanned(x, past, entering), None
        y, last = short_convolution(
            x,
            self.weight,
            self.bias,
            segments=past.segments,
            activation=self.activation,
            initial_state=state,
            want_final=state is not None,
        )
        return y, None if last is None or state is None else last.to(state.dtype)

    @outside_graphs
    def _spanned(self, x: Tensor, past: Spanned, entering: Tensor | None) -> Tensor:
        if entering is None:
            entering = entering_inputs(x, past.segments.ids, past.spans, self.taps - 1)
        return short_convolution(
            x,
            self.weight,
            self.bias,
            segments=past.segments,
            activation=self.activation,
            initial_state=past.first_states(entering),
        )[0]

    def tensor_parallel(self, prefix: str) -> dict[str, Placement]:
        """Channels split with the heads."""
        return {f"{prefix}.{name}": Shard(0) for name, _ in self.named_parameters()}


class Convolutions(nn.ModuleDict):
    """A short convolution for each named projection; empty when switched off (0 taps).

    With `always_activate` the projections pass through SiLU then all the same.
    """

    def __init__(
        self,
        widths: dict[str, int],
        taps: int,
        activation: str | None = "silu",
        *,
        bias: bool = False,
        always_activate: bool = False,
    ) -> None:
        parts = widths.items() if taps else ()
        super().__init__({name: ShortConvolution(width, taps, bias, activation) for name, width in parts})
        self.taps = taps
        self.bare_silu = always_activate and not taps

    def state_spec(self) -> dict[str, StateSpec]:
        """`conv_NAME`: the last inputs of each projection."""
        return {f"conv_{name}": conv.state_spec() for name, conv in self._convolutions()}

    def tensor_parallel(self, prefix: str) -> dict[str, Placement]:
        """Words of every convolution."""
        words: dict[str, Placement] = {}
        for name, conv in self._convolutions():
            words |= conv.tensor_parallel(f"{prefix}.{name}")
        return words

    def forward(self, inputs: dict[str, Tensor], past: Past) -> tuple[dict[str, Tensor], After]:
        """Convolve each named input [T, C] that has a convolution; its state goes in and comes out as `conv_NAME`."""
        entering: dict[str, Tensor] = {}
        if isinstance(past, Spanned) and self.taps > 1:
            convolved = {name: x for name, x in inputs.items() if name in self}
            joined = torch.cat(list(convolved.values()), -1)
            together = entering_inputs(joined, past.segments.ids, past.spans, self.taps - 1)
            parts = together.split([x.shape[-1] for x in convolved.values()], -1)
            entering = dict(zip(convolved, parts, strict=True))
        outputs: dict[str, Tensor] = {}
        after: After = {}
        for name, x in inputs.items():
            if name in self:
                state = past.state.get(f"conv_{name}")
                outputs[name], after[f"conv_{name}"] = self[name](x, past, state, entering.get(name))
            else:
                outputs[name] = self._bare(x)
        return outputs, after

    def _bare(self, x: Tensor) -> Tensor:
        """A projection without a convolution."""
        return F.silu(x) if self.bare_silu else x

    def _convolutions(self) -> list[tuple[str, ShortConvolution]]:
        return [(name, conv) for name, conv in self.items() if isinstance(conv, ShortConvolution)]


def token_shift(x: Tensor, past: Past, state: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The token before each in its document, [T, D] -> [T, D]; the state, in and out, is the last input, [N, 1, D]."""
    if isinstance(past, Spanned):
        return _spanned_shift(x, past), None
    before, last = shift_kernel(x, segments=past.segments, initial_state=state, want_final=state is not None)
    return before, None if last is None or state is None else last.to(state.dtype)


@outside_graphs
def _spanned_shift(x: Tensor, past: Spanned) -> Tensor:
    state = past.first_states(entering_inputs(x, past.segments.ids, past.spans, 1))
    return shift_kernel(x, segments=past.segments, initial_state=state)[0]


class GatedHeadNorm(nn.Module):
    """RMSNorm(o) * weight * activation(gate) per head; statistics in float32, result in the gate's type."""

    def __init__(self, width: int, eps: float, activation: Callable[[Tensor], Tensor] = F.silu) -> None:
        super().__init__()
        self.eps = eps
        self.activation = activation
        self.weight = nn.Parameter(torch.empty(width))
        set_initializers(self, weight=ONES)

    def forward(self, o: Tensor, gate: Tensor) -> Tensor:
        """o, gate: [T, H, V] -> [T, H, V]."""
        return rms_norm(o, self.weight, self.eps, gate=gate, activation=self.activation)


class GroupedRMSNorm(nn.Module):
    """RMSNorm over each of `groups` equal groups of channels, one weight a channel; statistics in float32."""

    def __init__(self, width: int, groups: int, eps: float) -> None:
        super().__init__()
        self.group_width = width // groups
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(width))
        set_initializers(self, weight=ONES)

    def forward(self, x: Tensor) -> Tensor:
        """[..., C] -> [..., C]; the number of groups is read from the shape."""
        x, weight = (y.unflatten(-1, (-1, self.group_width)) for y in (x, self.weight))
        return rms_norm(x, weight, self.eps).flatten(-2)


def in_float32(x: Tensor) -> Tensor:
    """x in float32; float64 stays."""
    return x if x.dtype == torch.float64 else x.float()


def same_heads(*inputs: Any) -> Any:
    """Inputs [T, any divisor of H, ...] with their heads repeated to H, the most that any has; [H] and None pass."""
    heads = max(x.shape[1] for x in inputs if x is not None and x.dim() > 1)
    return tuple(x if x is None or x.dim() == 1 else repeat_heads(x, heads // x.shape[1]) for x in inputs)


def inverse_softplus_of_exp(log_y: Tensor) -> Tensor:
    """x with softplus(x) = exp(log_y), floored at 1e-4; with a uniform log_y, Mamba's initial step sizes."""
    y = log_y.exp().clamp(min=1e-4)
    return y + torch.log(-torch.expm1(-y))
