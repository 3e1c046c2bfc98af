"""The fused head and loss against torch's own cross entropy of all logits at once."""

from __future__ import annotations

import importlib.util
import weakref
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from torchlinearmoe.kernels.cross_entropy import IGNORED, chunk_loss, chunked, linear_cross_entropy
from torchlinearmoe.kernels.cross_entropy import triton as in_place

T, D, V = 37, 16, 53


def _inputs(dtype: torch.dtype, ignored: float = 0.3) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    hidden = torch.randn(T, D, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(V, D, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    labels = torch.randint(0, V, (T,), generator=generator)
    labels[torch.rand(T, generator=generator) < ignored] = IGNORED
    return hidden, weight, labels


def _run(loss: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    return (loss.detach(), *torch.autograd.grad(0.37 * loss, inputs))


@pytest.mark.parametrize("rows", [1, 5, 36, 37, 1000])
@pytest.mark.parametrize("ignored", [0.0, 0.3])
def test_loss_and_both_gradients_equal_torchs_for_any_chunk(monkeypatch, rows: int, ignored: float):
    monkeypatch.setattr(chunked, "CHUNK_ELEMENTS", rows * V)
    hidden, weight, labels = _inputs(torch.float64, ignored)
    chunks: list[int] = []

    def kernel(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        chunks.append(logits.shape[0])
        return chunk_loss(logits, labels)

    actual = _run(linear_cross_entropy(hidden, weight, labels, kernel), hidden, weight)
    expected = _run(F.cross_entropy(hidden @ weight.t(), labels, reduction="sum"), hidden, weight)
    for mine, torchs in zip(actual, expected):
        torch.testing.assert_close(mine, torchs, rtol=1e-12, atol=1e-12)
    assert sum(chunks) == T
    assert max(chunks) <= rows and (len(chunks) == 1 or 2 * max(chunks) >= rows)


@pytest.mark.parametrize("rows", [8, 1000])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_bfloat16_is_close_to_float64_with_a_float32_loss(monkeypatch, rows: int, device: str):
    monkeypatch.setattr(chunked, "CHUNK_ELEMENTS", rows * V)
    hidden, weight, labels = (x.detach().to(device) for x in _inputs(torch.bfloat16))
    for leaf in (hidden, weight):
        leaf.requires_grad_()
    loss, *grads = _run(linear_cross_entropy(hidden, weight, labels), hidden, weight)
    wide = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    expected, *exact = _run(F.cross_entropy(wide[0] @ wide[1].t(), labels, reduction="sum"), *wide)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), expected, rtol=1e-2, atol=0)
    for grad, truth in zip(grads, exact):
        assert grad.dtype == torch.bfloat16
        assert (grad.double() - truth).norm() < 2e-2 * truth.norm()


def test_a_chunk_is_let_go_before_the_next_is_made(monkeypatch):
    monkeypatch.setattr(chunked, "CHUNK_ELEMENTS", 5 * V)
    hidden, weight, labels = _inputs(torch.float32)
    held: list[weakref.ref[Tensor]] = []

    def kernel(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        assert all(tensor() is None for tensor in held)
        loss, gradient = chunk_loss(logits, labels)
        held.extend(map(weakref.ref, (logits, gradient)))
        return loss, gradient

    linear_cross_entropy(hidden, weight, labels, kernel)
    assert len(held) > 4


def test_large_logits_neither_overflow_nor_lose_the_loss():
    hidden, weight = torch.full((2, 1), 300.0), torch.tensor([[1.0], [-1.0], [0.5]])
    loss = linear_cross_entropy(hidden, weight, torch.tensor([0, 1]))
    torch.testing.assert_close(loss, torch.tensor(600.0))


def test_nothing_but_ignored_labels_gives_zero_and_zero_gradients():
    hidden, weight, labels = _inputs(torch.float32, ignored=1.1)
    loss, d_hidden, d_weight = _run(linear_cross_entropy(hidden, weight, labels), hidden, weight)
    assert loss == 0 and not d_hidden.any() and not d_weight.any()


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_a_frozen_input_gets_no_gradient_and_the_other_its_own(frozen: str):
    hidden, weight, labels = _inputs(torch.float64)
    _, d_hidden, d_weight = _run(linear_cross_entropy(hidden, weight, labels), hidden, weight)
    expected: dict[str, Tensor] = {"hidden": d_hidden, "weight": d_weight}
    inputs: dict[str, Tensor] = {"hidden": hidden, "weight": weight}
    inputs[frozen] = inputs[frozen].detach()
    (0.37 * linear_cross_entropy(inputs["hidden"], inputs["weight"], labels)).backward()
    (learned,) = {"hidden", "weight"} - {frozen}
    torch.testing.assert_close(inputs[learned].grad, expected[learned])
    assert inputs[frozen].grad is None


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_evaluation_multiplies_no_gradients(mode):
    hidden, weight, labels = _inputs(torch.float32)
    expected = F.cross_entropy(hidden @ weight.t(), labels, reduction="sum").detach()
    with mode(), torch.profiler.profile() as profile:
        loss = linear_cross_entropy(hidden, weight, labels)
    torch.testing.assert_close(loss, expected)
    assert _matmuls(profile) == 1
    with torch.profiler.profile() as profile:
        linear_cross_entropy(hidden, weight, labels)
    assert _matmuls(profile) == 3


def test_a_second_derivative_is_refused():
    hidden, weight, labels = _inputs(torch.float64)
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(scale * linear_cross_entropy(hidden, weight, labels), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def _matmuls(profile) -> int:
    return sum(event.count for event in profile.key_averages() if event.key in ("aten::mm", "aten::mm.out"))


def in_place_loss(logits: Tensor, labels: Tensor, gradient: bool = True) -> tuple[Tensor, Tensor]:
    """As `chunk_loss`, by our kernel."""
    losses, there = in_place.chunk_losses(logits, labels, gradient)
    return losses.sum(), there


def in_chunks() -> None:
    """Our Triton kernel over several chunks, beside torch's loss; every chunk's logits give way to their gradient."""
    hidden, weight, labels = _inputs(torch.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(in_place, "CHUNK_BYTES", 10 * V * 4)
        assert chunked.chunk_rows(T, V, in_place.CHUNK_BYTES // 4) == 10
        actual = _run(in_place.loss(hidden, weight, labels, chunk_loss), hidden, weight)
    expected = _run(F.cross_entropy(hidden @ weight.t(), labels, reduction="sum"), hidden, weight)
    for mine, torchs in zip(actual, expected):
        torch.testing.assert_close(mine, torchs, rtol=1e-5, atol=1e-5)
    logits = hidden.detach() @ weight.detach().t()
    before, (loss, gradient) = logits.clone(), chunk_loss(logits, labels)
    torch.testing.assert_close(in_place_loss(logits, labels, gradient=False), (loss, before))
    torch.testing.assert_close(in_place_loss(logits, labels), (loss, gradient))
    torch.testing.assert_close(logits, gradient)


def in_tiles() -> None:
    """Rows of several tiles, whose maximum is anywhere; large logits neither overflow nor lose the loss."""
    torch.manual_seed(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(in_place, "LANES", 4)
        logits = torch.randn(5, 100) * torch.tensor([1.0, 300.0, 1e4, 1.0, 0.0])[:, None]
        labels = torch.tensor([0, 99, 64, IGNORED, 31])
        expected = chunk_loss(logits, labels)
        torch.testing.assert_close(in_place_loss(logits.clone(), labels), expected)
        patch.setattr(in_place, "STAGES", 3)
        torch.testing.assert_close(in_place_loss(logits, labels), expected)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
@pytest.mark.parametrize("compared", [in_chunks, in_tiles])
def test_our_triton_puts_the_gradient_in_the_place_of_logits(interpreter: ProcessPoolExecutor, compared) -> None:
    interpreter.submit(compared).result()


@pytest.mark.gpu
@pytest.mark.parametrize("tokens, vocab_size", [(1000, 151936), (4096, 50257)])
def test_our_triton_is_close_to_float64_at_the_size_of_models_on_a_gpu(tokens: int, vocab_size: int) -> None:
    torch.manual_seed(2)
    logits = (torch.randn(tokens, vocab_size, device="cuda") * 3).bfloat16()
    labels = torch.randint(0, vocab_size, (tokens,), device="cuda")
    labels[::7] = IGNORED
    loss, gradient = chunk_loss(logits[:200].double(), labels[:200])
    found, there = in_place_loss(logits[:200].clone(), labels[:200])
    torch.testing.assert_close(found.double(), loss, rtol=1e-5, atol=0)
    assert (there.double() - gradient).norm() < 5e-3 * gradient.norm()
    again = [in_place_loss(logits.clone(), labels) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*again, strict=True))
    assert torch.equal(again[0][1][:200], there)
