"""Decays of every size in one chunk leave outputs and gradients finite and accurate, in fp32 and bf16."""

import pytest
import torch
from oracle import assert_close, random_call, relative_error

DECAYED = ("scalar", "diagonal", "bonus", "gated_delta", "kda", "dplr")
SIZES = torch.tensor([0.0, -1e-6, -1e-3, -0.1, -1.0, -20.0, -1e4, -torch.inf])


def harsh_call(family, lengths=(150,), H=2, width=32):
    """Every eighth decay or so erases the state, the others hardly touch it."""
    call = random_call(family, lengths=lengths, initial=True, final=True, H=H, K=width, V=width)
    log_decay = call.inputs["log_decay"]
    weights = torch.tensor([8.0, 8.0, 8.0, 4.0, 2.0, 1.0, 1.0, 1.0])
    picks = torch.multinomial(weights, log_decay.numel(), replacement=True)
    call.inputs["log_decay"] = SIZES[picks].view(log_decay.shape).double()
    return call


def rounded(call, dtype):
    """The call with inputs that `dtype` holds exactly, so that only the computation's errors are compared."""
    for name, x in call.inputs.items():
        call.inputs[name] = x.to(dtype if name in "qkvab" else torch.float32).double()
    return call


@pytest.mark.parametrize("family", DECAYED)
@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-9), (torch.float32, 1e-4), (torch.bfloat16, 2e-2)])
def test_mixed_decays_stay_accurate(family, seed, dtype, tolerance):
    torch.manual_seed(seed)
    call = rounded(harsh_call(family), dtype)
    assert_close(call.run("torch", dtype), call.run("reference"), tolerance)


@pytest.mark.parametrize("family", DECAYED)
def test_packed_documents_with_mixed_decays_stay_accurate(family):
    torch.manual_seed(4)
    call = rounded(harsh_call(family, (1, 40, 0, 70, 30)), torch.float32)
    assert_close(call.run("torch", torch.float32), call.run("reference"), 1e-4)


@pytest.mark.parametrize("family", DECAYED)
@pytest.mark.parametrize("log_decay", [0.0, -1e-6, -3.0, -20.0, -1e4, -torch.inf])
def test_uniform_decays_stay_accurate(family, log_decay):
    torch.manual_seed(5)
    call = rounded(random_call(family, T=130, K=32, V=32, initial=True, final=True), torch.float32)
    call.inputs["log_decay"] = torch.full_like(call.inputs["log_decay"], log_decay)
    actual, expected = call.run("torch", torch.float32), call.run("reference")
    for name in expected:
        if expected[name].norm() > 1e-6:  # a gradient through decays of e^-1e4 is zero in either
            assert relative_error(actual[name], expected[name]) < 1e-4, name
        else:
            assert actual[name].norm() < 1e-5, name


@pytest.mark.parametrize("family", ["identity", "constant", "delta", "gated_delta", "kda", "dplr"])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)])
def test_long_memories_stay_accurate(family, dtype, tolerance):
    torch.manual_seed(6)
    call = rounded(random_call(family, B=1, T=700, H=1, K=32, V=32, initial=True, final=True), dtype)
    assert_close(call.run("torch", dtype), call.run("reference"), tolerance)


@pytest.mark.parametrize("family", ["delta", "gated_delta", "kda"])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 8e-2)])
def test_flipping_one_key_over_and_over_stays_accurate(family, dtype, tolerance):
    """At beta = 2 a transition has the eigenvalue -1; the overlaps of equal keys are the largest there are."""
    torch.manual_seed(7)
    call = random_call(family, B=1, T=200, H=1, K=32, V=32, initial=True, final=True)
    call.inputs["beta"] = torch.full_like(call.inputs["beta"], 2.0)
    call.inputs["k"] = call.inputs["k"][:, :1].expand_as(call.inputs["k"]) + 0.05 * call.inputs["k"]
    call.inputs["k"] = torch.nn.functional.normalize(call.inputs["k"], dim=-1)
    if "log_decay" in call.inputs:
        call.inputs["log_decay"] = call.inputs["log_decay"] / 100
    call = rounded(call, dtype)
    assert_close(call.run("torch", dtype), call.run("reference"), tolerance)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 5e-2)])
def test_removing_one_key_over_and_over_stays_accurate(dtype, tolerance):
    torch.manual_seed(8)
    call = random_call("dplr", B=1, T=200, H=1, K=32, V=32, initial=True, final=True)
    a = torch.nn.functional.normalize(call.inputs["a"][:, :1] + 0.05 * call.inputs["a"], dim=-1)
    call.inputs |= {"a": a, "b": -a, "log_decay": call.inputs["log_decay"] / 100}
    call = rounded(call, dtype)
    assert_close(call.run("torch", dtype), call.run("reference"), tolerance)


@pytest.mark.parametrize("length", [4096, pytest.param(32768, marks=pytest.mark.slow)])
@pytest.mark.parametrize("family", DECAYED)
def test_mixed_decays_stay_accurate_over_long_rows(family, length):
    torch.manual_seed(9)
    call = rounded(harsh_call(family, (length,), H=1, width=16), torch.bfloat16)
    expected = call.run("reference", torch.float32)
    assert_close(call.run("torch", torch.float32), expected, 1e-4)
    assert_close(call.run("torch", torch.bfloat16), expected, 2e-2)


def test_fp32_states_come_back_from_bf16_inputs():
    call = random_call("scalar", T=20, final=True)
    results = call.run("torch", torch.bfloat16)
    assert results["o"].dtype == torch.bfloat16
    assert results["final"].dtype == torch.float32
