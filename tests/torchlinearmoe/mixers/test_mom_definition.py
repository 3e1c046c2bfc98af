"""Mixture of memories against its paper, token by token and memory by memory, outputs and gradients.

Shapes: T tokens, D width, K and V key and value width of a head.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from definitions import MAPS, Weights, cases_of, heads_slice, rms, sigmoid, swish
from mixer_cases import Case, make_stack, random_inputs, relative
from torch import Tensor

from torchlinearmoe.documents import Documents
from torchlinearmoe.mixers.base import Mixer

LENGTHS = (1, 7, 24)


def convolve(weights: Weights, name: str, y: Tensor) -> Tensor:
    """The short convolution `name` with its SiLU over the rows of y, where there is one."""
    if f"{name}.weight" not in weights:
        return y
    taps = weights[f"{name}.weight"]
    last = taps.shape[1] - 1
    rows = [
        sum((taps[:, last - age] * y[t - age] for age in range(min(last, t) + 1)), torch.zeros_like(y[0]))
        for t in range(y.shape[0])
    ]
    return swish(torch.stack(rows))


def mixture(options: Any, weights: Weights, x_TD: Tensor, heads: int, shape: tuple[int, int], memory: Any) -> Tensor:
    """Reads [T, H, V] of one document, given `memory(m, rows [R, D])` -> writes[r][head](state) of a memory's rows."""
    tokens, count = x_TD.shape[0], options.num_memories
    scores = x_TD @ weights["router.weight"].T
    q = convolve(weights, "query_convs.q", x_TD @ weights["inner.q_proj.weight"].T)
    given: list[list[tuple[int, Tensor]]] = [[] for _ in range(count + options.shared_memory)]
    for t in range(tokens):
        exponentials = torch.exp(scores[t] - scores[t].max())
        chosen = sorted(range(count), key=lambda m: -scores[t, m].item())[: options.top_k]
        total = sum(exponentials[m] for m in chosen) if options.renormalize else exponentials.sum()
        for m in chosen:
            given[m].append((t, exponentials[m] / total))
        if options.shared_memory:
            given[-1].append((t, torch.ones(()).double()))
    reads = [[torch.zeros(shape[1]).double() for _ in range(heads)] for _ in range(tokens)]
    for m, entries in enumerate(given):
        if not entries:
            continue
        writes = memory(m, torch.stack([x_TD[t] for t, _ in entries]))
        for h in range(heads):
            state = torch.zeros(shape).double()
            for (t, weight), write in zip(entries, writes):
                state = write[h](state)
                query = q[t, heads_slice(h, shape[0])]
                reads[t][h] = reads[t][h] + weight * (state.T @ query_of(options, query)) / math.sqrt(shape[0])
    return torch.stack([torch.stack(row) for row in reads])


def query_of(options: Any, query: Tensor) -> Tensor:
    """A head's query as it meets the state."""
    if hasattr(options, "feature_map"):
        return MAPS[options.feature_map](query)
    return unit(query)


def unit(x: Tensor) -> Tensor:
    return x / torch.sqrt((x * x).sum() + 1e-6)


def finish(weights: Weights, reads: Tensor, x_TD: Tensor) -> Tensor:
    """Norm and gate of every head, then the output projection."""
    gate = (x_TD @ weights["inner.g_proj.weight"].T).view(reads.shape)
    y = [
        torch.cat([rms(o) * weights["inner.norm.weight"] * swish(g) for o, g in zip(*row)]) for row in zip(reads, gate)
    ]
    return torch.stack(y) @ weights["inner.o_proj.weight"].T


def gla(options: Any, weights: Weights, x_TD: Tensor) -> Tensor:
    heads, width = options.heads or 2, options.head_dim or 32
    key, value = round(width * options.expand_k), round(width * options.expand_v)

    def memory(m: int, rows: Tensor):
        layer = {name: weights[f"write_layers.{name}.weight"][:, m].T for name in ("k_proj", "v_proj")}
        k, v = (convolve(weights, f"inner.convs.{name}", rows @ layer[f"{name}_proj"]) for name in "kv")
        k = MAPS[options.feature_map](k)
        low = rows @ weights["write_layers.decay_down.weight"][:, m].T
        logits = low @ weights["write_layers.decay_up.weight"][:, m].T + weights["write_layers.decay_up.bias"][:, m]
        alpha = sigmoid(logits) ** (1 / options.gate_normalizer)

        def write(r: int, h: int):
            ks, vs = heads_slice(h, key), heads_slice(h, value)
            return lambda state: alpha[r, ks, None] * state + torch.outer(k[r, ks], v[r, vs])

        return [[write(r, h) for h in range(heads)] for r in range(rows.shape[0])]

    return finish(weights, mixture(options, weights, x_TD, heads, (key, value), memory), x_TD)


