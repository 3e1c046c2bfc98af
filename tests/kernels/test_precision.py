"""Decays of every size beside each other, long memories and long streams leave results finite and accurate."""

import pytest
import torch
from cases import assert_close, relative_error
from cases.families import DECAYED, FAMILIES, mixed_decays
from torch.nn import functional as F

FP32, BF16 = (torch.float32, 1e-4), (torch.bfloat16, 2e-2)


def harsh(family, lengths, H=2, width=32):
    sizes = {"S": width // 2} if family == "slots" else {}
    case = mixed_decays(FAMILIES[family](lengths, "in out", H=H, K=width, V=width, **sizes))
    if family == "slots":  # a softmax of small scores, not a choice between slots
        for name in "qks":
            case.inputs[name] = case.inputs[name] / 2
    return case


@pytest.mark.parametrize("family", DECAYED)
@pytest.mark.parametrize("lengths", [(150,), (1, 40, 0, 70, 30)], ids=str)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-9), FP32, BF16])
def test_mixed_decays(family, lengths, dtype, tolerance):
    torch.manual_seed(1)
    case = harsh(family, lengths).rounded(dtype)
    tolerance *= 1.5 if family == "slots" else 1  # two recurrences, one after the other
    assert_close(case.run("torch", dtype), case.run("reference"), tolerance)


@pytest.mark.parametrize("family", DECAYED)
@pytest.mark.parametrize("log_decay", [0.0, -1e-6, -3.0, -20.0, -1e4, -torch.inf])
def test_uniform_decays(family, log_decay):
    torch.manual_seed(5)
    case = FAMILIES[family]((130, 3), "in out", K=32, V=32).rounded(torch.float32)
    case.inputs["log_decay"] = torch.full_like(case.inputs["log_decay"], log_decay)
    actual, expected = case.run("torch", torch.float32), case.run("reference")
    for name in expected:
        if expected[name].norm() > 1e-6:  # a gradient through decays of e^-1e4 is zero in either
            assert relative_error(actual[name], expected[name]) < 1e-4, name
        else:
            assert actual[name].norm() < 1e-5, name


@pytest.mark.parametrize("family", ["identity", "constant", "delta", "gated_delta", "kda", "dplr"])
@pytest.mark.parametrize("dtype, tolerance", [FP32, BF16])
def test_long_memories(family, dtype, tolerance):
    torch.manual_seed(6)
    case = FAMILIES[family]((700,), "in out", H=1, K=32, V=32).rounded(dtype)
    assert_close(case.run("torch", dtype), case.run("reference"), tolerance)


@pytest.mark.parametrize("family", ["delta", "gated_delta", "kda"])
@pytest.mark.parametrize("dtype, tolerance", [FP32, (torch.bfloat16, 8e-2)])
def test_one_key_flipped_over_and_over(family, dtype, tolerance):
    """At beta = 2 a transition has the eigenvalue -1; the overlaps of equal keys are the largest there are."""
    torch.manual_seed(7)
    case = FAMILIES[family]((200,), "in out", H=1, K=32, V=32)
    inputs = case.inputs
    inputs["beta"] = torch.full_like(inputs["beta"], 2.0)
    inputs["k"] = F.normalize(inputs["k"][:1] + 0.05 * inputs["k"], dim=-1)
    if "log_decay" in inputs:
        inputs["log_decay"] = inputs["log_decay"] / 100
    case = case.rounded(dtype)
    assert_close(case.run("torch", dtype), case.run("reference"), tolerance)


@pytest.mark.parametrize("dtype, tolerance", [FP32, (torch.bfloat16, 5e-2)])
def test_one_key_removed_over_and_over(dtype, tolerance):
    torch.manual_seed(8)
    case = FAMILIES["dplr"]((200,), "in out", H=1, K=32, V=32)
    a = F.normalize(case.inputs["a"][:1] + 0.05 * case.inputs["a"], dim=-1)
    case.inputs |= {"a": a, "b": -a, "log_decay": case.inputs["log_decay"] / 100}
    case = case.rounded(dtype)
    assert_close(case.run("torch", dtype), case.run("reference"), tolerance)


@pytest.mark.parametrize("length", [4096, pytest.param(32768, marks=pytest.mark.slow)])
@pytest.mark.parametrize("family", DECAYED)
def test_mixed_decays_over_long_documents(family, length):
    torch.manual_seed(9)
    case = harsh(family, (length,), H=1, width=16).rounded(torch.bfloat16)
    expected = case.run("reference", torch.float32)
    assert_close(case.run("torch", torch.float32), expected, 1e-4)
    assert_close(case.run("torch", torch.bfloat16), expected, 2e-2)


@pytest.mark.parametrize("family", ["taylor", "square"])
def test_quadratic_attention_in_half_precision(family):
    torch.manual_seed(10)
    case = FAMILIES[family]((600,), "in out", K=16, V=16)
    case.inputs["q"], case.inputs["k"] = case.inputs["q"].abs(), case.inputs["k"].abs()
    exact = case.run("reference")
    assert_close(case.run("torch", torch.bfloat16), exact, 2e-2)
    assert_close(case.run("torch", torch.float32), exact, 2e-5)
