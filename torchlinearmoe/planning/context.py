"""What context parallelism exchanges, counted by the exchanges themselves.

Each kind of mixer runs once, forward and backward, on the meta device: nothing is computed, but the collectives count
their buffers as they do in training. Counted for rows that are one document; a micro-batch in which no document crosses
from rank to rank sends nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from torchlinearmoe.documents import Documents
from torchlinearmoe.mixers.base import Context, Mixer
from torchlinearmoe.models.decoder import Decoder
from torchlinearmoe.module import traits
from torchlinearmoe.parallel.activation_checkpointing import is_checkpointed
from torchlinearmoe.parallel.context import exchange_of
from torchlinearmoe.parallel.exchange.gather import traffic
from torchlinearmoe.parallel.local import shadow
from torchlinearmoe.parallel.mesh import Meshes
from torchlinearmoe.parallel.tensor import apply_tensor_parallel
from torchlinearmoe.recipe import Recipe
from torchlinearmoe.recipe.schema import TrainingRecipe
from torchlinearmoe.spans import cut_spans


@dataclass(frozen=True)
class SpanTraffic:
    """The collectives of one layer and micro-batch on one rank."""

    mixer: str
    layers: int
    """Layers that are alike."""
    again: int
    """Of them, those whose forward runs again in the backward."""
    calls: dict[str, int]
    """By operation, such as `all-gather, forward`."""
    bytes: dict[str, int]
    """Summed size of the whole buffers."""


LayerTraffic = Mapping[str, tuple[str, Mapping[str, int], Mapping[str, int]]]
"""By the name of a layer: its mixer, and calls and bytes of a micro-batch by operation."""


def traffic_by_layer(recipe: Recipe, meshes: Meshes, dtype: torch.dtype) -> LayerTraffic:
    """The exchanges of every layer of the whole model; none without context parallelism.

    Needs a (pretended) process group.
    """
    if meshes.degrees.context == 1:
        return {}
    training = recipe.training
    kinds: dict[Any, tuple[str, dict[str, int], dict[str, int]]] = {}
    found: dict[str, tuple[str, dict[str, int], dict[str, int]]] = {}
    with torch.device("meta"):
        model = Decoder(recipe.model)
        if meshes.degrees.tensor > 1:
            apply_tensor_parallel(model, meshes.tensor)
        rows, length = training.micro_batch_size, training.sequence_length
        borders = [row * length for row in range(rows + 1)]
        spans = cut_spans(borders, length, meshes.context_group, "meta", exchange_of(recipe.parallel))
        documents = Documents.packed(spans.borders, spans.length, "meta", spans)
        for shared in model.shared.values():
            shadow(shared)
        context = Context(documents, spans.positions, model.shared_outputs())
        tokens = rows * length // meshes.degrees.context // meshes.degrees.tensor
        carried: dict[str, Tensor] = {}
        for index, layer in model.layers.items():
            mixer = layer.mixer
            assert isinstance(mixer, Mixer)
            kind = (mixer.name, tuple(p.shape for p in mixer.parameters()))
            if kind not in kinds:
                _cast(mixer, dtype)
                shadow(mixer)
                traffic.clear()
                x_TD = torch.zeros(tokens, recipe.model.hidden_size, dtype=dtype, requires_grad=True)
                y_TD, _, carried = mixer(x_TD, context, None, carried)
                y_TD.sum().backward(retain_graph=True)  # layers have the graph of their shared outputs in common
                carried = {name: value.detach() for name, value in carried.items()}
                kinds[kind] = (mixer.name, dict(traffic.calls), dict(traffic.bytes))
            found[index] = kinds[kind]
    traffic.clear()
    return found


def span_traffic(found: LayerTraffic, training: TrainingRecipe, held: Collection[str]) -> list[SpanTraffic]:
    """The exchanges of the layers `held`, those that are alike together."""
    kinds: dict[int, SpanTraffic] = {}
    for index, layer in found.items():
        if index in held:
            name, calls, sizes = layer
            before = kinds.get(id(layer), SpanTraffic(name, 0, 0, dict(calls), dict(sizes)))
            again = before.again + is_checkpointed(training, int(index))
            kinds[id(layer)] = replace(before, layers=before.layers + 1, again=again)
    return list(kinds.values())


def _cast(module: nn.Module, dtype: torch.dtype) -> None:
    """Parameters in the type in which they compute."""
    exact = traits(module).keep_fp32
    for name, parameter in list(module.named_parameters(recurse=False)):
        setattr(module, name, nn.Parameter(parameter.detach().to(torch.float32 if exact else dtype)))
    for child in module.children():
        _cast(child, torch.float32 if exact else dtype)
