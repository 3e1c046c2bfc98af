"""A sequence in spans that go one after another equals the whole: on a GPU with its kernels, for every mixer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from mixer_cases import Case, Stack, every_mixer, make_stack, random_inputs, relative
from spans_in_turn import in_turn
from torch import Tensor, nn

from torchlinearmoe.documents import Documents
from torchlinearmoe.mixers import MIXERS
from torchlinearmoe.mixers.mom import MoM
from torchlinearmoe.spans import Exchange, cut_spans

ROW = 512
# First row: one token, a document over most spans, one that ends with the row. Second row: a document through it all.
BORDERS = [0, 1, 300, 301, 512, 1024]

Results = dict[str, Tensor]


def inputs(device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Tokens and the weights of their outputs, all of which bfloat16 can tell."""
    x_TD, weights_TD = (random_inputs(BORDERS[-1], seed, torch.bfloat16).to(device, dtype) for seed in (0, 3))
    return x_TD, weights_TD


def results_of(stack: Stack, y_TD: Tensor, x_TD: Tensor, weights_TD: Tensor) -> Results:
    """Outputs and the gradients of a weighted sum of them."""
    named = {"inputs": x_TD, **dict(stack.named_parameters())}
    gradients = torch.autograd.grad((y_TD.double() * weights_TD.double()).sum(), list(named.values()))
    return {"output": y_TD.detach(), **dict(zip(named, gradients, strict=True))}


def whole_run(stack: Stack, device: str, dtype: torch.dtype) -> Results:
    x_TD, weights_TD = inputs(device, dtype)
    context = stack.context(Documents.packed(BORDERS, ROW, device))
    return results_of(stack, stack(x_TD.requires_grad_(), context)[0], x_TD, weights_TD)


def spanned_run(
    stack: Stack, device: str, dtype: torch.dtype, size: int, attention: str, monkeypatch: pytest.MonkeyPatch
) -> Results:
    x_TD, weights_TD = inputs(device, dtype)
    x_TD.requires_grad_()

    def run(group: Any) -> Tensor:
        spans = cut_spans(BORDERS, ROW, group, device, Exchange(attention=attention))
        own_TD = x_TD.view(-1, size, spans.length, x_TD.shape[-1])[:, spans.rank].flatten(0, 1)
        documents = Documents.packed(spans.borders, spans.length, device, spans)
        return stack(own_TD, stack.context(documents, spans.positions))[0]

    parts = in_turn(size, run, monkeypatch)
    y_TD = torch.stack([part.unflatten(0, (-1, ROW // size)) for part in parts], 1).flatten(0, 2)
    return results_of(stack, y_TD, x_TD, weights_TD)


def in_half(stack: Stack) -> Stack:
    """All in bfloat16 but what a mixer keeps in float32."""
    for module in stack.modules():
        if not getattr(module, "keep_fp32", False):
            for key, parameter in module.named_parameters(recurse=False):
                setattr(module, key, nn.Parameter(parameter.detach().bfloat16()))
    return stack


@pytest.mark.parametrize("size, attention", [(2, "heads"), (4, "gather")])
@pytest.mark.parametrize("name", ["mamba2", "rwkv7", "gsa", "rebased", "mom_gated_delta_net", "softmax_attention"])
def test_turns_are_what_ranks_would_do(name: str, size: int, attention: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stack = make_stack(Case(name, {}), num_kv_heads=2)
    expected = whole_run(stack, "cpu", torch.float64)
    found = spanned_run(stack, "cpu", torch.float64, size, attention, monkeypatch)
    for key, value in expected.items():
        assert relative(found[key], value) < 1e-9, key


def check_on_gpu(case: Case, backend: str, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Spans in bfloat16 are as near to the whole in float64 as bfloat16 allows."""
    # Rounded to bfloat16, some tokens go to another memory.
    dtype = torch.float32 if issubclass(case.mixer, MoM) else torch.bfloat16
    stack = make_stack(case, dtype=torch.float32, kernel_backend=backend).cuda()
    stack = in_half(stack) if dtype == torch.bfloat16 else stack
    wide = make_stack(case, kernel_backend="torch").cuda()
    wide.load_state_dict(stack.state_dict())
    exact = whole_run(wide, "cuda", torch.float64)
    whole = whole_run(stack, "cuda", dtype)
    found = spanned_run(stack, "cuda", dtype, size, "auto", monkeypatch)
    errors = {key: (relative(found[key], exact[key]), relative(whole[key], exact[key])) for key in exact}
    print(f"{case}, {size} spans:", *(f"{key} {a:.1e} {b:.1e}" for key, (a, b) in errors.items()))
    limit = 4e-2 if dtype == torch.bfloat16 else 1e-3
    wrong = {key: pair for key, pair in errors.items() if not pair[0] < max(limit, 3 * pair[1])}
    assert not wrong


@pytest.mark.gpu
@every_mixer
def test_spans_on_a_gpu_equal_the_whole(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    check_on_gpu(case, "torch", 4, monkeypatch)


@pytest.mark.gpu
@pytest.mark.parametrize("size", [2, 8])
@pytest.mark.parametrize("name", MIXERS)
def test_more_spans_on_a_gpu_equal_the_whole(name: str, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    check_on_gpu(Case(name, {}), "torch", size, monkeypatch)


@pytest.mark.gpu
@pytest.mark.usefixtures("little_tuning")
@pytest.mark.parametrize("name", MIXERS)
def test_spans_by_the_kernels_of_packages_equal_the_whole(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check_on_gpu(Case(name, {}), "auto", 4, monkeypatch)
