"""Our Triton kernels, interpreted on the CPU, against the token-by-token definition in float64."""

import importlib.util
import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest
import torch
from oracle import Call, random_call, relative_error

Compare = Callable[[Call], dict[str, float]]

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")


def errors_of(call: Call) -> dict[str, float]:
    """Relative errors of outputs, states and gradients in float32."""
    from torchlinearmoe.kernels import ops
    from torchlinearmoe.kernels.backends.table import BACKENDS

    ops._choose = lambda _operator, backend, _q: BACKENDS[backend]  # the guards want a GPU
    found, expected = call.run("triton", torch.float32), call.run("reference")
    return {name: relative_error(found[name], expected[name]) for name in expected}


@pytest.fixture(scope="module")
def compare() -> Iterator[Compare]:
    """`errors_of` in a process of its own: Triton reads once, when it is imported, whether it interprets."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TRITON_INTERPRET", "1")
            assert pool.submit(os.getenv, "TRITON_INTERPRET").result() == "1"  # the process has started
        yield lambda call: pool.submit(errors_of, call).result()


def assert_small(errors: dict[str, float]) -> None:
    assert max(errors.values()) < 1e-5, errors


PACKED: dict[str, Any] = {"lengths": (1, 63, 0, 64, 65, 7), "initial": True, "final": True}


@pytest.mark.parametrize("family", ["identity", "constant", "scalar"])
@pytest.mark.parametrize("options", [{"T": 130}, PACKED], ids=["rows", "documents"])
def test_equals_the_definition(compare: Compare, family: str, options: dict[str, Any]) -> None:
    assert_small(compare(random_call(family, **options)))


@pytest.mark.parametrize("initial, final", [(True, False), (False, True)])
def test_states_go_in_or_out_alone(compare: Compare, initial: bool, final: bool) -> None:
    assert_small(compare(random_call("scalar", T=70, initial=initial, final=final)))


@pytest.mark.parametrize("K, V", [(16, 100), (72, 16), (130, 20)])
def test_any_width_of_heads(compare: Compare, K: int, V: int) -> None:
    assert_small(compare(random_call("scalar", B=1, T=66, H=1, K=K, V=V, initial=True, final=True)))


@pytest.mark.parametrize("decay", [0.0, -1e-6, -3.0, -20.0, -1e4, -torch.inf, "mixed"])
def test_decays_of_any_size(compare: Compare, decay: float | str) -> None:
    call = random_call("scalar", B=1, T=140, H=1, initial=True, final=True)
    shape = call.inputs["log_decay"].shape
    if isinstance(decay, float):
        call.inputs["log_decay"] = torch.full(shape, decay, dtype=torch.float64)
    else:
        sizes = torch.tensor([0.0, -1e-6, -1e-3, -0.1, -1.0, -19.0, -1e4, -torch.inf], dtype=torch.float64)
        weights = torch.tensor([8.0, 8.0, 8.0, 4.0, 2.0, 1.0, 1.0, 1.0])
        call.inputs["log_decay"] = sizes[torch.multinomial(weights, shape.numel(), replacement=True)].view(shape)
    errors = compare(call)
    if decay in (-20.0, -1e4, -torch.inf):  # next to nothing comes through
        del errors["d_log_decay"], errors["d_initial_state"]
    assert max(errors.values()) < 1e-4, errors
