"""The short convolution: y_t = activation(bias + sum_j weight[:, j] x_{t - (W - 1) + j}), causal and depthwise.

Legend: T tokens of the stream, D channels, W kernel width, N segments.
"""

from torch import Tensor

from torchlinearmoe.kernels.choose import choose
from torchlinearmoe.kernels.operator import Budget, Call, Operator
from torchlinearmoe.kernels.states import check_segments, check_shape, facts_of
from torchlinearmoe.segments import Segments

OPERATOR = Operator("convolution", ("convolution",))


def short_convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    segments: Segments,
    activation: str | None = None,
    initial_state: Tensor | None = None,
    want_final: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """The convolution inside every segment.

    x: [T, D]; weight: [D, W]; bias: [D]; activation: None or "silu"; initial_state: the W - 1 inputs before each
    segment, oldest first, [N, W - 1, D]. Returns y [T, D] and the last W - 1 inputs [N, W - 1, D] or None, both in x's
    dtype.
    """
    T, D = x.shape
    W = weight.shape[-1]
    check_segments(segments, T)
    check_shape("weight", weight, (D, W))
    if bias is not None:
        check_shape("bias", bias, (D,))
    if activation not in (None, "silu"):
        raise ValueError(f"activation: {activation!r}, legal: None, 'silu'")
    if initial_state is not None:
        check_shape("initial_state", initial_state, (segments.count, W - 1, D))
    facts = facts_of(segments, initial_state is not None, want_final)
    chosen = choose(OPERATOR, backend, Call("convolution", x.device.type, x.dtype, **facts))
    return chosen.run(x, weight, bias, activation, segments, initial_state, want_final)


def short_convolution_flops(channels: int, width: int) -> float:
    """FLOPs a token of a forward pass."""
    return 2.0 * channels * width


def budget(tokens: int, channels: int, width: int, itemsize: int = 2) -> Budget:
    """Of `tokens` tokens: forward reads x and writes y, backward reads x and y's gradient and writes x's."""
    row = channels * itemsize
    return Budget(
        flops=tokens * short_convolution_flops(channels, width),
        forward_bytes=2.0 * tokens * row,
        backward_bytes=3.0 * tokens * row,
        saved_bytes=tokens * row,
    )
