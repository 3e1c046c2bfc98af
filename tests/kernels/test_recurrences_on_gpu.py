"""Recurrences on a GPU beyond `test_operators.py`: compiled, wide, long, with the decays that kernels get wrong.

A backend is skipped, with its reason, where its package is missing or the chooser refuses the call on this machine.
Inputs are numbers that their type holds, so that only the arithmetic differs from the definition.
"""

from typing import Any

import pytest
import torch
from cases import Case, assert_close, relative_error
from cases.families import FAMILIES, mixed_decays
from torch.nn import functional as F

from torchlinearmoe.kernels import choose
from torchlinearmoe.kernels.delta import delta_rule
from torchlinearmoe.kernels.dplr import dplr_rule
from torchlinearmoe.kernels.linear import linear_recurrence
from torchlinearmoe.kernels.linear.kinds import KINDS
from torchlinearmoe.segments import Segments

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("little_tuning")]
TOLERANCE = 2e-2
"""Two to three roundings to bfloat16 (2^-9 each) of values that add up without order."""
DELTAS = ("delta", "gated_delta", "grouped_delta", "kda", "grouped_kda")
RAGGED, EVEN = (1, 63, 0, 64, 130, 7), (64, 64, 64)


def need(backend: str, case: Case) -> None:
    call = choose.Call(case.kind, "cuda", torch.bfloat16, case.channels)
    reason = choose.refuse(case.operator.find_backends()[backend], call, choose.this_machine(), auto=False)
    if reason is not None:
        pytest.skip(f"{backend}: {reason}")


def check(case: Case, backend: str, dtype: torch.dtype = torch.bfloat16, tolerance: float = TOLERANCE) -> None:
    """The sums over all tokens are judged in float32: their terms cancel, their roundings do not."""
    case = case.rounded(dtype)
    expected, found = case.run("reference"), case.run(backend, dtype, "cuda")
    for name in case.sums if dtype == torch.bfloat16 else ():
        found.pop(f"d_{name}", None)
        expected.pop(f"d_{name}", None)
    assert_close(found, expected, tolerance)


@pytest.mark.parametrize("lengths", [RAGGED, EVEN], ids=["ragged", "even"])
@pytest.mark.parametrize("family", ["identity", "diagonal", "bonus", "scalar", "delta", "gated_delta", "kda", "dplr"])
def test_fla_agrees_at_the_widths_of_models_with_states_in_and_out(family: str, lengths):
    torch.manual_seed(1)
    case = FAMILIES[family](lengths, "in out", K=64, V=96)
    need("fla", case)
    if "beta" in case.inputs:
        case.inputs["beta"] /= 2
    check(case, "fla")


@pytest.mark.parametrize("lengths", [RAGGED, EVEN], ids=["ragged", "even"])
@pytest.mark.parametrize("bound", [-0.6065306597126334, -4.0, None], ids=str)
def test_fla_agrees_for_bounded_and_strong_decays(bound, lengths):
    torch.manual_seed(8)
    case = FAMILIES["dplr"](lengths, "in out", K=64, V=64)
    need("fla", case)
    log_decay, lowest = case.inputs["log_decay"], -20.0 if bound is None else bound
    case.inputs["log_decay"] = torch.where(torch.rand_like(log_decay) < 0.1, lowest, log_decay.clamp(min=lowest))
    if bound is not None:
        case.inputs["log_decay"] *= 1 - 1e-6  # float32 must not round below the bound
        case.options["lower_bound"] = bound
    check(case, "fla")


@pytest.mark.parametrize("lengths", [RAGGED, EVEN], ids=["ragged", "even"])
def test_fla_agrees_for_a_fixed_constant_decay(lengths):
    torch.manual_seed(2)
    case = FAMILIES["constant"](lengths, "in", K=64, V=96)
    need("fla", case)
    # Lightning attention's strongest decay, with which short chunks leave NaN in final states.
    case.options["log_decay"] = torch.tensor([-0.1, -8.0], dtype=torch.float64)
    check(case, "fla")


