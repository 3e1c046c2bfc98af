"""Every backend that is declared computes what its operator's definition computes: outputs, states, every gradient.

A new backend needs no test of its own. Triton is interpreted here, in float32 and float16 (its products of bfloat16 are
wrong there); float16 and bfloat16 belong to the GPU.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest
import torch
from cases import Case, cases_of, forced, relative_error

from torchlinearmoe.kernels import choose
from torchlinearmoe.kernels.operator import Backend, Operator, operators

ROUNDED = 5e-3
"""Of float32 that is rounded to TF32."""
TOLERANCES = {torch.float64: 1e-11, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
CANCELLING = 30
"""Times these are allowed to a float32 gradient that is one sum over all tokens."""
DIFFERENCE = 2
"""Times to the gradient of decays in 16 bits: by the chunk it is a difference of sums that are rounded apart."""


def declared() -> list[tuple[Operator, Backend]]:
    """Every backend beside the definitions."""
    found = [(o, b) for o in operators().values() for b in o.find_backends().values()]
    return [(operator, backend) for operator, backend in found if backend.name != "reference"]


def of_backend(operator: Operator, backend: Backend, device: str, dtype: torch.dtype) -> list[tuple[int, Case]]:
    """Its cases that this machine computes rightly, fresh."""
    found, machine = [], choose.this_machine()
    for index, draw in enumerate(cases_of(operator)):
        torch.manual_seed(index)
        case = draw().rounded(dtype)
        segments = case.options.get("segments")
        stateful = any(name.startswith(("initial", "first")) for name in case.inputs)
        single = segments is not None and segments.single and stateful
        states = stateful or bool(case.options.get("want_final"))
        call = choose.Call(case.kind, device, dtype, case.channels, states=states)
        on_gpu = device == "cuda"
        refusal = choose.refuse(backend, call, machine, auto=False) if on_gpu else backend.refuses(call)
        if case.kind in backend.kinds and backend.single == single and refusal is None:
            found.append((index, case))
    return found


def compare(
    operator: Operator, backend: Backend, device: str, dtype: torch.dtype, cases: list[tuple[int, Case]]
) -> None:
    """Cases of a backend against the definition in float64."""
    assert cases, f"{operator.name}: no case is for {backend.name}"
    for index, case in cases:
        found = forced(operator, backend.name, lambda case=case: case.run(backend.name, dtype, device))
        expected = forced(operator, "reference", lambda case=case: case.run("reference"))
        assert found.keys() == expected.keys()
        errors = {name: relative_error(found[name], expected[name]) for name in expected}
        if dtype in (torch.float16, torch.bfloat16):
            assert all(bool(found[f"d_{name}"].isfinite().all()) for name in case.sums if name in case.inputs)
            errors = {name: error for name, error in errors.items() if name.removeprefix("d_") not in case.sums}
            errors |= {name: error / DIFFERENCE for name, error in errors.items() if name == "d_log_decay"}
        limit = (TOLERANCES[dtype] if backend.exact or dtype != torch.float32 else ROUNDED) * case.tolerance
        for name, error in errors.items():
            more = CANCELLING if name.removeprefix("d_") in case.sums else 1
            assert error < limit * more, (operator.name, backend.name, index, name, errors)


def runs_on(backend: Backend, device: str) -> bool:
    return backend.devices is None or device in backend.devices


def parameters(chosen: Callable[[Backend], bool]) -> list[Any]:
    return [pytest.param(o, b, id=f"{o.name}-{b.name}") for o, b in declared() if chosen(b)]


@pytest.mark.parametrize("operator, backend", parameters(lambda b: runs_on(b, "cpu")))
def test_equals_the_definition(operator: Operator, backend: Backend) -> None:
    for dtype in (torch.float64, torch.float32):
        if dtype in backend.dtypes:
            compare(operator, backend, "cpu", dtype, of_backend(operator, backend, "cpu", dtype))


def interpreted(operator_name: str, backend_name: str, dtype: torch.dtype) -> None:
    """In the process of `interpreter`. It is slow: long streams meet what has all inputs only, in float32."""
    operator = operators()[operator_name]
    backend = operator.find_backends()[backend_name]
    cases = of_backend(operator, backend, "cpu", dtype)
    everything = {"log_decay", "initial_state"}
    cases = [
        (i, case)
        for i, case in cases
        if case.tokens <= 100 or (dtype == torch.float32 and everything <= case.inputs.keys() - {*case.sums})
    ]
    compare(operator, backend, "cpu", dtype, cases)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
@pytest.mark.parametrize("operator, backend", parameters(lambda b: b.needs == ("triton",)))
def test_our_triton_equals_the_definition(
    interpreter: ProcessPoolExecutor, operator: Operator, backend: Backend, dtype: torch.dtype
) -> None:
    interpreter.submit(interpreted, operator.name, backend.name, dtype).result()


@pytest.mark.gpu
@pytest.mark.usefixtures("little_tuning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("operator, backend", parameters(lambda b: runs_on(b, "cuda")))
def test_equals_the_definition_on_a_gpu(operator: Operator, backend: Backend, dtype: torch.dtype) -> None:
    cases = of_backend(operator, backend, "cuda", dtype)
    if not cases:
        call = choose.Call(operator.kinds[0], "cuda", dtype, 64)
        pytest.skip(f"{backend.name}: {choose.refuse(backend, call, choose.this_machine(), auto=False)}")
    compare(operator, backend, "cuda", dtype, cases)


def test_every_operator_has_a_definition_and_something_for_auto() -> None:
    for operator in operators().values():
        backends = operator.find_backends()
        assert backends["reference"].kinds == operator.kinds and backends["reference"].order is None
        for kind in operator.kinds:
            assert any(b.order is not None and kind in b.kinds and not b.single for b in backends.values())
