"""What an operator and its backends say about themselves.

An operator is a folder here: `__init__.py` holds its signature, its checks and its `OPERATOR`; every other file that
ends in a `BACKEND` is one way to compute it and is found by being there. `choose.py` picks between them. Files named
`..._kernels` need a package that may be missing: backends import them when they are called.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any, TypeVar

import torch

from torchlinearmoe.kernels.halves import Halves
from torchlinearmoe.segments import Segments

Function = TypeVar("Function", bound=Callable)
Version = tuple[int, ...]

ROOM = __name__.rpartition(".")[0]
"""The package of the operators."""

WIDE = frozenset((torch.float64, torch.float32, torch.bfloat16, torch.float16))
"""What plain PyTorch computes."""
NARROW = WIDE - {torch.float64}
"""What kernels compute."""


@dataclass(frozen=True)
class Call:
    """The facts of a call on which the choice of a backend rests."""

    kind: str
    """One of the operator's kinds."""
    device: str
    """The type of the tensors' device."""
    dtype: torch.dtype
    """Of the tensors that are multiplied."""
    channels: int = 0
    """Of a head's queries and keys; of grouped products, what divides the widths of their rows."""
    gradients: bool = True
    """Gradients are recorded."""
    states: bool = False
    """States go in or out."""
    single: bool = False
    """One token a document, going on from a state: decoding."""


@dataclass(frozen=True)
class Budget:
    """The least that a call costs whatever computes it, for all its tokens; what `benchmark` measures against.

    Dependent steps are those that no machine, however wide, can take at once.
    """

    flops: float
    """Of the forward pass; a multiply-add is two."""
    forward_bytes: float
    """Read and written once."""
    backward_bytes: float
    saved_bytes: float
    """Kept from the forward for the backward pass."""
    steps: int = 1

    @property
    def training_flops(self) -> float:
        """Forward and backward: the gradient of a product is two products."""
        return 3 * self.flops


HOPPER: tuple[Version, Version] = ((9, 0), (10, 0))
"""Compute capabilities of these chips, for `Defect`."""


@dataclass(frozen=True)
class Defect:
    """Versions under which a backend computes a call wrongly."""

    kinds: frozenset[str]
    capability: tuple[Version, Version]
    """CUDA compute capability from (inclusive) to (exclusive)."""
    triton: tuple[Version, Version]
    """From (inclusive) to (exclusive)."""
    reason: str
    way_out: str
    backward_only: bool = False
    channels: int = 2**30
    """Only calls with keys of at most so many channels."""
    above: int = 0
    """Only calls with keys of more channels."""
    dtypes: frozenset[torch.dtype] = WIDE
    """Only calls of these."""


@dataclass(frozen=True)
class Backend:
    """One way to compute an operator: the last lines of its file."""

    name: str
    """What a recipe calls it."""
    run: Callable[..., Any]
    """Takes what the operator's `__init__` hands on."""
    kinds: tuple[str, ...]
    """Those of the operator that it computes."""
    order: int | None = None
    """"auto" tries the highest first; None: only who names it gets it."""
    dtypes: frozenset[torch.dtype] = WIDE
    devices: frozenset[str] | None = None
    """Types of device; None for any."""
    needs: tuple[str, ...] = ()
    """Modules that must be importable; they are imported by the first call that is computed."""
    install: str = ""
    """The command that brings them."""
    exact: bool = True
    """False where it rounds float32 to TF32 or is tuned by timings: "auto" then leaves it out for float32 and under
    training.deterministic."""
    fused: bool = False
    """Plain PyTorch, which torch.compile fuses with what is around it: "auto" under the compiler."""
    graphed: bool = False
    """An operator of the compiler that is faster than what it would fuse: "auto" takes it under torch.compile as
    well."""
    single: bool = False
    """It computes single tokens that go on from a state, and nothing else."""
    kept: tuple[str, ...] = ()
    """Operators of torch.library whose outputs `selective` activation checkpointing keeps."""
    refuses: Callable[[Call], str | None] = lambda call: None
    """Why it cannot take a call, as "reason; way out"."""
    defects: tuple[Defect, ...] = ()
    prepare: Callable[[Segments], Any] | None = None
    """Makes the views that a compiled region wants as inputs."""
    halves: Halves | None = None
    """The same over a span that goes on from another rank's and is gone on from."""

    def in_halves(self, channels: int) -> Halves | None:
        """Its halves, where they take keys of so many channels."""
        return self.halves if self.halves is not None and channels <= self.halves.most else None


@dataclass(frozen=True)
class Operator:
    """One operator and what was found in its folder."""

    name: str
    """Of the folder."""
    kinds: tuple[str, ...]
    """What it may be asked for; backends may differ by them. One without kinds has its own name as the only one."""
    key: str = ""
    """The recipe key that names a backend; without one "auto" decides."""
    backends: dict[str, Backend] = field(default_factory=dict, repr=False, compare=False)
    """By name, filled by `find_backends`."""

    def label(self, kind: str) -> str:
        """The operator and its kind for a message."""
        return self.name if kind == self.name else f"{self.name} ({kind})"

    def find_backends(self) -> dict[str, Backend]:
        """Import the files of the folder, once; {name: backend}."""
        if not self.backends:
            package = importlib.import_module(f"{ROOM}.{self.name}")
            names = [info.name for info in pkgutil.iter_modules(package.__path__)]
            for name in (name for name in names if not name.endswith("_kernels")):
                backend = getattr(importlib.import_module(f"{package.__name__}.{name}"), "BACKEND", None)
                if isinstance(backend, Backend):
                    assert backend.name not in self.backends, f"{self.name}: two backends named {backend.name}"
                    self.backends[backend.name] = backend
        return self.backends


@cache
def operators() -> dict[str, Operator]:
    """Every operator of the room by name."""
    package = importlib.import_module(ROOM)
    modules = (info.name for info in pkgutil.iter_modules(package.__path__) if info.ispkg)
    found = (getattr(importlib.import_module(f"{ROOM}.{name}"), "OPERATOR", None) for name in modules)
    return {operator.name: operator for operator in found if isinstance(operator, Operator)}


def legal_names(key: str) -> tuple[str, ...]:
    """What the recipe key `key` may name: "auto" and every backend of the operators that listen to it."""
    found = [operator.find_backends() for operator in operators().values() if operator.key == key]
    return ("auto", *dict.fromkeys(name for backends in found for name, b in backends.items() if not b.single))


def outside_graphs(function: Function) -> Function:
    """Keep torch.compile out of `function`: the caller's graph breaks there."""
    return torch.compiler.disable(function)  # pyright: ignore[reportReturnType]
