"""A mixer against its definition: a stack of two layers over packed documents, outputs and every gradient, in float64.

`definitions/NAME.py` has the definition of the mixer NAME and is found by its name; see `definitions/plain.py`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from definitions.plain import Layer
from mixer_cases import Case, Stack, make_stack, random_inputs, relative, small_model
from torch import Tensor

from torchlinearmoe.documents import Documents
from torchlinearmoe.mixers import MIXERS
from torchlinearmoe.recipe.schema import ModelRecipe

FOLDER = Path(__file__).parent / "definitions"
LENGTHS = (1, 67, 9)
"""One token, more than a chunk, several."""
MODEL: dict[str, Any] = {"num_layers": 5, "rope_theta": 500.0, "norm_eps": 1e-3}
"""Fields of `[model]` at which a formula that leaves them out, or has another constant, shows."""
TOLERANCE = 1e-9

Definition = Callable[[Layer, Tensor], Tensor]


class NoDefinition(AssertionError):
    """A registered mixer that nothing says the formula of."""


def definition_of(name: str) -> Definition:
    """The definition of the mixer `name`."""
    if not (FOLDER / f"{name}.py").exists():
        raise NoDefinition(
            f"the mixer '{name}' has no definition: write tests/torchlinearmoe/mixers/definitions/{name}.py with "
            "definition(layer, x), the output of one layer for one document, token by token as in its paper (cite it), "
            "from the layer's weights alone; plain.py there says how, gla.py is an example"
        )
    return importlib.import_module(f"definitions.{name}").definition


def check_definition(case: Case, definition: Definition, **model: Any) -> None:
    """A stack of the case on documents of `LENGTHS`; `model`: fields of `[model]`."""
    model = MODEL | model
    check_stack(case, make_stack(case, **model), definition, random_inputs(sum(LENGTHS), seed=1), LENGTHS, **model)


def check_stack(
    case: Case, stack: Stack, definition: Definition, x_TD: Tensor, lengths: Sequence[int], **model: Any
) -> None:
    """Outputs of both layers, and the gradients of a weighted sum of the last by the inputs and all parameters."""
    x_TD.requires_grad_()
    actual = _mixed(stack, x_TD, lengths)
    parts = [_defined(case, stack, definition, part, small_model(**model)) for part in x_TD.split(list(lengths))]
    expected = [torch.cat(outputs) for outputs in zip(*parts)]
    for layer, (found, wanted) in enumerate(zip(actual, expected, strict=True)):
        error = relative(found.detach(), wanted.detach())
        assert error < TOLERANCE, f"{case}: the output of layer {layer} is {error:.1e} from its definition"
    named = {"the inputs": x_TD, **dict(stack.named_parameters())}
    direction = random_inputs(x_TD.shape[0], seed=5)
    for name, found, wanted in zip(named, *(_gradients(y[-1], direction, named) for y in (actual, expected))):
        error = float((found - wanted).norm()) / max(float(wanted.norm()), 1e-6)
        assert error < TOLERANCE, f"{case}: the gradient by {name} is {error:.1e} from its definition's"


def _mixed(stack: Stack, x_TD: Tensor, lengths: Sequence[int]) -> list[Tensor]:
    """What every layer adds to the stream."""
    context = stack.context(Documents.packed([0, *accumulate(lengths)]))
    outputs, carried = [], {}
    for mixer in stack.layers:
        y_TD, _, carried = mixer(x_TD, context, None, carried)
        outputs.append(y_TD)
        x_TD = x_TD + y_TD
    return outputs


def _defined(case: Case, stack: Stack, definition: Definition, x_TD: Tensor, dims: ModelRecipe) -> list[Tensor]:
    """The same of one document by the definition."""
    shared = {name: p for module in stack.shared.values() for name, p in module.named_parameters()}
    sections = {name: MIXERS[name].Options() for name in case.mixer.sections(case.options)} | {case.name: case.options}
    outputs, carried = [], {}
    for index, mixer in enumerate(stack.layers):
        weights = dict(mixer.named_parameters())
        outputs.append(definition(Layer(case.options, sections, dims, index, weights, shared, carried), x_TD))
        x_TD = x_TD + outputs[-1]
    return outputs


def _gradients(y_TD: Tensor, direction: Tensor, named: dict[str, Tensor]) -> list[Tensor]:
    """By tensors, zeros for one that is not used."""
    found = torch.autograd.grad((y_TD * direction).sum(), list(named.values()), allow_unused=True)
    return [torch.zeros_like(x) if grad is None else grad for grad, x in zip(found, named.values())]
