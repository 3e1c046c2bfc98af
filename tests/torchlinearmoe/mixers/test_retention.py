"""Retention: gammas that are exact for many heads, and what it refuses."""

from __future__ import annotations

import math

import pytest
import torch
from mixer_cases import Case, make_stack, small_model

from torchlinearmoe.errors import RecipeError
from torchlinearmoe.mixers.retention import Options, Retention


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
        Retention.check(Options(**wrong), small_model())
    assert str(error.value).startswith(message) and "\n" not in str(error.value)
    Retention.check(Options(heads=2, head_dim=9, rope_theta=0.0), small_model())
