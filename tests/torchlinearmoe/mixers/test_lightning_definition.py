"""Lightning attention against its papers: slopes, depth factor, recurrence, norm and gate, as sums over the past."""

from __future__ import annotations

import math

import pytest
import torch
from definitions import cases_of, check_definition, heads_slice, project, rms, sigmoid, swish
from mixer_cases import Case, make_stack
from torch import Tensor

from torchlinearmoe.mixers.lightning_attention import alibi_slopes

LAYERS = 5


@cases_of("lightning_attention")
@pytest.mark.parametrize("layer", [0, 1])
def test_equals_the_paper(case: Case, layer: int):
    options = case.options
    heads, width = options.heads or 2, options.head_dim or 32
    slopes = {2: [2.0**-4, 2.0**-8], 3: [2.0**-4, 2.0**-8, 2.0**-2]}[heads]
    factor = 1 - layer / (LAYERS - 1) + 1e-5 if options.layer_factor else 1.0

    def formula(weights: dict[str, Tensor], x_TD: Tensor) -> Tensor:
        q, k, v = (swish(project(weights, name, x_TD)) for name in "qkv")
        gate = x_TD @ weights["g_proj.weight"].T
        gate = sigmoid(gate) if options.gate == "sigmoid" else swish(gate)
        o = torch.zeros_like(v)
        for h in range(heads):
            s = heads_slice(h, width)
            for t in range(x_TD.shape[0]):
                for j in range(t + 1):
                    decay = math.exp(-slopes[h] * factor * (t - j))
                    o[t, s] += decay * (q[t, s] @ k[j, s]) / math.sqrt(width) * v[j, s]
                if options.norm == "head":
                    o[t, s] = rms(o[t, s]) * weights["norm.weight"]
        if options.norm == "full":
            o = torch.stack([rms(row) for row in o]) * weights["norm.weight"]
        return (o * gate) @ weights["o_proj.weight"].T

    check_definition(case, formula, layer, num_layers=LAYERS)


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
