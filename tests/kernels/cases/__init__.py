"""One file an operator: the calls with which every backend of it is compared with its definition.

Each has a list `CASES` of functions that draw a fresh `Case`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from torchlinearmoe.kernels.operator import Operator, operators


@dataclass
class Case:
    """One call: `function(**inputs, **options, backend=...)`."""

    kind: str
    function: Callable[..., Any]
    inputs: dict[str, Tensor]
    """Differentiable, float64."""
    options: dict[str, Any] = field(default_factory=dict)
    """Everything else, on the CPU."""
    wide: tuple[str, ...] = ()
    """Inputs that stay float32 where the others are narrower: decays, states."""
    tolerance: float = 1.0
    """Times what a type is allowed."""
    channels: int = 0
    """Of `Call.channels`."""
    sums: tuple[str, ...] = ()
    """Inputs whose gradient is one sum over all tokens: its terms may cancel, the roundings of 16 bits do not."""

    @property
    def operator(self) -> Operator:
        """The operator of `function`."""
        return operators()[self.function.__module__.rpartition(".")[2]]

    @property
    def tokens(self) -> int:
        """T of a stream of documents, 0 of what has none."""
        segments = self.options.get("segments")
        return 0 if segments is None else segments.tokens

    def rounded(self, dtype: torch.dtype) -> Case:
        """The case with inputs that `dtype` holds exactly, so that only the computation's errors are compared."""
        for name, x in self.inputs.items():
            self.inputs[name] = x.to(torch.float32 if name in self.wide else dtype).double()
        return self

    def run(self, backend: str, dtype: torch.dtype = torch.float64, device: str = "cpu") -> dict[str, Tensor]:
        """Every output, and the gradient of every input under fixed random cotangents."""
        inputs = {name: self._leaf(name, x, dtype, device) for name, x in self.inputs.items()}
        options = {name: to_device(x, device) for name, x in self.options.items()}
        outputs = flatten(self.function(**inputs, **options, backend=backend))
        generator = torch.Generator().manual_seed(11)
        loss = torch.zeros((), dtype=torch.float64, device=device)
        for x in outputs.values():
            if x.requires_grad:
                weight = torch.randn(x.shape, generator=generator, dtype=torch.float64)
                loss = loss + (x.double() * weight.to(device)).sum()
        loss.backward()
        results = outputs | {
            f"d_{name}": torch.zeros_like(x) if x.grad is None else x.grad for name, x in inputs.items()
        }
        return {name: x.detach().cpu() for name, x in results.items()}

    def _leaf(self, name: str, x: Tensor, dtype: torch.dtype, device: str) -> Tensor:
        narrow = dtype in (torch.bfloat16, torch.float16)
        kind = torch.float32 if narrow and name in self.wide else dtype
        return x.detach().to(device, kind).requires_grad_()


def flatten(outputs: Any, name: str = "output") -> dict[str, Tensor]:
    """Tensors of nested tuples by place; None is left out."""
    if isinstance(outputs, Tensor):
        return {name: outputs}
    found: dict[str, Tensor] = {}
    for index, part in enumerate(outputs or ()):
        found |= flatten(part, f"{name}_{index}")
    return found


def to_device(x: Any, device: str) -> Any:
    """An option on `device`: tensors and what can be moved with `.to`."""
    return x.to(device) if hasattr(x, "to") else x


def cases_of(operator: Operator) -> list[Callable[[], Case]]:
    """The cases of an operator's file; a plain failure where it has none."""
    return importlib.import_module(f"cases.{operator.name}").CASES


def forced(operator: Operator, backend: str, run: Callable[[], Any]) -> Any:
    """`run` with the choice of the operator's backend taken out of the chooser's hands."""
    with pytest.MonkeyPatch.context() as patch:
        package = importlib.import_module(f"torchlinearmoe.kernels.{operator.name}")
        patch.setattr(package, "choose", lambda *_: operator.find_backends()[backend])
        return run()


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Every result is within `tolerance` in relative L2 norm."""
    assert found.keys() == expected.keys()
    errors = {name: relative_error(found[name], expected[name]) for name in expected}
    assert max(errors.values()) < tolerance, errors


def relative_error(x: Tensor, expected: Tensor) -> float:
    """|x - expected| / |expected| in the L2 norm; inf where x is not finite."""
    error = (x.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-30)
    return float(error) if bool(error.isfinite()) else float("inf")
