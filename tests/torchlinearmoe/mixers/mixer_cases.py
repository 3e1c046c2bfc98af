"""What every test of the mixer contract runs on: each registered mixer, with its defaults and with every variant.

A `Stack` is two layers of one mixer with residuals, so that shared modules, carried tensors and a second layer's
parameters take part. Nothing here names a mixer: a new one is found through the registry.

Shapes: T tokens, D width, N documents.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from torchlinearmoe.documents import Documents
from torchlinearmoe.initialize import initialize
from torchlinearmoe.mixers import MIXERS
from torchlinearmoe.mixers.base import Carry, Context, LayerPlace, Mixer, State
from torchlinearmoe.recipe import ModelRecipe, resolve

SMALL = resolve(
    {
        "model": {
            "hidden_size": 64,
            "num_layers": 2,
            "num_heads": 2,
            "num_kv_heads": 1,
            "head_dim": 32,
            "max_length": 256,
            "rope_theta": 1e4,
            "attention_backend": "sdpa",
        },
        "training": {"steps": 1},
    }
).model


def small_model(**changes: Any) -> ModelRecipe:
    """What the mixers of the tests are built for, with `changes`."""
    return dataclasses.replace(SMALL, **changes)


@dataclass(frozen=True)
class Case:
    """A mixer and the options that differ from its defaults."""

    name: str
    overrides: dict[str, Any]

    @property
    def mixer(self) -> type[Mixer]:
        return MIXERS[self.name]

    @property
    def options(self) -> Any:
        return self.mixer.Options(**self.overrides)

    def __str__(self) -> str:
        return "-".join([self.name, *(f"{key}={value}" for key, value in self.overrides.items())])


CASES = [Case(name, overrides) for name in MIXERS.names() for overrides in ({}, *MIXERS[name].variants)]
every_mixer = pytest.mark.parametrize("case", CASES, ids=str)


class Stack(nn.Module):
    """x += mixer(x), twice, with what a decoder gives its mixers."""

    def __init__(self, case: Case, dims: ModelRecipe, layers: int = 2) -> None:
        super().__init__()
        case.mixer.check(case.options, dims)
        shared = case.mixer.shared_module(case.options, dims, layers)
        self.name = case.name
        self.shared = nn.ModuleDict({} if shared is None else {case.name: shared})
        self.mixers = nn.ModuleList(case.mixer(case.options, dims, LayerPlace(i, i, layers)) for i in range(layers))

    @property
    def layers(self) -> list[Mixer]:
        return [mixer for mixer in self.mixers if isinstance(mixer, Mixer)]

    def context(self, documents: Documents, positions: Tensor | None = None, **more: Any) -> Context:
        positions = documents.positions if positions is None else positions
        return Context(documents, positions, {name: module() for name, module in self.shared.items()}, **more)

    def forward(
        self, x_TD: Tensor, context: Context, states: list[State] | None = None
    ) -> tuple[Tensor, list[State] | None]:
        carried, after = {}, []
        for index, mixer in enumerate(self.layers):
            y_TD, state, carried = mixer(x_TD, context, None if states is None else states[index], carried)
            assert (state is None) == (states is None)
            x_TD = x_TD + y_TD
            after.append(state)
        return x_TD, None if states is None else after

    def packed(self, x_TD: Tensor, lengths: Sequence[int]) -> Tensor:
        """Documents that start empty."""
        return self(x_TD, self.context(Documents.packed([0, *accumulate(lengths)])))[0]

    def empty(self, batch: int, max_length: int, dtype: torch.dtype = torch.float64) -> list[State]:
        return [mixer.init_state(batch, max_length, torch.device("cpu"), dtype) for mixer in self.layers]

    def resumed(
        self, x_TD: Tensor, lengths: Sequence[int], seen: Sequence[int], states: list[State]
    ) -> tuple[Tensor, list[State]]:
        """Document n goes on with `lengths[n]` tokens after `seen[n]`."""
        documents = Documents.packed([0, *accumulate(lengths)])
        positions = documents.positions + torch.tensor(seen)[documents.ids.long()]
        history = max(a + b for a, b in zip(seen, lengths, strict=True))
        y_TD, after = self(x_TD, self.context(documents, positions, history=history), states)
        assert after is not None
        return y_TD, after

    def step(self, x_BD: Tensor, seen: int, states: list[State]) -> tuple[Tensor, list[State]]:
        """One token for each of B sequences."""
        documents = Documents.batch(x_BD.shape[0], 1)
        context = self.context(documents, documents.positions + seen, stepping=True, history=seen + 1)
        y_BD, after = self(x_BD, context, states)
        assert after is not None
        return y_BD, after


def make_stack(case: Case, seed: int = 0, dtype: torch.dtype = torch.float64, **dims: Any) -> Stack:
    """A stack in `dtype` whose parameters are away from their neutral initial values."""
    stack = Stack(case, small_model(**dims))
    initialize(stack, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in stack.parameters():
            # Matrices of many inputs get less, so that their outputs are as large as others'.
            std = 0.15 * (128 / max(parameter.shape[-1], 128) if parameter.dim() == 2 else 1.0) ** 0.5
            parameter.add_(std * torch.randn(parameter.shape, generator=generator))
    return stack.to(dtype)


def random_inputs(tokens: int, seed: int = 0, dtype: torch.dtype = torch.float64, width: int = 64) -> Tensor:
    """[tokens, D]"""
    return torch.randn(tokens, width, generator=torch.Generator().manual_seed(seed + 2), dtype=torch.float64).to(dtype)


def check_pieces(stack: Stack, pieces: Sequence[int], tokens: int = 70) -> None:
    """A document read in pieces, each from the state of the one before, then token by token, is as in one pass."""
    x_TD = random_inputs(tokens)
    with torch.no_grad():
        expected = stack.packed(x_TD, [tokens])
        states, seen, outputs = stack.empty(1, tokens), 0, []
        for piece in pieces:
            y_TD, states = stack.resumed(x_TD[seen : seen + piece], [piece], [seen], states)
            outputs.append(y_TD)
            seen += piece
        for t in range(seen, tokens):
            y_TD, states = stack.step(x_TD[t : t + 1], t, states)
            outputs.append(y_TD)
    error = relative(torch.cat(outputs), expected)
    assert error < 1e-10, f"{stack.name} in pieces of {tuple(pieces)} is off by {error:.1e}"


def has_appended_state(stack: Stack) -> bool:
    """Some part of the state grows with the sequence."""
    return any(spec.carry is Carry.APPEND for mixer in stack.layers for spec in mixer.state_spec().values())


def relative(x: Tensor, expected: Tensor) -> float:
    """|x - expected| / |expected| in the L2 norm; inf where x is not finite."""
    error = (x.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-30)
    return float(error) if bool(error.isfinite()) else float("inf")
