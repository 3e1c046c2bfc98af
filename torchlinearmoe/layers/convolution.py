"""Short convolutions and the token shift: what sees the last few tokens of a document, on whatever rank they are.

Shapes: T tokens, N documents, C channels, W taps.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import Placement, Shard

from torchlinearmoe.initialize import Uniform, set_initializers
from torchlinearmoe.kernels.convolution import short_convolution
from torchlinearmoe.kernels.operator import outside_graphs
from torchlinearmoe.kernels.token_shift import token_shift as shift_kernel
from torchlinearmoe.layers.past import After, Carry, Past, Spanned, StateSpec
from torchlinearmoe.module import Module
from torchlinearmoe.parallel.exchange.tails import entering_inputs


class ShortConvolution(Module):
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
            (x,), (entering,) = entering_inputs([x], past.segments.ids, past.spans, self.taps - 1)
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
        """Of every convolution."""
        placements: dict[str, Placement] = {}
        for name, conv in self._convolutions():
            placements |= conv.tensor_parallel(f"{prefix}.{name}")
        return placements

    def forward(self, inputs: dict[str, Tensor], past: Past) -> tuple[dict[str, Tensor], After]:
        """Convolve each named input [T, C] that has a convolution; its state goes in and comes out as `conv_NAME`."""
        entering: dict[str, Tensor] = {}
        if isinstance(past, Spanned) and self.taps > 1:
            convolved = {name: x for name, x in inputs.items() if name in self}
            parts, together = entering_inputs(list(convolved.values()), past.segments.ids, past.spans, self.taps - 1)
            inputs = inputs | dict(zip(convolved, parts, strict=True))
            entering = dict(zip(convolved, together, strict=True))
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
    (x,), (entering,) = entering_inputs([x], past.segments.ids, past.spans, 1)
    return shift_kernel(x, segments=past.segments, initial_state=past.first_states(entering))[0]
