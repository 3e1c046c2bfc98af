"""The chunk-parallel forms compute what the token-by-token definitions compute, forward and backward."""

import pytest
import torch
from oracle import AWKWARD_LENGTHS, FAMILIES, assert_close, random_call

from torchlinearmoe.kernels import ops
from torchlinearmoe.kernels.backends import ours
from torchlinearmoe.kernels.chunked.scan import scan_decay, scan_dense
from torchlinearmoe.kernels.chunked.solve import solve_unit_lower


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("states", ["", "in", "out", "in out"])
@pytest.mark.parametrize("lengths", [None, AWKWARD_LENGTHS], ids=["rows", "packed"])
def test_equals_definition_with_every_gradient(family, states, lengths):
    torch.manual_seed(1)
    call = random_call(family, lengths=lengths, initial="in" in states, final="out" in states)
    assert_close(call.run("torch"), call.run("reference"), 1e-9)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("K, V", [(128, 16), (16, 128), (40, 72), (64, 64)])
def test_equals_definition_for_any_head_dims(family, K, V):
    torch.manual_seed(2)
    call = random_call(family, B=1, T=70, K=K, V=V, initial=True, final=True)
    assert_close(call.run("torch"), call.run("reference"), 1e-9)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tokens", [1, 2, 17, 64, 128])
def test_equals_definition_for_any_length(family, tokens):
    torch.manual_seed(3)
    call = random_call(family, T=tokens, initial=True, final=True)
    assert_close(call.run("torch"), call.run("reference"), 1e-9)


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_definition_when_many_chunks_are_scanned(family, monkeypatch):
    torch.manual_seed(4)
    monkeypatch.setattr(ours, "CHUNK_SIZE", 8)
    call = random_call(family, B=1, H=1, lengths=(290, 5, 0, 6, 40), initial=True, final=True)
    assert_close(call.run("torch"), call.run("reference"), 1e-9)


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_documents_equal_each_document_alone(family):
    torch.manual_seed(5)
    lengths = (1, 63, 20, 70)
    packed = random_call(family, lengths=lengths, initial=True, final=True)
    inputs, row = packed.inputs, 0
    function = getattr(ops, packed.operator)
    o, final = function(**inputs, **packed.options)
    for document, length in enumerate(lengths):
        alone = {
            name: x[document : document + 1]
            if name == "initial_state"
            else (x if x.dim() < 3 else x[:, row : row + length])
            for name, x in inputs.items()
        }
        o_alone, final_alone = function(**alone, output_final_state=True)
        torch.testing.assert_close(o[:, row : row + length], o_alone, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(final[document : document + 1], final_alone, rtol=1e-9, atol=1e-9)
        row += length


@pytest.mark.parametrize("family", FAMILIES)
def test_document_ids_alone_give_the_same_outputs(family):
    torch.manual_seed(6)
    call = random_call(family, lengths=(30, 64, 50, 7))
    expected = call.run("torch")
    lengths = call.options.pop("cu_seqlens").diff().long()
    call.options["document_ids"] = torch.repeat_interleave(torch.arange(4), lengths)
    assert_close(call.run("torch"), expected, 1e-12)
    assert_close(call.run("reference"), expected, 1e-9)


@pytest.mark.parametrize("family", ["scalar", "bonus", "gated_delta", "grouped_kda", "dplr"])
def test_gradients_pass_gradcheck(family):
    torch.manual_seed(8)
    call = random_call(family, H=1, K=3, V=2, lengths=(3, 0, 6), initial=True, final=True)
    names = list(call.inputs)

    def function(*tensors):
        return getattr(ops, call.operator)(**dict(zip(names, tensors)), **call.options)

    torch.autograd.gradcheck(function, [x.clone().requires_grad_() for x in call.inputs.values()])


@pytest.mark.parametrize("chunks", [1, 5, 33, 80])
@pytest.mark.parametrize("initial", [False, True])
def test_scans_equal_the_plain_loop(chunks, initial):
    torch.manual_seed(9)
    log_a, b = -torch.rand(1, 2, 3, chunks).double(), torch.randn(1, 2, 3, chunks, 4).double()
    s0 = torch.randn(1, 2, 3, 4).double() if initial else None
    expected, state = [], torch.zeros(1, 2, 3, 4).double() if s0 is None else s0
    for m in range(chunks):
        expected.append(state)
        state = log_a[..., m, None].exp() * state + b[..., m, :]
    states, final = scan_decay(log_a, b, s0, True, radix=4)
    torch.testing.assert_close(states, torch.stack(expected, 3))
    torch.testing.assert_close(final, state)

    dense_a, dense_b = torch.randn(1, 2, chunks, 4, 4).double() / 3, torch.randn(1, 2, chunks, 4, 5).double()
    dense_s0 = torch.randn(1, 2, 4, 5).double() if initial else None
    expected, state = [], torch.zeros(1, 2, 4, 5).double() if dense_s0 is None else dense_s0
    for m in range(chunks):
        expected.append(state)
        state = dense_a[:, :, m] @ state + dense_b[:, :, m]
    states, final = scan_dense(dense_a, dense_b, dense_s0, True, loop_below=2)
    torch.testing.assert_close(states, torch.stack(expected, 2))
    torch.testing.assert_close(final, state)


@pytest.mark.parametrize("size", [1, 8, 16, 64])
def test_merged_blocks_solve_the_triangular_system(size):
    torch.manual_seed(10)
    lower = torch.randn(2, 3, size, size).double() / size**0.5
    right = torch.randn(2, 3, size, 5).double()
    inputs = [x.requires_grad_() for x in (lower, right)]
    cotangent = torch.randn_like(right)

    def plain(lower, right):
        return torch.linalg.solve_triangular(lower, right, upper=False, unitriangular=True)

    solution, expected = solve_unit_lower(lower, right), plain(lower, right)
    torch.testing.assert_close(solution, expected)
    actual = torch.autograd.grad(solution, inputs, cotangent)
    torch.testing.assert_close(actual, torch.autograd.grad(expected, inputs, cotangent))
