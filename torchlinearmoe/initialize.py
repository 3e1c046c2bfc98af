"""Initial values that do not depend on the layout.

Every module that owns parameters names a distribution for each in `initializers`. A parameter is drawn in blocks (one
expert of an expert stack, else 1,024 rows of dim 0), each block from a generator seeded by a hash of (seed, parameter
name, block), and a rank draws only the blocks that its shard touches. So one process and any mesh of the same device
type start from equal weights.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from torchlinearmoe.errors import nearest
from torchlinearmoe.module import traits

ROWS = 1024
"""Rows of dim 0 in a block of an ordinary parameter."""


@dataclass(frozen=True)
class Normal:
    """Zero-mean normal with standard deviation `std`."""

    std: float

    def draw(self, shape: tuple[int, ...], start: int, generator: torch.Generator) -> Tensor:
        """Values of the rows from `start` on, [shape]."""
        return _empty(shape, generator).normal_(0.0, self.std, generator=generator)


@dataclass(frozen=True)
class Uniform:
    """Uniform in [low, high), then `transform` elementwise."""

    low: float
    high: float
    transform: Callable[[Tensor], Tensor] | None = None

    def draw(self, shape: tuple[int, ...], start: int, generator: torch.Generator) -> Tensor:
        """Values of the rows from `start` on, [shape]."""
        values = _empty(shape, generator).uniform_(self.low, self.high, generator=generator)
        return self.transform(values) if self.transform else values


@dataclass(frozen=True)
class Constant:
    """One value everywhere."""

    value: float = 0.0

    def draw(self, shape: tuple[int, ...], start: int, generator: torch.Generator) -> Tensor:
        """Values of the rows from `start` on, [shape]."""
        return _empty(shape, generator).fill_(self.value)


@dataclass(frozen=True)
class Orthogonal:
    """Orthonormal rows, or columns where those are fewer, scaled until the values' root mean square is `std`.

    Each block is made so by itself. Blocks of orthonormal columns have such columns together as well; rows of different
    blocks are independent draws.
    """

    std: float

    def draw(self, shape: tuple[int, ...], start: int, generator: torch.Generator) -> Tensor:
        """Values of the rows from `start` on, [shape]."""
        values = _empty(shape, generator)
        matrix = values.flatten(0, -2)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # the order of a processor's sums, and so their rounding, is a matter of its threads
        try:
            nn.init.orthogonal_(matrix, self.std * max(matrix.shape) ** 0.5, generator)
        finally:
            torch.set_num_threads(threads)
        return values


@dataclass(frozen=True)
class Rows:
    """A function of the row indices of dim 0: `fill(rows [n]) -> [n]`, the same along the other dims, or [n, ...]."""

    fill: Callable[[Tensor], Tensor]

    def draw(self, shape: tuple[int, ...], start: int, generator: torch.Generator) -> Tensor:
        """Values of the rows from `start` on, [shape]."""
        rows = torch.arange(start, start + shape[0], device=generator.device)
        values = self.fill(rows)
        return values.reshape(*values.shape, *(1,) * (len(shape) - values.dim())).expand(shape)


def _empty(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Draws are float32 whatever the parameter's or the default type, so that the type does not change the values."""
    return torch.empty(shape, dtype=torch.float32, device=generator.device)


Initializer = Normal | Uniform | Orthogonal | Constant | Rows

ZEROS = Constant(0.0)
ONES = Constant(1.0)


def set_initializers(module: nn.Module, **initializers: Initializer) -> None:
    """Name the distribution of `module`'s direct parameters. Raises ValueError for one that it does not have."""
    for name in initializers:
        if name not in module._parameters:
            raise ValueError(f"{type(module).__name__}.{name}: no such parameter; {nearest(name, module._parameters)}")
    module.__dict__["initializers"] = initializers


def initializers_of(module: nn.Module) -> dict[str, Initializer]:
    """The distributions that `set_initializers` named."""
    return module.__dict__.get("initializers", {})


