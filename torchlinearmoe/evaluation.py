"""Looking at a model without training it: held-out loss, the share of the mixers, where a value went bad."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from torchlinearmoe.data.packing import IGNORED, MicroBatch
from torchlinearmoe.kernels.cross_entropy import ChunkKernel
from torchlinearmoe.mixers.base import Mixer
from torchlinearmoe.models.block import Block
from torchlinearmoe.models.decoder import Decoder, Head
from torchlinearmoe.optim.gradients import clear_gradients, gradient_parts, summed
from torchlinearmoe.parallel.fsdp import reshard
from torchlinearmoe.parallel.inputs import Inputs
from torchlinearmoe.parallel.passes import Passes

BadValue = tuple[list[int], str]
"""A value that is not finite: where it is in the whole model, for comparison, and what it is called."""


def held_out_loss(
    passes: Passes,
    batches: Iterable[MicroBatch],
    device: torch.device,
    *,
    group: dist.ProcessGroup | None = None,
    limit: int = 0,
) -> float:
    """Mean loss a token in nats over the batches of all ranks of `group`, at most `limit` a rank (0: all).

    Every rank brings the same number of batches.
    """
    modes = [part.training for part in passes.parts]
    for part in passes.parts:
        part.eval()
    tokens = 0

    def inputs() -> Iterator[Inputs]:
        nonlocal tokens
        for batch in islice(batches, limit or None):
            tokens += batch.valid_tokens
            batch = batch.to(device)
            yield Inputs(batch.tokens, batch.labels, batch.documents(device))

    summed = passes.forward(inputs())
    total = torch.stack([summed, torch.tensor(float(tokens), device=device).double()])
    for part, mode in zip(passes.parts, modes):
        part.train(mode)
        reshard(part)
    if group is not None:
        dist.all_reduce(total, group=group)
    loss, count = total.tolist()
    return loss / max(count, 1.0)


@contextmanager
def counted_hits(passes: Passes, device: torch.device) -> Iterator[Tensor]:
    """What comes back counts, while inside: [labels that are the most probable token, labels], float64, on this rank.

    Of the rank that has the last layers: others, in a pipeline, count none.
    """
    counts = torch.zeros(2, dtype=torch.float64, device=device)
    heads = [part.head for part in passes.parts if part.holds_last]
    before = [(head.kernel, head.backend) for head in heads]

    def counting(head: Head) -> ChunkKernel:
        loss, hits = head.kernel, head.hits

        def count(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
            counts.add_(torch.stack([hits(logits, labels), (labels != IGNORED).sum()]))
            return loss(logits, labels)

        return count

    for head in heads:
        # The backend that reads the kernel it is given.
        head.kernel, head.backend = counting(head), "torch"  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield counts
    finally:
        for head, (kernel, backend) in zip(heads, before):
            head.kernel, head.backend = kernel, backend


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


def first_bad_layer(passes: Passes, batches: Sequence[Inputs]) -> str:
    """Name the first place where a value that is not finite appears: a parameter, a layer's output, or a gradient.

    Runs a step's batches forward, then backward if all forwards are sound; every rank takes part and gets the same
    answer.
    """
    parameters = list(enumerate(entry for part in passes.parts for entry in part.named_parameters()))
    answer = _agree([_place("the parameter", name, n) for n, (name, p) in parameters if not _finite(p)])
    if answer:
        return answer
    found: list[BadValue] = []

    def watch(name: str, position: int):
        def look(module: nn.Module, args: Any, output: Any) -> None:
            value = output[0] if isinstance(output, tuple) else output
            if isinstance(value, Tensor) and not bool(torch.isfinite(value).all()):
                found.append(_place("the output of", name, position))

        return look

    places = [place for part in passes.parts for place in _watched(part)]
    hooks = [module.register_forward_hook(watch(name, n)) for n, (name, module) in enumerate(places)]
    try:
        batches = [replace(batch, totals=None) for batch in batches]
        passes.forward(batches)
        answer = _agree(found)
        if answer:
            return answer
        _zero_grad(passes)
        passes.forward_backward(batches, torch.ones((), device=batches[0].tokens.device))
        # Backward runs from the last layer to the first: the last parameter in the list went bad first.
        gradients = [(n, name, parts) for n, (name, p) in parameters if (parts := gradient_parts(p)) is not None]
        bad = [_place("the gradient of", name, n) for n, name, parts in gradients if not _finite(summed(parts))]
        answer = _agree(bad, last=True)
        if answer:
            return answer
    finally:
        for hook in hooks:
            hook.remove()
        _zero_grad(passes)
        for part in passes.parts:
            reshard(part)
    return "no single place (the loss alone is not finite)"


def _watched(part: Decoder) -> list[tuple[str, nn.Module]]:
    """What is watched of a part of the model, by name."""
    places: list[tuple[str, nn.Module]] = [("embed", part.embed)] if part.holds_first else []
    for index, layer in part.layers.items():
        assert isinstance(layer, Block)
        places.append((f"layers.{index}.mixer ({layer.mixer.name})", layer.mixer))
        places.append((f"layers.{index}.ffn", layer.ffn))
    if part.holds_last:
        places.append(("norm", part.norm))
    return places


def _finite(tensor: Tensor) -> bool:
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return bool(torch.isfinite(local).all())


def _zero_grad(passes: Passes) -> None:
    for part in passes.parts:
        clear_gradients(part.parameters())


def _place(what: str, name: str, position: int) -> BadValue:
    """A place in the whole model by where it comes: embed, shared, layers.0, ..., norm, head; then by position."""
    section, number = (*name.split("."), "")[:2]
    layer = int(number) if section == "layers" else 0
    return [("embed", "shared", "layers", "norm", "head").index(section), layer, position], f"{what} {name}"


def _agree(places: list[BadValue], *, last: bool = False) -> str | None:
    """The first place that any rank names, or the last."""
    choose = max if last else min
    own = choose(places, key=lambda place: place[0]) if places else None
    every: list[BadValue | None] = [own]
    if dist.is_initialized():
        every = [None] * dist.get_world_size()
        dist.all_gather_object(every, own)
    named = [place for place in every if place is not None]
    return choose(named, key=lambda place: place[0])[1] if named else None
