"""Weights in the type that decoding computes in, with the same exceptions as in training."""

from __future__ import annotations

import torch
from torch import nn

from torchlinearmoe.module import traits


def cast_weights(module: nn.Module, dtype: torch.dtype) -> None:
    """Cast the parameters of `module` to `dtype` in place, all but those inside modules marked `keep_fp32`.

    Those are the decays, routers and lower bounds that training computes in float32 as well. Buffers keep their types.
    """
    if traits(module).keep_fp32:
        return
    for parameter in module.parameters(recurse=False):
        parameter.data = parameter.data.to(dtype)
    for child in module.children():
        cast_weights(child, dtype)
