"""Matmul FLOPs per token of a forward pass, for model FLOPs utilisation.

Counted are the matmuls that the chunk-parallel form cannot do without: the state's read and write, and the work inside
a chunk. A causal half counts as half. Recomputation, masks and the scan over chunks (less than 1 / chunk_size of the
rest) do not count. A backward pass costs twice its forward. One multiply-add is two FLOPs.

Legend: H heads, K/V key/value head dim, C tokens a chunk, D channels, W kernel width.
"""


def linear_recurrence_flops(heads: int, key_dim: int, value_dim: int, chunk_size: int = 64) -> float:
    """FLOPs per token of `ops.linear_recurrence`, the same for every kind of decay.

    2KV to write the state, 2KV to read it, and C/2 earlier tokens to score (2K each) and to add up (2V each).
    """
    return heads * (4.0 * key_dim * value_dim + chunk_size * (key_dim + value_dim))


def delta_rule_flops(value_heads: int, key_dim: int, value_dim: int, chunk_size: int = 64) -> float:
    """FLOPs per token of `ops.delta_rule`, the same for every kind of decay.

    Beside the linear recurrence: 2KV to apply the erased part to the entering state; the keys' overlaps (CK), the
    triangular solve for K + V columns (C(K + V)).
    """
    extra = 2.0 * key_dim * value_dim + chunk_size * (2 * key_dim + value_dim)
    return linear_recurrence_flops(value_heads, key_dim, value_dim, chunk_size) + value_heads * extra


def dplr_rule_flops(heads: int, key_dim: int, value_dim: int, chunk_size: int = 64) -> float:
    """FLOPs per token of `ops.dplr_rule`.

    Beside the linear recurrence: 2KV to read the entering state along a, 2KV to write along b; three more kinds of
    scores (CK each), a's reads of the values and the writes along b (CV each), the triangular solve for K + V columns.
    """
    extra = 4.0 * key_dim * value_dim + chunk_size * (4 * key_dim + 3 * value_dim)
    return linear_recurrence_flops(heads, key_dim, value_dim, chunk_size) + heads * extra


def quadratic_attention_flops(
    heads: int, key_dim: int, features: int, value_columns: int, chunk_size: int = 128
) -> float:
    """FLOPs per token of `ops.quadratic_attention`; value columns count the normaliser's ones.

    Reads and writes of the state go through the features, scores inside a chunk through the keys themselves.
    """
    return heads * (4.0 * features * value_columns + chunk_size * (key_dim + value_columns))


def short_convolution_flops(channels: int, width: int) -> float:
    """FLOPs per token of `ops.short_convolution`."""
    return 2.0 * channels * width
