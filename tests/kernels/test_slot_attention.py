"""Slot attention, chunk-parallel and token by token, against its definition: forward, backward, states, precision.

Legend: B rows, T tokens, H heads, K/V key/value head dim, S slots, N documents.
"""

from typing import Any

import pytest
import torch
from oracle import AWKWARD_LENGTHS, assert_close
from torch import Tensor
from torch.nn import functional as F

from torchlinearmoe.kernels import ops, step
from torchlinearmoe.kernels.backends import ours
from torchlinearmoe.kernels.chunked.gsa import halved_sums

Tensors = dict[str, Tensor]


def random_inputs(
    *, B=2, T=150, H=2, K=12, V=20, S=8, lengths=None, initial=False, dtype=torch.float64
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(differentiable inputs, options); `lengths` packs documents into one row."""
    options: dict[str, Any] = {}
    if lengths is not None:
        B, T = 1, sum(lengths)
        options["cu_seqlens"] = F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).int()
    N = B if lengths is None else len(lengths)
    sizes = {"q": K, "k": K, "v": V, "s": S}
    inputs: dict[str, Any] = {name: torch.randn(B, T, H, size, dtype=dtype) for name, size in sizes.items()}
    inputs["log_decay"] = F.logsigmoid(torch.randn(B, T, H, S, dtype=dtype) + 2)
    if initial:
        inputs["keys"] = torch.randn(N, H, K, S, dtype=dtype)
        inputs["values"] = torch.randn(N, H, S, V, dtype=dtype)
    return inputs, options


def call(inputs: Tensors, options: dict, backend: str) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    given = dict(inputs)
    initial = (given.pop("keys"), given.pop("values")) if "keys" in given else None
    return ops.slot_attention(**given, **options, initial_state=initial, backend=backend)


def run(inputs: Tensors, options: dict, backend: str = "torch", dtype: torch.dtype | None = None) -> Tensors:
    """The output, the final states, and the gradient of every input under fixed random cotangents."""
    cast = {
        name: x if dtype is None else x.to(dtype if name in "qkvs" or dtype == torch.float64 else torch.float32)
        for name, x in inputs.items()
    }
    leaves = {name: x.detach().clone().requires_grad_() for name, x in cast.items()}
    o, final = call(leaves, options, backend)
    results: Tensors = {"o": o} if final is None else {"o": o, "final_keys": final[0], "final_values": final[1]}
    generator = torch.Generator().manual_seed(11)
    cotangents = [torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in results.values()]
    torch.stack([(x.double() * c).sum() for x, c in zip(results.values(), cotangents)]).sum().backward()
    for name, x in leaves.items():
        assert x.grad is not None, f"no gradient for {name}"
        results[f"d_{name}"] = x.grad
    return {name: x.detach() for name, x in results.items()}


@pytest.mark.parametrize("states", ["", "in", "out", "in out"])
@pytest.mark.parametrize("lengths", [None, AWKWARD_LENGTHS], ids=["rows", "packed"])
def test_equals_the_definition_with_every_gradient(states, lengths):
    torch.manual_seed(1)
    inputs, options = random_inputs(lengths=lengths, initial="in" in states)
    options["output_final_state"] = "out" in states
    assert_close(run(inputs, options), run(inputs, options, "reference"), 1e-9)


@pytest.mark.parametrize("tokens", [1, 2, 17, 64, 128])
@pytest.mark.parametrize("K, V, S", [(16, 40, 5), (5, 8, 64)])
def test_equals_the_definition_for_any_length_and_dims(tokens, K, V, S):
    torch.manual_seed(2)
    inputs, options = random_inputs(T=tokens, K=K, V=V, S=S, initial=True)
    options["output_final_state"] = True
    assert_close(run(inputs, options), run(inputs, options, "reference"), 1e-9)


def test_equals_the_definition_when_many_chunks_are_scanned(monkeypatch):
    torch.manual_seed(3)
    monkeypatch.setattr(ours, "CHUNK_SIZE", 8)
    inputs, options = random_inputs(H=1, lengths=(290, 5, 0, 6, 40), initial=True)
    options["output_final_state"] = True
    assert_close(run(inputs, options), run(inputs, options, "reference"), 1e-9)


def test_document_ids_alone_give_the_same_outputs():
    torch.manual_seed(4)
    inputs, options = random_inputs(lengths=(30, 64, 50, 7))
    expected = run(inputs, options)
    ids = torch.repeat_interleave(torch.arange(4), options["cu_seqlens"].diff().long())
    assert_close(run(inputs, {"document_ids": ids}), expected, 1e-12)
    assert_close(run(inputs, {"document_ids": ids}, "reference"), expected, 1e-9)


def test_gradients_pass_gradcheck():
    torch.manual_seed(5)
    inputs, options = random_inputs(H=1, K=3, V=2, S=2, lengths=(3, 0, 6), initial=True)
    options["output_final_state"] = True
    names = list(inputs)

    def function(*tensors):
        o, final = call(dict(zip(names, tensors)), options, "torch")
        assert final is not None
        return o, *final

    torch.autograd.gradcheck(function, [x.clone().requires_grad_() for x in inputs.values()])


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-9), (torch.float32, 1e-4), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("lengths", [(150,), (1, 40, 0, 70, 30)], ids=str)
def test_decays_of_every_size_stay_accurate(dtype, tolerance, lengths):
    """Every eighth decay or so empties a slot, the others hardly touch it."""
    torch.manual_seed(6)
    inputs, options = random_inputs(lengths=lengths, initial=True, K=16, V=16)
    options["output_final_state"] = True
    sizes = torch.tensor([0.0, -1e-6, -1e-3, -0.1, -1.0, -20.0, -1e4, -torch.inf]).double()
    weights = torch.tensor([8.0, 8.0, 8.0, 4.0, 2.0, 1.0, 1.0, 1.0])
    shape = inputs["log_decay"].shape
    inputs["log_decay"] = sizes[torch.multinomial(weights, shape.numel(), replacement=True)].view(shape)
    for name, x in inputs.items():  # inputs that `dtype` holds exactly: only the computation's errors are compared
        inputs[name] = (x / 2 if name in "qks" else x).to(dtype if name in "qkvs" else torch.float32).double()
    assert_close(run(inputs, options, dtype=dtype), run(inputs, options, "reference"), tolerance)


def test_slots_are_kept_in_float32_beside_bf16_inputs():
    inputs, options = random_inputs(T=20)
    results = run(inputs, {**options, "output_final_state": True}, dtype=torch.bfloat16)
    assert results["o"].dtype == torch.bfloat16
    assert results["final_keys"].dtype == results["final_values"].dtype == torch.float32


def test_halved_sums_equal_the_sums_they_stand_for():
    torch.manual_seed(7)
    products, w, a = torch.randn(3, 16, 16).double(), torch.randn(3, 16, 5).double(), torch.rand(3, 16, 5).double()
    sums, since, until = halved_sums(products, w, a)
    for t in range(16):
        terms = [products[:, t, s, None] * w[:, s] * a[:, s + 1 : t + 1].prod(1) for s in range(t + 1)]
        torch.testing.assert_close(sums[:, t], torch.stack(terms).sum(0))
        torch.testing.assert_close(since[:, t], a[:, : t + 1].prod(1))
        torch.testing.assert_close(until[:, t], w[:, t] * a[:, t + 1 :].prod(1))


def test_steps_equal_the_definition():
    torch.manual_seed(8)
    inputs, _ = random_inputs(B=3, T=6, initial=True)
    expected, final = call(inputs, {"output_final_state": True, "scale": 0.7}, "reference")
    state = first = (inputs["keys"], inputs["values"])
    untouched = [x.clone() for x in first]
    for t in range(6):
        q, k, v, s, log_decay = (inputs[name][:, t] for name in ("q", "k", "v", "s", "log_decay"))
        o, state = step.slot_step(q, k, v, s, log_decay, *state, scale=0.7)
        torch.testing.assert_close(o, expected[:, t], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(state, final, rtol=1e-9, atol=1e-9)
    assert all(torch.equal(x, y) for x, y in zip(first, untouched))


def test_scale_defaults_to_one_over_root_of_the_key_dim():
    inputs, _ = random_inputs(T=9, K=16, initial=True)
    keys, values = inputs.pop("keys"), inputs.pop("values")
    for backend in ("torch", "reference"):
        default, _ = ops.slot_attention(**inputs, backend=backend)
        torch.testing.assert_close(ops.slot_attention(**inputs, scale=0.25, backend=backend)[0], default)
    first = {name: x[:, 0] for name, x in inputs.items()} | {"keys": keys, "values": values}
    torch.testing.assert_close(step.slot_step(**first, scale=0.25)[0], step.slot_step(**first)[0])


def test_compiles_without_a_graph_break():
    torch.manual_seed(9)
    torch._dynamo.reset()
    inputs, options = random_inputs(lengths=(100, 70), dtype=torch.float32)
    ids = torch.repeat_interleave(torch.arange(2), options["cu_seqlens"].diff().long())
    compiled = torch.compile(ops.slot_attention, fullgraph=True, backend="aot_eager")
    leaves = {name: x.clone().requires_grad_() for name, x in inputs.items()}
    o, _ = compiled(**leaves, document_ids=ids)
    generator = torch.Generator().manual_seed(11)
    o.backward(torch.randn(o.shape, generator=generator, dtype=torch.float64).float())
    actual = {"o": o.detach()} | {f"d_{name}": x.grad for name, x in leaves.items() if x.grad is not None}
    assert_close(actual, run(inputs, options), 1e-4)


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"s": torch.zeros(2, 3, 2, 8)}, "s: shape (2, 3, 2, 8), legal: (2, 4, 2, 8)"),
        ({"log_decay": torch.zeros(2, 4, 2)}, "log_decay: shape (2, 4, 2), legal: (2, 4, 2, 8)"),
        ({"k": torch.zeros(2, 4, 2, 5)}, "k: shape (2, 4, 2, 5), legal: (2, 4, 2, 12)"),
        (
            {"initial_state": (torch.zeros(2, 2, 8, 12), torch.zeros(2, 2, 8, 20))},
            "initial_state: shape (2, 2, 8, 12), legal: (2, 2, 12, 8)",
        ),
        ({"backend": "cuda"}, "model.kernel_backend = 'cuda': legal: auto, torch"),
    ],
)
def test_refuses_in_one_line(wrong, message):
    inputs, _ = random_inputs(T=4)
    with pytest.raises(ValueError) as error:
        ops.slot_attention(**{**inputs, **wrong})
    assert message in str(error.value)
    assert "\n" not in str(error.value)
