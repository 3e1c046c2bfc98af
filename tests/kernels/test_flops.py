"""The FLOP counts are those of the matmuls that the chunk-parallel forms issue."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from torchlinearmoe.kernels.chunked.layout import CHUNK_SIZE
from torchlinearmoe.kernels.convolution import short_convolution_flops
from torchlinearmoe.kernels.delta import delta_rule, delta_rule_flops
from torchlinearmoe.kernels.dplr import dplr_rule_flops
from torchlinearmoe.kernels.linear import linear_recurrence, linear_recurrence_flops
from torchlinearmoe.kernels.quadratic import OPERATOR, quadratic_attention, quadratic_attention_flops
from torchlinearmoe.kernels.quadratic.chunked import CHUNK_SIZE as QUADRATIC_CHUNK
from torchlinearmoe.kernels.slots import slot_attention, slot_attention_flops
from torchlinearmoe.segments import Segments


def counted(function, *inputs, **options) -> float:
    with FlopCounterMode(display=False) as counter:
        function(*inputs, **options)
    return counter.get_total_flops()


@pytest.mark.parametrize("K, V", [(64, 64), (128, 64)])
def test_linear_recurrence_counts_the_issued_matmuls(K, V):
    T, H, C = 2048, 2, CHUNK_SIZE
    q, k, v = torch.randn(T, H, K), torch.randn(T, H, K), torch.randn(T, H, V)
    masked_half = H * C * (K + V)  # the mask hides half of the scores, which are computed nevertheless
    scan = H * 2 * K * V * (T // C) / C
    expected = linear_recurrence_flops(H, K, V, C) + masked_half + scan
    found = counted(linear_recurrence, q, k, v, segments=Segments.of_lengths((T,)))
    assert found / T == pytest.approx(expected, rel=0.01)


def test_delta_rule_costs_more_than_a_linear_recurrence_by_its_formula():
    K, V, C = 128, 64, 32
    extra = delta_rule_flops(1, K, V, C) - linear_recurrence_flops(1, K, V, C)
    assert extra == 2 * K * V + C * K + C * (K + V)
    assert delta_rule_flops(6, K, V, C) == 6 * delta_rule_flops(1, K, V, C)


def test_dplr_rule_counts_the_matmuls_of_a_chunk():
    K, V, C = 16, 24, 32
    q, k, a, b, v, S = *torch.randn(4, C, K), torch.randn(C, V), torch.randn(K, V)

    def inside():
        scores = {(x, y): part @ other.T for x, part in (("q", q), ("a", a)) for y, other in (("k", k), ("b", b))}
        solved = scores["a", "b"] @ torch.cat([scores["a", "k"] @ v, a], 1)
        return scores["q", "k"] @ v + scores["q", "b"] @ solved[:, :V]

    def across():
        return q @ S, a @ S, k.T @ v, b.T @ v

    assert dplr_rule_flops(3, K, V, C) == 3 * (counted(inside) / 2 + counted(across)) / C


def test_a_delta_rule_with_a_gate_per_channel_costs_what_one_per_head_does():
    T, H, K, V, C = 2048, 2, 64, 64, CHUNK_SIZE
    q, k, v, beta = torch.randn(T, H, K), torch.randn(T, H, K), torch.randn(T, H, V), torch.rand(T, H)
    segments = Segments.of_lengths((T,))
    per_head, per_channel = (
        counted(delta_rule, q, k, v, beta, -torch.rand(shape), segments=segments) / T for shape in ((T, H), (T, H, K))
    )
    # Scores are halved instead of masked: of blocks of 2 tokens and more, those below the diagonal.
    assert per_head - per_channel == H * (2 * 2 * C * K - 2 * K * sum(2**n for n in range(1, 6)))
    assert delta_rule_flops(H, K, V, C) < per_channel


def test_slot_attention_is_two_recurrences():
    T, H, K, V, S, C = 2048, 2, 64, 64, 64, CHUNK_SIZE
    q, k, v, s = torch.randn(T, H, K), torch.randn(T, H, K), torch.randn(T, H, V), torch.rand(T, H, S)
    found = counted(slot_attention, q, k, v, s, -torch.rand(T, H, S), segments=Segments.of_lengths((T,))) / T
    # A causal half counts, of which the products with the keys and those with the values compute both; the scans more.
    counts = slot_attention_flops(H, K, V, S, C)
    assert counts == linear_recurrence_flops(H, K, S, C) + linear_recurrence_flops(H, S, V, C)
    assert counts < found < 1.5 * counts


def test_quadratic_attention_counts_the_issued_matmuls(monkeypatch):
    chunked = OPERATOR.find_backends()["torch"].run
    monkeypatch.setattr(chunked, "__defaults__", (2,))
    T, H, K, V, C = 4096, 2, 16, 31, QUADRATIC_CHUNK
    q, k, v = torch.randn(T, H, K), torch.randn(T, H, K), torch.randn(T, H, V)
    found = counted(quadratic_attention, q, k, v, kind="taylor", segments=Segments.of_lengths((T,)))
    masked_half = H * C * (K + V + 1)
    scan = H * 2 * 153 * (V + 1) * 9 / (2 * C)  # two chunks a group: a matrix of 3 x 3
    expected = quadratic_attention_flops(H, K, 153, V + 1, C) + masked_half + scan
    assert found / T == pytest.approx(expected, rel=0.01)


def test_short_convolution_counts_a_multiply_add_per_tap():
    assert short_convolution_flops(100, 4) == 800
