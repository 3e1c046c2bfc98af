"""torch.compile by regions.

A block is not compiled as a whole: units that FSDP gathers by themselves (experts, float32 decays, routers) cannot be
inside a full graph. Each module names the methods between them in `regions` (`name`, or `part.name`);
they are compiled here and nowhere else.

The compiler keeps its graphs with a function's code, and when a second size comes, it makes one for any size. Layers of
one kind share code and graphs; what has other sizes gets code of its own:

    MoE layers        Router.forward, 8 experts      one graph, of 8
    memories' layers  Router.forward, 4 memories     one graph, of 4, and none that fits both

Else a layer that runs again in the backward (activation checkpointing) might do so by another graph than in the forward
(the newest that fits), which keeps other tensors for the backward: torch then ends in an error.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, reduce
from itertools import chain
from types import CodeType, FunctionType, MethodType
from typing import Any

import torch
from torch import nn

from torchlinearmoe.module import traits


def compile_regions(model: nn.Module, backend: str) -> int:
    """Compile every region of `model` in place; returns how many."""
    # Layers of one kind share code, and each may specialise once for training and once for evaluation.
    torch._dynamo.config.cache_size_limit = max(torch._dynamo.config.cache_size_limit, 64)  # pyright: ignore
    compiled = 0
    for module in model.modules():
        sizes = tuple(tuple(x.shape) for x in chain(module.parameters(recurse=False), module.buffers(recurse=False)))
        for path in traits(module).regions:
            *owners, name = path.split(".")
            owner = reduce(getattr, owners, module)
            # Of a module the compiler takes whole numbers as they are, of another object they may change.
            told = () if isinstance(owner, nn.Module) else tuple(n for n in vars(owner).values() if type(n) is int)
            own = _with_code_of(getattr(owner, name), (type(module), sizes, told))
            setattr(owner, name, torch.compile(own, backend=backend))
            compiled += 1
    return compiled


def _with_code_of(function: Callable[..., Any], kind: tuple[Any, ...]) -> Callable[..., Any]:
    """The same function or bound method, with code that only those of its kind have."""
    if isinstance(function, MethodType):
        return MethodType(_with_code_of(function.__func__, kind), function.__self__)
    assert isinstance(function, FunctionType), function
    own = FunctionType(
        _code_of(function.__code__, kind),
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    own.__kwdefaults__ = function.__kwdefaults__
    return own


@cache
def _code_of(code: CodeType, kind: tuple[Any, ...]) -> CodeType:
    """A copy of `code` for each kind, under a name of its own: by names the compiler remembers which sizes change."""
    return code.replace(co_name=f"{code.co_name}_{_code_of.cache_info().misses}")
