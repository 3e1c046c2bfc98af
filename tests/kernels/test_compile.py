"""The operators trace into one graph, forward and backward, when documents come as ids and no state goes in or out."""

import pytest
import torch
from oracle import FAMILIES, assert_close, random_call

from torchlinearmoe.kernels import ops

OWN_KERNEL = ("scalar", "diagonal", "grouped_delta", "kda", "dplr")
"""One family of each file of kernels; tracing takes seconds."""


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(name, marks=[pytest.mark.slow] * (name not in OWN_KERNEL))
        for name in FAMILIES
        if name != "grouped_kda"  # as grouped_delta
    ],
)
def test_compiles_without_a_graph_break(family):
    torch.manual_seed(7)
    torch._dynamo.reset()
    call = random_call(family, lengths=(100, 70), dtype=torch.float32)
    lengths = call.options.pop("cu_seqlens").diff().long()
    call.options["document_ids"] = torch.repeat_interleave(torch.arange(2), lengths)
    expected = call.run("torch")
    function = getattr(ops, call.operator)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    inputs = {name: x.clone().requires_grad_() for name, x in call.inputs.items()}
    o, _ = compiled(**inputs, **call.options)
    o.backward(torch.randn(o.shape, generator=torch.Generator().manual_seed(11), dtype=torch.float64).float())
    actual = {"o": o.detach()} | {f"d_{name}": x.grad for name, x in inputs.items() if x.grad is not None}
    assert_close(actual, expected, 1e-4)


@pytest.mark.parametrize("family", ["constant", "diagonal", "gated_delta", "kda"])
def test_compiles_with_states_of_plain_rows(family):
    torch.manual_seed(8)
    torch._dynamo.reset()
    call = random_call(family, T=70, initial=True, final=True, dtype=torch.float32)
    function = getattr(ops, call.operator)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    o, final = compiled(**call.inputs, **call.options)
    expected = function(**call.inputs, **call.options)
    assert_close({"o": o, "final": final}, {"o": expected[0], "final": expected[1]}, 1e-5)