def inverse_softplus_of_exp(log_y: Tensor) -> Tensor:
    """x with softplus(x) = exp(log_y), floored at 1e-4; with a uniform log_y, Mamba's initial step sizes."""
    y = log_y.exp().clamp(min=1e-4)
    return y + torch.log(-torch.expm1(-y))


def linear(inputs: int, outputs: int, std: float, bias: bool = False) -> nn.Linear:
    """A linear layer with normal weights and a zero bias, inputs -> outputs."""
    layer = nn.Linear(inputs, outputs, bias=bias)
    set_initializers(layer, weight=Normal(std), **({"bias": ZEROS} if bias else {}))
    return layer


def orthogonal(inputs: int, outputs: int, gain: float) -> nn.Linear:
    """A linear layer, inputs -> outputs, orthogonal weights of the size that `gain` has in `nn.init.orthogonal_`."""
    layer = nn.Linear(inputs, outputs, bias=False)
    set_initializers(layer, weight=Orthogonal(gain / max(inputs, outputs) ** 0.5))
    return layer


def initialize(model: nn.Module, seed: int) -> None:
    """Fill every parameter of `model`, plain or DTensor, and reset every buffer.

    Raises ValueError for a parameter without an initializer.
    """
    with torch.no_grad():
        for name, parameter, init in _parameters(model):
            local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
            per_row = 1 if parameter.dim() == 3 else ROWS
            for region, start in local_boxes(parameter):
                _fill(local, region, start, tuple(parameter.shape), per_row, init, f"{seed}/{name}")
        reset_buffers(model)


def reset_buffers(model: nn.Module) -> None:
    """Give every buffer of `model` its first values. Raises NotImplementedError for one that nobody resets."""
    for module in model.modules():
        traits(module).reset_buffers()


@torch.no_grad()
def add_noise(parameter: Tensor, noise: Initializer, key: str) -> None:
    """Add a draw of `noise` to a parameter, plain or DTensor, a function of `key` and place alone."""
    local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
    per_row = 1 if parameter.dim() == 3 else ROWS
    for region, start in local_boxes(parameter):
        drawn = torch.empty_like(local[region])
        _fill(drawn, region, start, tuple(parameter.shape), per_row, noise, key)
        local[region] += drawn


def _parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter, Initializer]]:
    seen: set[int] = set()
    for prefix, module in model.named_modules():
        named = initializers_of(module)
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            path = f"{prefix}.{name}" if prefix else name
            if name not in named:
                raise ValueError(f"{path}: no initializer; name one with set_initializers")
            yield path, parameter, named[name]


def local_boxes(parameter: Tensor) -> Iterator[tuple[tuple[slice, ...], tuple[int, ...]]]:
    """(slices of the local tensor, global offset of each) of a parameter's local part."""
    if not isinstance(parameter, DTensor):
        yield tuple(slice(0, size) for size in parameter.shape), (0,) * parameter.dim()
        return
    shape, offset = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    if math.prod(shape):
        yield tuple(slice(0, size) for size in shape), tuple(offset)


def _fill(
    local: Tensor,
    region: tuple[slice, ...],
    start: tuple[int, ...],
    shape: tuple[int, ...],
    per_row: int,
    init: Initializer,
    key: str,
) -> None:
    """Draw the blocks that rows [start, start + n) touch and copy the overlap."""
    if not shape:
        local.copy_(init.draw((1,), 0, _generator(f"{key}/0", local.device))[0])
        return
    rows = region[0].stop - region[0].start
    first, last = start[0], start[0] + rows
    for block in range(first // per_row, (last - 1) // per_row + 1):
        low, high = block * per_row, min((block + 1) * per_row, shape[0])
        values = init.draw((high - low, *shape[1:]), low, _generator(f"{key}/{block}", local.device))
        for dim in range(1, len(shape)):
            values = values.narrow(dim, start[dim], region[dim].stop - region[dim].start)
        a, b = max(low, first), min(high, last)
        local[a - first : b - first].copy_(values[a - low : b - low])


def _generator(key: str, device: torch.device) -> torch.Generator:
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    generator = torch.Generator(device=device)
    return generator.manual_seed(int.from_bytes(digest, "little") >> 1)
