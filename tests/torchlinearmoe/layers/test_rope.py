"""Rotary frequencies and their scalings, against the formulas of transformers; rotations against complex numbers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from torchlinearmoe.documents import Documents
from torchlinearmoe.layers.rope import RopeScaling, frequencies, rotate, rotate_interleaved
from torchlinearmoe.mixers.base import Context

LLAMA = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
YARN = {"factor": 40.0, "beta_fast": 32, "beta_slow": 1, "original_max_position_embeddings": 4096}
CASES: list[tuple[int, float, dict[str, Any]]] = [
    (128, 5e5, {"rope_type": "llama3", **LLAMA}),
    (64, 5e5, {"rope_type": "llama3", **LLAMA, "factor": 32.0}),
    (16, 100.0, {"rope_type": "llama3", **LLAMA, "original_max_position_embeddings": 64}),
    (64, 1e4, {"rope_type": "yarn", **YARN, "mscale": 0.707, "mscale_all_dim": 0.707}),
    (64, 1e4, {"rope_type": "yarn", **YARN, "mscale": 1.0, "mscale_all_dim": 0.5}),
    (128, 1e6, {"rope_type": "yarn", **YARN, "factor": 4.0, "original_max_position_embeddings": 32768}),
]
ALL_FAST = (8, 10.0, {"rope_type": "yarn", **YARN, "beta_fast": 4})
"""Every pair turns more than four times."""


def _ours(fields: dict[str, Any]) -> RopeScaling:
    return RopeScaling(
        kind=fields["rope_type"],
        factor=fields["factor"],
        original_length=fields["original_max_position_embeddings"],
        beta_slow=fields["beta_slow" if "beta_slow" in fields else "low_freq_factor"],
        beta_fast=fields["beta_fast" if "beta_fast" in fields else "high_freq_factor"],
        mscale=fields.get("mscale", 0.0),
        mscale_all_dim=fields.get("mscale_all_dim", 0.0),
    )


@pytest.mark.parametrize(("dim", "theta", "fields"), CASES, ids=lambda value: str(value)[:30])
def test_scaled_frequencies_and_amplitude_are_those_of_transformers(dim: int, theta: float, fields: dict[str, Any]):
    transformers = pytest.importorskip("transformers")
    rope_utils = pytest.importorskip("transformers.modeling_rope_utils")
    longest = int(fields["factor"] * fields["original_max_position_embeddings"])
    config = transformers.LlamaConfig(
        hidden_size=4 * dim,
        num_attention_heads=4,
        max_position_embeddings=longest,
        rope_parameters={**fields, "rope_theta": theta},
    )
    expected, amplitude = rope_utils.ROPE_INIT_FUNCTIONS[fields["rope_type"]](config)
    ours = _ours(fields)
    torch.testing.assert_close(ours.frequencies(dim, theta).float(), expected, rtol=1e-5, atol=0)
    assert ours.amplitude == pytest.approx(amplitude)


def test_scores_of_deepseek_are_sharpened_by_mscale_squared():
    yarn = _ours(CASES[3][2])
    assert yarn.amplitude == 1.0 and yarn.score_factor == pytest.approx((0.0707 * math.log(40) + 1) ** 2)
    assert _ours(CASES[5][2]).score_factor == 1.0 and _ours(CASES[0][2]).score_factor == 1.0


def test_scaling_leaves_fast_pairs_and_divides_slow_ones():
    for dim, theta, fields in [*CASES, ALL_FAST]:
        plain, scaled = frequencies(dim, theta), _ours(fields).frequencies(dim, theta)
        assert bool((scaled <= plain).all()) and bool((scaled * fields["factor"] >= plain * (1 - 1e-12)).all())
        assert scaled[0] == plain[0]
    dim, theta, fields = CASES[0]
    scaled = _ours(fields).frequencies(dim, theta)
    assert scaled[-1] == pytest.approx(float(frequencies(dim, theta)[-1]) / 8)
    dim, theta, fields = ALL_FAST
    assert torch.equal(_ours(fields).frequencies(dim, theta), frequencies(dim, theta))


@pytest.mark.parametrize("interleaved", [False, True])
def test_pairs_turn_as_complex_numbers(interleaved: bool):
    yarn = _ours({**CASES[4][2], "original_max_position_embeddings": 64})
    documents = Documents.packed([0, 3, 10])
    context = Context(documents, documents.positions + 1000)
    x = torch.randn(10, 2, 8, dtype=torch.float64)
    for scaling in (None, yarn):
        tables = context.rotary(8, 100.0, x.dtype, scaling)
        assert context.rotary(8, 100.0, x.dtype, scaling) is tables
        y = (rotate_interleaved if interleaved else rotate)(x, *tables)
        speeds = frequencies(8, 100.0) if scaling is None else yarn.frequencies(8, 100.0)
        turns = torch.polar(torch.ones(10, 4).double(), context.positions[:, None] * speeds)[:, None]
        pairs = x.unflatten(-1, (4, 2) if interleaved else (2, 4))
        pairs = pairs if interleaved else pairs.transpose(-1, -2)
        turned = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * turns)
        turned = turned if interleaved else turned.transpose(-1, -2)
        amplitude = 1.0 if scaling is None else yarn.amplitude
        torch.testing.assert_close(y, amplitude * turned.flatten(-2), rtol=1e-12, atol=1e-12)
