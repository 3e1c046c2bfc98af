"""Retention against its paper's parallel form: rotated scores times gamma^(t - s), per-head norm, swish gate."""

from __future__ import annotations

import math

import pytest
import torch
from definitions import MAPS, cases_of, check_definition, heads_slice, project, rms, swish
from mixer_cases import Case, Dims, make_stack
from torch import Tensor

from torchlinearmoe.errors import RecipeError
from torchlinearmoe.mixers.retention import Options, Retention


@cases_of("retention")
def test_equals_the_paper(case: Case):
    options = case.options
    heads, width = options.heads or 2, options.head_dim or 32
    value_width = round(width * options.expand_v)

    def rotated(x: Tensor, position: int) -> Tensor:
        """Complex numbers of pairs (i, i + K / 2), turned by position theta^(-2 i / K)."""
        half = width // 2
        if not options.rope_theta:
            return x
        angles = position * options.rope_theta ** (-2 * torch.arange(half).double() / width)
        turned = torch.complex(x[:half], x[half:]) * torch.complex(angles.cos(), angles.sin())
        return torch.cat([turned.real, turned.imag])

    def formula(weights: dict[str, Tensor], x_TD: Tensor) -> Tensor:
        q, k, v = (project(weights, name, x_TD) for name in "qkv")
        if options.conv:
            q, k, v = swish(q), swish(k), swish(v)
        q, k = (MAPS[options.feature_map](x) for x in (q, k))
        gate = x_TD @ weights["g_proj.weight"].T
        y = torch.zeros_like(v)
        for h in range(heads):
            key, s = heads_slice(h, width), heads_slice(h, value_width)
            gamma = 1 - 2.0 ** (-5 - h)
            keys = [rotated(k[j, key], j) for j in range(x_TD.shape[0])]
            for t in range(x_TD.shape[0]):
                query = rotated(q[t, key], t)
                terms = [gamma ** (t - j) * (query @ keys[j]) / math.sqrt(width) * v[j, s] for j in range(t + 1)]
                y[t, s] = rms(torch.stack(terms).sum(0)) * weights["norm.weight"] * swish(gate[t, s])
        return y @ weights["o_proj.weight"].T

    check_definition(case, formula)


def test_gammas_are_exact_for_many_heads():
    """1 - 2^(-5 - h) rounds to 1 in float32 from h = 20 on; its logarithm must not be zero."""
    mixer = make_stack(Case("retention", {"heads": 32, "head_dim": 2})).layers[0]
    log_gamma = mixer.log_decay(torch.zeros(1, 32, 2))  # pyright: ignore
    expected = [math.log1p(-(2.0 ** (-5 - h))) for h in range(32)]
    torch.testing.assert_close(log_gamma, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"rope_theta": 0.5}, "mixer.retention.rope_theta = 0.5: must be above 1"),
        ({"heads": 2, "head_dim": 9}, "mixer.retention.head_dim = 9: rotary positions need an even"),
        ({"expand_v": 0.3}, "mixer.retention.expand_v = 0.3: must make whole channels"),
    ],
)
def test_refuses_in_one_line(wrong, message):
    with pytest.raises(RecipeError) as error:
        Retention.check(Options(**wrong), Dims())
    assert str(error.value).startswith(message) and "\n" not in str(error.value)
    Retention.check(Options(heads=2, head_dim=9, rope_theta=0.0), Dims())