def gated_delta_net(options: Any, weights: Weights, x_TD: Tensor) -> Tensor:
    heads, key = options.heads or 2, options.head_dim or 32
    value = round(key * options.expand_v)

    def memory(m: int, rows: Tensor):
        k, v, a, b = (rows @ weights[f"write_layers.{name}_proj.weight"][:, m].T for name in "kvab")
        k, v = convolve(weights, "inner.convs.k", k), convolve(weights, "inner.convs.v", v)
        step = torch.log1p(torch.exp(a + weights["inner.decay.dt_bias"]))
        alpha = torch.exp(-torch.exp(weights["inner.decay.A_log"]) * step)
        beta = sigmoid(b) * (2 if options.negative_eigenvalues else 1)

        def write(r: int, h: int):
            k_K, v_V = unit(k[r, heads_slice(h, key)]), v[r, heads_slice(h, value)]
            erase = torch.eye(key).double() - beta[r, h] * torch.outer(k_K, k_K)
            return lambda state: alpha[r, h] * erase @ state + beta[r, h] * torch.outer(k_K, v_V)

        return [[write(r, h) for h in range(heads)] for r in range(rows.shape[0])]

    return finish(weights, mixture(options, weights, x_TD, heads, (key, value), memory), x_TD)


def check(case: Case, formula, mixer: Mixer, context, x_TD: Tensor) -> None:
    """Outputs, and the gradients of their weighted sum by the input and by every parameter."""
    weights = dict(mixer.named_parameters())
    x_TD.requires_grad_()
    actual = mixer(x_TD, context)[0]
    expected = torch.cat([formula(case.options, weights, part) for part in x_TD.split(context.documents.lengths)])
    assert relative(actual.detach(), expected.detach()) < 1e-9
    direction = random_inputs(x_TD.shape[0], seed=5)
    tensors = [x_TD, *weights.values()]
    found, wanted = (torch.autograd.grad((y * direction).sum(), tensors) for y in (actual, expected))
    for name, a, b in zip(["x", *weights], found, wanted):
        assert float((a - b).norm()) < 1e-9 * max(float(b.norm()), 1e-6), name


def _inner(case: Case) -> bool:
    return bool(case.overrides.get("inner"))


@pytest.mark.parametrize(
    "case",
    [case for name in ("mom_gla", "mom_gated_delta_net") for case in cases_of(name).args[1] if not _inner(case)],
    ids=str,
)
def test_equals_the_paper_in_outputs_and_gradients(case: Case):
    stack, x_TD = make_stack(case), random_inputs(sum(LENGTHS), seed=1)
    documents = Documents.packed([0, 1, 8, 32])
    formula = {"mom_gla": gla, "mom_gated_delta_net": gated_delta_net}[case.name]
    check(case, formula, stack.layers[1], stack.context(documents), x_TD)


@pytest.mark.parametrize("name, formula", [("mom_gla", gla), ("mom_gated_delta_net", gated_delta_net)])
def test_a_memory_of_one_token_in_the_whole_stream_is_right(name: str, formula):
    case = Case(name, {"top_k": 1, "shared_memory": False, "renormalize": False, "conv": 3})
    stack, x_TD = make_stack(case), random_inputs(20)
    mixer = stack.layers[0]
    x_TD[:, 0] = -10.0
    x_TD[11, 0] = 10.0
    with torch.no_grad():
        mixer.get_parameter("router.weight")[2] = 0.0
        mixer.get_parameter("router.weight")[2, 0] = 1.0
        chosen = mixer.router(x_TD).topk_ids_Tk  # pyright: ignore
    assert (chosen == 2).sum() == 1 and chosen[11] == 2
    check(case, formula, mixer, stack.context(Documents.packed([0, 6, 20])), x_TD)
    (row,) = torch.autograd.grad(mixer(x_TD, stack.context(Documents.packed([0, 6, 20])))[0].sum(), x_TD)
    assert float(row[11].norm()) > 1e-3
