"""Decoding token by token equals the definitions over the whole sequence."""

import pytest
import torch
from oracle import FAMILIES, random_call

from torchlinearmoe.kernels import ops, step


@pytest.mark.parametrize("family", FAMILIES)
def test_steps_equal_the_definition(family):
    torch.manual_seed(1)
    call = random_call(family, B=3, T=6, initial=True, final=True)
    inputs = call.inputs
    expected, expected_final = getattr(ops, call.operator)(**inputs, **call.options, backend="reference")
    state = inputs["initial_state"]
    untouched = state.clone()
    outputs = []
    for t in range(6):
        q, k, v = (inputs[name][:, t] for name in "qkv")
        log_decay = inputs.get("log_decay")
        log_decay = log_decay if log_decay is None or log_decay.dim() == 1 else log_decay[:, t]
        if call.operator == "delta_rule":
            o, state = step.delta_step(q, k, v, inputs["beta"][:, t], log_decay, state)
        elif call.operator == "dplr_rule":
            a, b, log_decay = (inputs[name][:, t] for name in ("a", "b", "log_decay"))
            o, state = step.dplr_step(q, k, v, a, b, log_decay, state)
        else:
            o, state = step.linear_step(q, k, v, log_decay, state, bonus=inputs.get("bonus"))
        outputs.append(o)
    torch.testing.assert_close(torch.stack(outputs, 1), expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(state, expected_final, rtol=1e-9, atol=1e-9)
    assert torch.equal(inputs["initial_state"], untouched)


def test_normalised_delta_steps_equal_the_operator():
    torch.manual_seed(2)
    inputs = random_call("grouped_delta", T=4, initial=True).inputs
    q, k, v, beta, log_decay = (inputs[name] for name in ("q", "k", "v", "beta", "log_decay"))
    k, state = 5 * k, inputs["initial_state"]
    expected, _ = ops.delta_rule(q, k, v, beta, log_decay, l2_norm=True, initial_state=state, backend="reference")
    for t in range(4):
        q_t, k_t, v_t, beta_t, log_decay_t = (x[:, t] for x in (q, k, v, beta, log_decay))
        o, state = step.delta_step(q_t, k_t, v_t, beta_t, log_decay_t, state, l2_norm=True)
        torch.testing.assert_close(o, expected[:, t], rtol=1e-9, atol=1e-9)


def test_bf16_steps_keep_an_fp32_state():
    q, k, v = (torch.randn(2, 3, 8, dtype=torch.bfloat16) for _ in range(3))
    o, state = step.linear_step(q, k, v, None, torch.zeros(2, 3, 8, 8))
    assert o.dtype == torch.bfloat16
    assert state.dtype == torch.float32


@pytest.mark.parametrize("width", [1, 2, 4])
@pytest.mark.parametrize("activation", [None, "silu"])
def test_convolution_steps_equal_the_operator(width, activation):
    torch.manual_seed(3)
    x, weight, bias = torch.randn(2, 9, 5).double(), torch.randn(5, width).double(), torch.randn(5).double()
    state = torch.randn(2, width - 1, 5).double()
    expected, final = ops.short_convolution(
        x, weight, bias, activation=activation, initial_state=state, output_final_state=True
    )
    for t in range(9):
        y, state = step.convolution_step(x[:, t], weight, bias, state, activation=activation)
        torch.testing.assert_close(y, expected[:, t])
    torch.testing.assert_close(state, final)
