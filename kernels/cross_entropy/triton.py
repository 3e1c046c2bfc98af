"""Chunks of tokens as in `chunked`, with our Triton kernel for a chunk's logits: their gradient is written over them.

For T tokens, D width, V vocabulary, in n chunks, bfloat16, beside the products' 6 T D V FLOPs:

    logits            2 T V written by the product; read once from memory and once from cache, 2 T V written by the
                      kernel; read by two products
    weight's gradient 4 D V read and written a chunk: the products add in float32

so chunks are larger than where a gradient lies beside the logits. T = 16384, D = 1024, V = 151936, at 805 TFLOP/s and
4.2 TB/s: products 19.0 ms; the kernel's 10 GB 2.4 ms, or 3.6 if it reads memory twice; with 8 chunks, of 0.58 GiB, the
sums' 9.3 GB 2.2 ms if nothing hides them, with 16 twice that. Held are a chunk's logits and the sum, 0.58 GiB each.
"""

from __future__ import annotations

import functools
import importlib
from functools import partial
from typing import Any

import torch
from torch import Tensor

from torchlinearmoe.kernels.cross_entropy import IGNORED, ChunkKernel, chunked
from torchlinearmoe.kernels.operator import NARROW, Backend

CHUNK_BYTES = 640 * 2**20
"""Logits of one chunk, at most."""
LANES, WIDTH, WARPS = 4096, 8, 32
"""Of a tile: a thread loads 4 times 16 bytes of bfloat16 at once."""
PER_PROCESSOR, REGISTERS = 1, 64
"""Programs, whose rows are to lie in the second-level cache, and registers of a thread: all that there are."""
STAGES = 1
"""Tiles of a row that are on their way at once; from 2 on through shared memory."""


def loss(hidden: Tensor, weight: Tensor, labels: Tensor, kernel: ChunkKernel) -> Tensor:
    """As `linear_cross_entropy`; it has a kernel of its own."""
    gradient = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    own = partial(chunk_losses, gradient=gradient)
    return chunked.loss(hidden, weight, labels, own, CHUNK_BYTES // hidden.element_size())


def chunk_losses(logits: Tensor, labels: Tensor, gradient: bool = True) -> tuple[Tensor, Tensor]:
    """The loss of each token [C], float32, and the gradient in the logits' place; without `gradient` they stay."""
    return rows_loss(logits, labels, gradient), logits


@torch.library.custom_op("torchlinearmoe::cross_entropy_of_rows", mutates_args=("logits",))
def rows_loss(logits: Tensor, labels: Tensor, gradient: bool) -> Tensor:
    """Losses, float32 [C]; logits: [C, V], contiguous, which the gradient takes the place of; labels: int64 [C]."""
    assert logits.is_contiguous()
    losses = torch.empty(logits.shape[0], dtype=torch.float32, device=logits.device)
    width = min(WIDTH, 1 << (logits.shape[1] - 1).bit_length())
    lanes = min(LANES, 1 << (-(-logits.shape[1] // width) - 1).bit_length())
    _kernels().cross_entropy_rows[(min(logits.shape[0], PER_PROCESSOR * _processors(logits.device)),)](
        logits, labels.contiguous(), losses, *logits.shape, logits.stride(0), IGNORED,
        GRADIENT=gradient, LANES=lanes, WIDTH=width, STAGES=STAGES, num_warps=min(WARPS, max(1, lanes // 32)),
        maxnreg=REGISTERS,
    )  # fmt: skip
    return losses


@rows_loss.register_fake
def _(logits, labels, gradient):
    return logits.new_empty(logits.shape[0], dtype=torch.float32)


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


@functools.cache
def _kernels() -> Any:  # Triton turns numbers into its own constants
    return importlib.import_module("torchlinearmoe.kernels.cross_entropy.triton_kernels")


BACKEND = Backend(
    "triton",
    loss,
    kinds=("cross_entropy",),
    order=10,
    dtypes=NARROW,
    devices=frozenset(("cuda",)),
    needs=("triton",),
    install="pip install triton",
)