def test_fla_leaves_finite_states_under_strong_constant_decays():
    torch.manual_seed(3)
    q, k, v = (torch.randn(70, 2, 64).bfloat16().cuda() for _ in range(3))
    need("fla", FAMILIES["scalar"]((70,), "", K=64))
    decay, segments = torch.tensor([-0.1, -8.0], device="cuda"), Segments.of_lengths((70,), "cuda")
    with torch.no_grad():
        _, final = linear_recurrence(q, k, v, decay, segments=segments, want_final=True, backend="fla")
    assert final is not None and bool(final.isfinite().all())


def widths(*wide: tuple[int, int]) -> list[Any]:
    """Each in bfloat16 with states in and out; the first in the other types too, without states."""
    first = [(*wide[0], "", dtype) for dtype in (torch.float16, torch.float32)]
    return [
        pytest.param(*case, id="-".join(map(str, case)))
        for case in [*first, *((*w, "in out", torch.bfloat16) for w in wide)]
    ]


@pytest.mark.parametrize("K, V, states, dtype", widths((24, 40), (64, 96), (128, 128), (256, 200), (64, 512)))
@pytest.mark.parametrize("family", [*KINDS, *DELTAS, "dplr"])
def test_our_kernels_agree_at_any_width_over_stretches(family: str, K: int, V: int, states: str, dtype: torch.dtype):
    torch.manual_seed(1)
    case = FAMILIES[family]((*RAGGED, 1100, 70), states, K=K, V=V).rounded(dtype)
    need("triton", case)
    expected, found = case.run("torch", torch.float64, "cuda"), case.run("triton", dtype, "cuda")
    for name in case.sums if dtype != torch.float32 else ():
        found.pop(f"d_{name}", None)
        expected.pop(f"d_{name}", None)
    tolerance = {torch.bfloat16: TOLERANCE, torch.float16: 2e-3, torch.float32: 1e-5}[dtype]
    assert_close(found, expected, tolerance * (1 if family in KINDS else case.tolerance))


@pytest.mark.parametrize("K, V, states, dtype", widths((5, 40), (16, 64), (16, 128), (24, 200), (64, 96), (16, 512)))
@pytest.mark.parametrize("family", ["taylor", "square"])
def test_quadratic_attention_agrees_at_any_width_over_stretches(
    family: str, K: int, V: int, states: str, dtype: torch.dtype
):
    torch.manual_seed(1)
    case = FAMILIES[family]((*RAGGED, 1100, 70), states, K=K, V=V)
    case.options["scale"] = K**-0.5
    case = case.rounded(dtype)
    need("triton", case)
    expected, found = case.run("torch", torch.float64, "cuda"), case.run("triton", dtype, "cuda")
    assert_close(found, expected, {torch.bfloat16: TOLERANCE, torch.float16: 5e-3, torch.float32: 1e-5}[dtype])
    again = case.run("triton", dtype, "cuda")
    assert all(torch.equal(found[name], again[name]) for name in found)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("family", ["scalar", "gated_delta", "kda"])
def test_our_kernels_are_accurate_over_32768_tokens_of_mixed_decays(family: str, dtype: torch.dtype, tolerance: float):
    torch.manual_seed(9)
    case = mixed_decays(FAMILIES[family]((32768,), "in out", K=64, V=64)).rounded(dtype)
    expected = case.run("torch", torch.float64, "cuda")
    assert_close(case.run("triton", dtype, "cuda"), expected, tolerance)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 8e-2)])
