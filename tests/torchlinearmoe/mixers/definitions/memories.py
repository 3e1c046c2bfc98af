"""Mixtures of memories, Du et al. 2025, arXiv 2502.13685: memory by memory, token by token.

A memory is a mixer said in four parts (`plain.py`), given the tokens that chose it and no others.
"""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module

import torch
from definitions.plain import Layer, recurrence, softmax
from torch import Tensor


def mixture(layer: Layer, inner: str, x: Tensor) -> Tensor:
    """The sum of what a token reads from its memories, by weight, and from the shared one, then the inner way out."""
    formula, tokens = import_module(f"definitions.{inner}"), range(x.shape[0])
    own = _memory(layer, inner, 0)
    q = formula.query(own, x)
    given = _tokens_of(layer, x)
    reads: list[Tensor | float] = [0.0 for _ in tokens]
    for m, entries in enumerate(given):
        if entries:
            rows = [t for t, _ in entries]
            o = recurrence(formula.step, q[rows], *formula.write(_memory(layer, inner, m), x[rows]))
            for (t, weight), o_t in zip(entries, o):
                reads[t] = reads[t] + weight * o_t
    return formula.output(own, torch.stack([torch.as_tensor(o) for o in reads]), x)


def _tokens_of(layer: Layer, x: Tensor) -> list[list[tuple[int, Tensor | float]]]:
    """(token, weight) of the tokens that each memory is given, the shared one last."""
    options, shares = layer.options, softmax(x @ layer.weights["router.weight"].T)
    given: list[list[tuple[int, Tensor | float]]] = [[] for _ in range(options.num_memories)]
    for t, share in enumerate(shares):
        chosen = sorted(range(options.num_memories), key=lambda m: -share[m].item())[: options.top_k]
        total = sum(share[m] for m in chosen) if options.renormalize else 1.0
        for m in chosen:
            given[m].append((t, share[m] / total))
    return [*given, [(t, 1.0) for t in range(x.shape[0])]] if options.shared_memory else given


def _memory(layer: Layer, inner: str, m: int) -> Layer:
    """The memory m as a layer of its mixer: linear layers of its own for what it writes by, the others for all."""
    weights = {}
    for name, weight in layer.weights.items():
        owner, _, rest = name.partition(".")
        if owner == "write_layers":
            weights[rest] = weight[:, m]
        elif owner == "inner":
            weights[rest] = weight
        elif owner == "query_convs":
            weights[f"convs.{rest}"] = weight
    return replace(layer, options=layer.sections.get(inner, layer.options), weights=weights)
