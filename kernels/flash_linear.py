"""What the backends of flash-linear-attention (package fla-core, written against 0.6.0) have in common.

Gates and states are float32. Odd head dims are padded, because the backward of 16-bit values refuses them. Gates must
be finite. Its kernels round float32 to TF32 and are tuned by timings, minutes from a cold cache.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from torchlinearmoe.kernels.operator import HOPPER, NARROW, Call, Defect
from torchlinearmoe.kernels.rows import rows_of
from torchlinearmoe.segments import Segments

DECLARED: dict[str, Any] = {
    "name": "fla",
    "order": 30,
    "dtypes": NARROW,
    "devices": frozenset(("cuda",)),
    "needs": ("fla", "triton", "einops"),
    "install": "pip install fla-core",
    "exact": False,
}
"""What they all declare."""


def gated_defect(*kinds: str, dtypes: tuple[torch.dtype, ...] = ()) -> Defect:
    """Of kernels with a gate per head, for calls of any dtype or of these."""
    return Defect(
        dtypes=frozenset(dtypes) or NARROW,
        kinds=frozenset(kinds),
        capability=HOPPER,
        triton=((3, 4, 0), (3, 7, 1)),
        backward_only=True,
        reason="Triton 3.4.0 to 3.7.0 miscompiles its backward pass on Hopper GPUs "
        "(https://github.com/fla-org/flash-linear-attention/issues/640)",
        way_out="install Triton 3.7.1 or newer, or use 'auto' or 'torch'",
    )


def narrow_defect(*kinds: str, channels: int = 32) -> Defect:
    """Of kernels without one, for keys of at most so many channels."""
    return Defect(
        kinds=frozenset(kinds),
        capability=HOPPER,
        triton=((3, 4, 0), (3, 7, 1)),
        backward_only=True,
        # Seen with Triton 3.6.0, 32 channels of keys and 64 of values, of the delta rule 34 and 18, under some of the
        # tuner's configurations.
        reason="the backward pass of https://github.com/fla-org/flash-linear-attention/issues/640 reads outside its "
        f"tensors for keys of at most {channels} channels on Hopper GPUs",
        way_out="install Triton 3.7.1 or newer, or use 'auto' or 'torch'",
        channels=channels,
    )


def at_most_256_channels(call: Call) -> str | None:
    """Refuses wider keys."""
    return "it takes keys of at most 256 channels" if call.channels > 256 else None


def run(
    function: str,
    tokens: dict[str, Tensor],
    fixed: dict[str, Any],
    scale: float,
    segments: Segments,
    initial: tuple[Tensor, ...] | None,
    want_final: bool,
) -> tuple[Tensor, tuple[Tensor, ...] | None]:
    """Call `fla.ops.<function>` with `tokens` [T, ...], `fixed`, which has no tokens, and one state or several."""
    rows = rows_of(segments)
    arguments: dict[str, Any] = {"scale": scale, "output_final_state": want_final, **fixed}
    for name, x in tokens.items():
        # Plain rows spare their kernels the borders.
        arguments[name] = (rows.split(x) if rows.even else x[None]).contiguous()
    if not rows.even:
        arguments |= {"cu_seqlens": rows.borders, "cu_seqlens_cpu": rows.borders_host}
    if initial is not None:
        entering = [rows.select(x).contiguous() for x in initial]
        arguments["initial_state"] = tuple(entering) if len(entering) > 1 else entering[0]
    o, final = getattr(importlib.import_module("fla.ops"), function)(**arguments)
    o = rows.join(o) if rows.even else o[0]
    if not want_final:
        return o, None
    finals = tuple(final) if isinstance(final, (list, tuple)) else (final,)
    return o, tuple(rows.restore(x, None if initial is None else initial[i]) for i, x in enumerate(finals))


def even_state(initial: Tensor | None) -> tuple[Tensor] | None:
    """The initial state with even dims."""
    return None if initial is None else (even(even(initial).mT).mT,)


def even(x: Tensor) -> Tensor:
    """x with a column of zeros after an odd last dim."""
    return F.pad(x, (0, 1)) if x.shape[-1] % 2 else x


def gate(log_decay: Tensor | None) -> Tensor:
    """A gate in float32."""
    assert log_decay is not None
    return log_decay.float()


def without_final(o: Tensor, final: tuple[Tensor, ...] | None, K: int, V: int) -> tuple[Tensor, Tensor | None]:
    """Output and state with the padding cut off."""
    return o[..., :V], None if final is None else final[0][..., :K, :V]
