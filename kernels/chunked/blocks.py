"""Square blocks along and just below the diagonal of [..., C, C], for algorithms that merge blocks in pairs.

size 2 of C = 8:   diagonal   a . . .      below   . . . .
                              . b . .              x . . .      x: rows of b, columns of a
                              . . c .              . . . .      y: rows of d, columns of c
                              . . . d              . . y .
"""

from torch import Tensor


def diagonal_blocks(x: Tensor, size: int) -> Tensor:
    """A view [..., C / size, size, size] of [..., C, C]."""
    blocks = x.unflatten(-1, (-1, size)).unflatten(-3, (-1, size))
    return blocks.diagonal(dim1=-4, dim2=-2).movedim(-1, -3)


def blocks_below(x: Tensor, size: int) -> Tensor:
    """A view [..., C / (2 size), size, size] of [..., C, C]: the lower left quarters of the blocks of 2 size."""
    return diagonal_blocks(x, 2 * size)[..., size:, :size]
