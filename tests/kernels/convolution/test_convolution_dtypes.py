"""The short convolution in bfloat16 is the one in float32, rounded once."""

import torch

from torchlinearmoe.kernels.convolution import short_convolution
from torchlinearmoe.segments import Segments


def test_bf16_is_computed_in_fp32():
    torch.manual_seed(3)
    x, weight, segments = torch.randn(40, 6).bfloat16(), torch.randn(6, 4).bfloat16(), Segments.of_lengths((40,))
    y, state = short_convolution(x, weight, segments=segments, activation="silu", want_final=True)
    expected, _ = short_convolution(
        x.float(), weight.float(), segments=segments, activation="silu", backend="reference"
    )
    assert y.dtype == torch.bfloat16 and torch.equal(y, expected.bfloat16())
    assert state is not None and torch.equal(state[0], x[-3:])
