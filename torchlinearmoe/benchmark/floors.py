"""The least that a step has to do, by category: FLOPs and bytes counted from the model's shapes.

A category's floor is the longer of its FLOPs at the rate of a large product and its bytes at the rate of a large copy.
Backward costs twice the forward's FLOPs; recomputation is not counted. T tokens, D width, k experts a token of hidden
width F, b bytes an activation; everything a token and layer unless said.

    matmul       3 x 2 FLOPs a weight that the token meets in mixers' matrices, routers, experts and dense
                 feed-forwards, at one rate whatever their type
    recurrence   3 x `mixing_flops` of the linear mixers; bytes: see `_core_bytes`
    attention    the same of the softmax mixers
    moe          bytes: `kernels.dispatch.budget`
    head         3 x 2 D V FLOPs, the three products; once a token. Logits need not pass through memory
    optimizer    the bytes of norm and update, once a step: see `update_bytes`
    other        16 D b bytes for two norms with their residual sums (x, y read, x, h written; backward the same of
                 gradients and x), half for one, and `kernels.swiglu.budget` for every SwiGLU; a squared ReLU reads and
                 writes half of that

Sharding has none.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from torchlinearmoe.benchmark.rates import Rates
from torchlinearmoe.kernels import dispatch, swiglu
from torchlinearmoe.kernels.operator import Budget
from torchlinearmoe.layers.mlp import FeedForward, NoFeedForward
from torchlinearmoe.mixers.base import Mixer
from torchlinearmoe.models.decoder import Decoder
from torchlinearmoe.models.flops import active_parameters, head_flops
from torchlinearmoe.moe.layer import MoE
from torchlinearmoe.recipe.schema import ModelRecipe


@dataclass(frozen=True)
class Work:
    """FLOPs and bytes."""

    flops: float = 0.0
    bytes: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(self.flops + other.flops, self.bytes + other.bytes)

    def times(self, factor: float) -> Work:
        """As often as `factor`."""
        return Work(self.flops * factor, self.bytes * factor)

    def seconds(self, rates: Rates) -> float:
        """The least time."""
        return max(self.flops / rates.flops, self.bytes / rates.bytes)


def step_work(model: Decoder, tokens: int, length: int, itemsize: int, optimizer_bytes: float) -> dict[str, Work]:
    """The work of a step by category.

    model: the whole one, on any device; tokens: of a step; length: of a document; itemsize: bytes of an activation.
    """
    token = {name: Work() for name in ("matmul", "recurrence", "attention", "moe", "other")}
    for layer in model.layers.values():
        mixer, ffn = layer.mixer, layer.ffn
        assert isinstance(mixer, Mixer) and isinstance(ffn, nn.Module)
        core = mixer.mixing_flops(length)
        kind = "attention" if mixer.keeps_past else "recurrence"
        products = mixer.flops_per_token(length) - core + 2.0 * active_parameters(ffn)
        token["matmul"] += Work(3 * products)
        token[kind] += Work(3 * core, _core_bytes(mixer, model.recipe.hidden_size, itemsize))
        if isinstance(ffn, MoE):
            token["moe"] += _moved(dispatch.budget(1, ffn.router.top_k, ffn.experts.down.shape[2], itemsize))
        norms = Work(bytes=(8 if isinstance(ffn, NoFeedForward) else 16) * model.recipe.hidden_size * itemsize)
        gated = 1.0 if model.recipe.activation == "swiglu" else 0.5
        token["other"] += norms + _moved(swiglu.budget(1, _hidden_widths(ffn), itemsize)).times(gated)
    step = {name: work.times(tokens) for name, work in token.items()}
    return step | {
        "head": Work(3 * head_flops(model.recipe)).times(tokens),
        "optimizer": Work(bytes=optimizer_bytes),
    }


def softmax_twin(recipe: ModelRecipe) -> Decoder:
    """The recipe's shapes with softmax attention in every layer, as peers train them; on the meta device."""
    with torch.device("meta"):
        return Decoder(replace(recipe, layout="N", mixers=()))


def update_bytes(tensors: Iterable[tuple[Tensor, Iterable[Tensor | None]]]) -> float:
    """Bytes of norm and update of one micro-batch's gradients, which have the weight's type: a gradient is read twice,
    weight, rest and moments are read and written.

    tensors: a weight, and what lies beside it, of each parameter.
    """
    total = 0.0
    for weight, beside in tensors:
        held = sum(tensor.element_size() for tensor in (weight, *beside) if tensor is not None)
        total += 2 * weight.numel() * (weight.element_size() + held)
    return total


def _core_bytes(mixer: Mixer, width: int, itemsize: int) -> float:
    """Bytes a token between a mixer's projections: I channels that its layers make of the hidden state, O that its
    output layer takes. Forward reads I and writes O; backward reads both again as I and the gradient of O, and writes
    the gradient of I: 3 I + 2 O."""
    outputs = mixer.projections.get("o")
    made = taken = 0
    for name, layer in mixer.named_modules():
        if isinstance(layer, nn.Linear):
            if name == outputs:
                taken += layer.in_features
            elif layer.in_features == width:
                made += layer.out_features
    return itemsize * (3 * made + 2 * taken)


def _moved(budget: Budget) -> Work:
    """Bytes alone: their FLOPs are few, and not those of products."""
    return Work(bytes=budget.forward_bytes + budget.backward_bytes)


def _hidden_widths(ffn: nn.Module) -> int:
    """Hidden channels that a token meets."""
    if isinstance(ffn, NoFeedForward):
        return 0
    if isinstance(ffn, MoE):
        routed = ffn.router.top_k * ffn.experts.down.shape[1]
        return routed + (0 if ffn.shared is None else _hidden_widths(ffn.shared))
    assert isinstance(ffn, FeedForward)
    return ffn.down_proj.in_features
