"""The token shift: y_t = x_{t-1} inside the document.

Legend: T tokens of the stream, D channels, N segments.
"""

from torch import Tensor

from torchlinearmoe.kernels.choose import choose
from torchlinearmoe.kernels.operator import Budget, Call, Operator
from torchlinearmoe.kernels.states import check_segments, check_shape, facts_of
from torchlinearmoe.segments import Segments

OPERATOR = Operator("token_shift", ("token_shift",))


def token_shift(
    x: Tensor,
    *,
    segments: Segments,
    initial_state: Tensor | None = None,
    want_final: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """The token before each; x: [T, D]; initial_state: the input before each segment, [N, 1, D].

    Returns y [T, D] and the last input of each segment [N, 1, D] or None, both in x's dtype.
    """
    T, D = x.shape
    check_segments(segments, T)
    if initial_state is not None:
        check_shape("initial_state", initial_state, (segments.count, 1, D))
    facts = facts_of(segments, initial_state is not None, want_final)
    chosen = choose(OPERATOR, backend, Call("token_shift", x.device.type, x.dtype, **facts))
    return chosen.run(x, segments, initial_state, want_final)


def budget(tokens: int, channels: int, itemsize: int = 2) -> Budget:
    """Of `tokens` tokens: one read and one write each way."""
    row = channels * itemsize
    return Budget(flops=0.0, forward_bytes=2.0 * tokens * row, backward_bytes=2.0 * tokens * row, saved_bytes=0.0)
