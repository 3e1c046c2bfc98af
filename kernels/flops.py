"""Matrix-product FLOPs of the recurrences' chunk-parallel forms, forward, per token: the figures MFU is made of.

With chunks of C tokens a token meets, per head, (C + 1) / 2 earlier tokens of its chunk on average (scores K, values V),
writes one outer product into the state and reads the state once.
"""

CHUNK = 64


def linear_recurrence_flops(heads: int, key_dim: int, value_dim: int, chunk: int = CHUNK) -> float:
    """Linear recurrence: scores and values inside the chunk, one state write, one state read."""
    inside = (chunk + 1) * (key_dim + value_dim)
    return heads * (inside + 4.0 * key_dim * value_dim)


def delta_rule_flops(heads: int, key_dim: int, value_dim: int, chunk: int = CHUNK) -> float:
    """Delta rule in WY form: as above, plus k k^T and the triangular solve for K + V columns, and one more state read."""
    inside = (chunk + 1) * (2 * key_dim + value_dim + key_dim + value_dim)
    return heads * (inside + 6.0 * key_dim * value_dim)
