"""MLA against its paper, a head and a token at a time; what it keeps of a token; steps that never expand the latent."""

from __future__ import annotations

import cmath
import math
from typing import Any

import pytest
import torch
from definitions import Weights, cases_of, check_definition, heads_slice, rms
from mixer_cases import Case, make_stack, random_inputs, relative
from torch import Tensor

from torchlinearmoe.mixers.mla import MLA

YARN: dict[str, Any] = {
    "rope_scaling": "yarn",
    "rope_factor": 8.0,
    "rope_original_length": 32,
    "rope_beta_fast": 8.0,
    "rope_mscale": 0.7,
    "rope_mscale_all_dim": 0.9,
}


def _turned(x: Tensor, position: int, theta: float) -> Tensor:
    """Pair (2i, 2i + 1) as one complex number, turned by position theta^(-2i/r)."""
    pairs = [
        complex(float(x[2 * i]), float(x[2 * i + 1])) * cmath.exp(1j * position * theta ** (-2 * i / x.shape[0]))
        for i in range(x.shape[0] // 2)
    ]
    return torch.tensor([part for pair in pairs for part in (pair.real, pair.imag)], dtype=torch.float64)


@cases_of("mla")
def test_the_layer_is_the_papers(case: Case):
    theta, options = 500.0, case.options
    n, r, v_dim, latent = options.head_dim, options.qk_rope_head_dim, options.v_head_dim, options.kv_lora_rank

    def formula(weights: Weights, x_TD: Tensor) -> Tensor:
        def normed(x: Tensor, name: str) -> Tensor:
            return torch.stack([rms(row) for row in x]) * weights[f"{name}.weight"]

        if options.q_lora_rank:
            q = normed(x_TD @ weights["q_a_proj.weight"].T, "q_a_norm") @ weights["q_b_proj.weight"].T
        else:
            q = x_TD @ weights["q_proj.weight"].T
        both = x_TD @ weights["kv_a_proj.weight"].T
        c = normed(both[:, :latent], "kv_a_norm")
        shared = [_turned(both[t, latent:], t, theta) for t in range(x_TD.shape[0])]
        heads, up = options.heads or 2, c @ weights["kv_b_proj.weight"].T
        y = torch.zeros(x_TD.shape[0], heads * v_dim, dtype=torch.float64)
        for h in range(heads):
            q_h, up_h = q[:, heads_slice(h, n + r)], up[:, heads_slice(h, n + v_dim)]
            for t in range(x_TD.shape[0]):
                query = torch.cat([q_h[t, :n], _turned(q_h[t, n:], t, theta)])
                scores = torch.stack([query @ torch.cat([up_h[j, :n], shared[j]]) for j in range(t + 1)])
                y[t, heads_slice(h, v_dim)] = torch.softmax(scores / math.sqrt(n + r), 0) @ up_h[: t + 1, n:]
        return y @ weights["o_proj.weight"].T

    check_definition(case, formula, rope_theta=theta, norm_eps=0.5)


def test_a_token_keeps_its_latent_and_one_rotated_key():
    mixer = make_stack(Case("mla", {})).layers[0]
    assert {name: spec.shape for name, spec in mixer.state_spec().items()} == {"latent": (512,), "rope_key": (64,)}


@pytest.mark.parametrize("scaling", [{}, YARN], ids=["plain", "yarn"])
def test_steps_over_the_latent_equal_the_parallel_forward(scaling: dict[str, Any], monkeypatch: pytest.MonkeyPatch):
    stack, x_TD = make_stack(Case("mla", MLA.variants[1]), **scaling), random_inputs(70)
    with torch.no_grad():
        expected = stack.packed(x_TD, [70])
        _, states = stack.resumed(x_TD[:40], [40], [0], stack.empty(1, 80))
        monkeypatch.setattr(MLA, "expand", None)  # keys and values of the past are not made again
        for t in range(40, 70):
            y_TD, states = stack.step(x_TD[t : t + 1], t, states)
            assert relative(y_TD, expected[t : t + 1]) < 1e-10


def test_yarn_multiplies_the_scores_by_mscale_squared():
    scales = []
    for more in ({}, YARN):
        mixer = make_stack(Case("mla", MLA.variants[0]), **more).layers[0]
        assert isinstance(mixer, MLA)
        scales.append(mixer.scale)
    assert scales[1] == pytest.approx(scales[0] * (0.09 * math.log(8) + 1) ** 2)
