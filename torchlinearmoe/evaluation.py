"""Looking at a model without training it: held-out loss, the share of the mixers, where a value went bad."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from torchlinearmoe.data.packing import MicroBatch
from torchlinearmoe.mixers.base import Mixer
from torchlinearmoe.models.block import Block
from torchlinearmoe.models.decoder import Decoder
from torchlinearmoe.parallel.fsdp import reshard


@torch.no_grad()
def held_out_loss(
    model: Decoder,
    batches: Iterable[MicroBatch],
    device: torch.device,
    *,
    group: dist.ProcessGroup | None = None,
    limit: int = 0,
) -> float:
    """Mean loss a token in nats over the batches of all ranks of `group`, at most `limit` a rank (0: all).

    Every rank brings the same number of batches.
    """
    was_training = model.training
    model.eval()
    total = torch.zeros(2, dtype=torch.float64, device=device)
    for batch in islice(batches, limit or None):
        batch = batch.to(device)
        loss = model(batch.tokens, labels=batch.labels, documents=batch.documents(device))
        total += torch.stack([loss.double(), torch.tensor(float(batch.valid_tokens), device=device).double()])
    model.train(was_training)
    reshard(model)
    if group is not None:
        dist.all_reduce(total, group=group)
    summed, tokens = total.tolist()
    return summed / max(tokens, 1.0)


@contextmanager
def silent_mixers(model: nn.Module) -> Iterator[None]:
    """Every mixer's output is zero inside: no token knows of another."""

    def silence(module: nn.Module, args: Any, output: tuple[Tensor, Any, Any]) -> tuple[Tensor, Any, Any]:
        return (torch.zeros_like(output[0]), *output[1:])

    hooks = [module.register_forward_hook(silence) for module in model.modules() if isinstance(module, Mixer)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def first_bad_layer(model: Decoder, batches: Iterable[MicroBatch], device: torch.device) -> str:
    """Name the first place where a value that is not finite appears: a parameter, a layer's output, or a gradient.

    Runs each batch forward, and backward if the forward is sound; every rank takes part and gets the same answer.
    """
    found: list[tuple[int, str]] = []
    order: dict[str, int] = {}

    def watch(name: str):
        def look(module: nn.Module, args: Any, output: Any) -> None:
            value = output[0] if isinstance(output, tuple) else output
            if isinstance(value, Tensor) and not bool(torch.isfinite(value).all()):
                found.append((order[name], f"the output of {name}"))

        return look

    places: list[tuple[str, nn.Module]] = [("embed", model.embed)]
    for index, layer in model.layers.items():
        assert isinstance(layer, Block)
        places.append((f"layers.{index}.mixer ({layer.mixer.name})", layer.mixer))
        places.append((f"layers.{index}.ffn", layer.ffn))
    places.append(("norm", model.norm))
    order = {name: rank for rank, (name, _) in enumerate(places)}

    bad = [name for name, p in model.named_parameters() if not _finite(p)]
    answer = _agree((0, f"the parameter {bad[0]}") if bad else None)
    if answer:
        return answer
    hooks = [module.register_forward_hook(watch(name)) for name, module in places]
    try:
        for batch in batches:
            batch = batch.to(device)
            model.zero_grad(set_to_none=True)
            loss = model(batch.tokens, labels=batch.labels, documents=batch.documents(device))
            answer = _agree(min(found) if found else None)
            if answer:
                return answer
            loss.backward()
            names = [name for name, p in model.named_parameters() if p.grad is not None and not _finite(p.grad)]
            # Backward runs from the last layer to the first: the last parameter in the list went bad first.
            answer = _agree((0, f"the gradient of {names[-1]}") if names else None)
            if answer:
                return answer
    finally:
        for hook in hooks:
            hook.remove()
        model.zero_grad(set_to_none=True)
        reshard(model)
    return "no single place (the loss alone is not finite)"


def _finite(tensor: Tensor) -> bool:
    local = tensor.to_local() if hasattr(tensor, "to_local") else tensor  # pyright: ignore[reportAttributeAccessIssue]
    return bool(torch.isfinite(local).all())


def _agree(place: tuple[int, str] | None) -> str | None:
    """The first place that any rank names."""
    if not dist.is_initialized():
        return place[1] if place else None
    places: list[tuple[int, str] | None] = [None] * dist.get_world_size()
    dist.all_gather_object(places, place)
    named = [p for p in places if p is not None]
    return min(named)[1] if named else None
