"""Lightning attention: the published slopes, and what depth makes of them."""

from __future__ import annotations

import pytest
import torch
from mixer_cases import Case, make_stack

from torchlinearmoe.mixers.lightning_attention import alibi_slopes


def test_slopes_are_the_published_ones():
    def slopes(total: int) -> list[float]:
        return alibi_slopes(torch.arange(total), total).tolist()

    assert slopes(8) == [2.0**-i for i in range(1, 9)]
    assert slopes(4) == [2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8]
    assert slopes(1) == [2.0**-8]
    assert slopes(6) == [1 / 4, 1 / 16, 1 / 64, 1 / 256, 1 / 2, 1 / 8]
    assert slopes(12)[8:] == pytest.approx([2**-0.5, 2**-1.5, 2**-2.5, 2**-3.5])
    assert torch.equal(alibi_slopes(torch.arange(4, 8), 12), alibi_slopes(torch.arange(12), 12)[4:8])


def test_decays_slow_down_with_depth_and_next_to_vanish_in_the_last_layer():
    case = Case("lightning_attention", {})
    q = torch.zeros(1, 2, 32)
    first, last = (mixer.log_decay(q) for mixer in make_stack(case, num_layers=2).layers)  # pyright: ignore
    torch.testing.assert_close(first, -(1 + 1e-5) * alibi_slopes(torch.arange(2), 2))
    torch.testing.assert_close(last, -1e-5 * alibi_slopes(torch.arange(2), 2), rtol=1e-6, atol=0)
    (alone, *_) = make_stack(case, num_layers=1).layers
    torch.testing.assert_close(alone.log_decay(q), -alibi_slopes(torch.arange(2), 2))  # pyright: ignore
