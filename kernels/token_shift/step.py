"""The token shift of one token a document: decoding."""

from torch import Tensor

from torchlinearmoe.kernels.operator import Backend
from torchlinearmoe.segments import Segments


def token_shift_step(
    x: Tensor, segments: Segments, initial_state: Tensor, want_final: bool
) -> tuple[Tensor, Tensor | None]:
    """As the operator, with T = N: the token before, and the new state."""
    return initial_state[:, 0].to(x.dtype), x.unsqueeze(1) if want_final else None


BACKEND = Backend("step", token_shift_step, ("token_shift",), order=0, fused=True, single=True)