@pytest.mark.parametrize("family", DELTAS)
def test_our_kernels_flip_one_key_over_and_over(family: str, dtype: torch.dtype, tolerance: float):
    """At beta = 2 a transition has the eigenvalue -1; the overlaps of equal keys are the largest there are."""
    torch.manual_seed(7)
    case = FAMILIES[family]((1100,), "in out", K=128, V=128)
    inputs = case.inputs
    inputs["beta"] = torch.full_like(inputs["beta"], 2.0)
    inputs["k"] = F.normalize(inputs["k"][:1] + 0.05 * inputs["k"], dim=-1)
    if "log_decay" in inputs:
        inputs["log_decay"] = inputs["log_decay"] / 100
    case = case.rounded(dtype)
    assert_close(case.run("triton", dtype, "cuda"), case.run("torch", torch.float64, "cuda"), tolerance)


@pytest.mark.parametrize("family", ["scalar", "diagonal", *DELTAS])
def test_our_kernels_give_the_same_bits_twice(family: str):
    torch.manual_seed(10)
    case = FAMILIES[family]((*RAGGED, 1100, 70), "in out", K=128, V=128).rounded(torch.bfloat16)
    first, second = (case.run("triton", torch.bfloat16, "cuda") for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("family", ["gated_delta", "kda"])
def test_our_kernels_are_part_of_one_compiled_graph(family: str):
    torch.manual_seed(1)
    torch._dynamo.reset()
    case = FAMILIES[family]((3, 64, 130, 187), "in out", K=64, V=96).rounded(torch.bfloat16)
    expected = case.run("triton", torch.bfloat16, "cuda")
    case.function = torch.compile(case.function, fullgraph=True)
    assert_close(case.run("triton", torch.bfloat16, "cuda"), expected, TOLERANCE)


@pytest.mark.parametrize("family", ["scalar", "diagonal", "gated_delta", "kda", "dplr"])
def test_one_compiled_graph_agrees_with_the_definition(family: str):
    torch.manual_seed(1)
    torch._dynamo.reset()
    case = FAMILIES[family]((3, 64, 130, 187), "", K=64, V=96)
    case.inputs["log_decay"] = torch.where(
        torch.rand_like(case.inputs["log_decay"]) < 0.05, -20.0, case.inputs["log_decay"]
    )
    case = case.rounded(torch.bfloat16)
    expected = case.run("reference")
    case.function = torch.compile(case.function, fullgraph=True)
    assert_close(case.run("torch", torch.bfloat16, "cuda"), expected, TOLERANCE)


@pytest.mark.parametrize("family", ["diagonal", "delta", "kda"])
def test_a_compiled_caller_breaks_at_the_kernel_and_agrees(family: str):
    torch.manual_seed(7)
    torch._dynamo.reset()
    case = FAMILIES[family]((64, 130, 7), "", K=64, V=64)
    need("fla", case)
    function = case.function

    def mix(q, **rest):
        o, _ = function(q=q * 2, **rest)
        return o.float().square()

    results = []
    for case.function in (mix, torch.compile(mix)):
        results.append(case.run("fla", torch.bfloat16, "cuda"))
    for name, eager in results[0].items():
        assert relative_error(results[1][name], eager) < TOLERANCE, name


def test_nothing_waits_for_the_gpu_without_states():
    q, k, v = (torch.randn(256, 2, width, device="cuda").bfloat16() for width in (64, 64, 96))
    gate, host = -torch.rand(256, 2, 64, device="cuda"), Segments.of_lengths((128, 128))
    segments = host.to("cuda")
    torch.cuda.synchronize()
    previous = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        linear_recurrence(q, k, v, gate, segments=segments, backend="torch")
        linear_recurrence(q, k, v, gate[..., 0], segments=segments, backend="triton")
        delta_rule(q, k, v, gate[..., 0].exp(), segments=segments, backend="torch")
        delta_rule(q, k, v, gate[..., 0].exp(), gate, segments=segments, backend="torch")
        delta_rule(q, k, v, gate[..., 0].exp(), gate[..., 0], segments=segments, backend="triton")
        delta_rule(q, k, v, gate[..., 0].exp(), gate, segments=segments, backend="triton")
        dplr_rule(q, k, v, -k, k, gate, segments=segments, backend="torch")
    finally:
        torch.cuda.set_sync_debug_mode(previous)
