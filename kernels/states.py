"""What every recurrence checks of the states that go in."""

from __future__ import annotations

from torch import Tensor

from torchlinearmoe.precision import wide_type
from torchlinearmoe.segments import Segments


def check_shape(name: str, x: Tensor, shape: tuple[int, ...]) -> None:
    """ValueError where `x` has another shape."""
    if tuple(x.shape) != shape:
        raise ValueError(f"{name}: shape {tuple(x.shape)}, legal: {shape}")


def check_segments(segments: Segments, tokens: int) -> None:
    """ValueError where the segments are not of a stream of so many tokens."""
    check_shape("segments", segments.ids, (tokens,))


def facts_of(segments: Segments, initial: bool, want_final: bool) -> dict[str, bool]:
    """What a `Call` says of states."""
    return {"states": initial or want_final, "single": segments.single and initial}


def checked_state(x: Tensor | None, shape: tuple[int, ...], segments: Segments, like: Tensor) -> Tensor | None:
    """An initial state [N, *shape] in float32, float64 where `like` is."""
    if x is None:
        return None
    check_shape("initial_state", x, (segments.count, *shape))
    return x.to(wide_type(like.dtype))
