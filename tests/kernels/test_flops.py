"""The FLOP counts are those of the matmuls that the chunk-parallel form issues."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from torchlinearmoe.kernels import flops, ops
from torchlinearmoe.kernels.backends import ours


def counted(function, *inputs) -> float:
    with FlopCounterMode(display=False) as counter:
        function(*inputs)
    return counter.get_total_flops()


@pytest.mark.parametrize("K, V", [(64, 64), (128, 64)])
def test_linear_recurrence_counts_the_issued_matmuls(K, V):
    T, H, C = 2048, 2, ours.CHUNK_SIZE
    q, k, v = torch.randn(1, T, H, K), torch.randn(1, T, H, K), torch.randn(1, T, H, V)
    masked_half = H * C * (K + V)  # the mask hides half of the scores, which are computed nevertheless
    scan = H * 2 * K * V * (T // C) / C
    expected = flops.linear_recurrence_flops(H, K, V, C) + masked_half + scan
    assert counted(ops.linear_recurrence, q, k, v) / T == pytest.approx(expected, rel=0.01)


def test_delta_rule_costs_more_than_a_linear_recurrence_by_its_formula():
    K, V, C = 128, 64, 32
    extra = flops.delta_rule_flops(1, K, V, C) - flops.linear_recurrence_flops(1, K, V, C)
    assert extra == 2 * K * V + C * K + C * (K + V)
    assert flops.delta_rule_flops(6, K, V, C) == 6 * flops.delta_rule_flops(1, K, V, C)


def test_dplr_rule_counts_the_matmuls_of_a_chunk():
    K, V, C = 16, 24, 32
    q, k, a, b, v, S = *torch.randn(4, C, K), torch.randn(C, V), torch.randn(K, V)

    def inside():
        scores = {(x, y): part @ other.T for x, part in (("q", q), ("a", a)) for y, other in (("k", k), ("b", b))}
        solved = scores["a", "b"] @ torch.cat([scores["a", "k"] @ v, a], 1)
        return scores["q", "k"] @ v + scores["q", "b"] @ solved[:, :V]

    def across():
        return q @ S, a @ S, k.T @ v, b.T @ v

    assert flops.dplr_rule_flops(3, K, V, C) == 3 * (counted(inside) / 2 + counted(across)) / C


def test_a_delta_rule_with_a_gate_per_channel_costs_what_one_per_head_does():
    T, H, K, V, C = 2048, 2, 64, 64, ours.CHUNK_SIZE
    q, k, v, beta = torch.randn(1, T, H, K), torch.randn(1, T, H, K), torch.randn(1, T, H, V), torch.rand(1, T, H)
    per_head, per_channel = (
        counted(ops.delta_rule, q, k, v, beta, -torch.rand(shape)) / T for shape in ((1, T, H), (1, T, H, K))
    )
    # Scores are halved instead of masked: of blocks of 2 tokens and more, those below the diagonal.
    assert per_head - per_channel == H * (2 * 2 * C * K - 2 * K * sum(2**n for n in range(1, 6)))
    assert flops.delta_rule_flops(H, K, V, C) < per_channel


def test_short_convolution_counts_a_multiply_add_per_tap():
    assert flops.short_convolution_flops(100, 4) == 800
