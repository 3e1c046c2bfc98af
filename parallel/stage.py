"""One pipeline stage: some layers of a decoder, run on one micro-batch after the other.

Only hidden states and carried tensors pass from stage to stage. All else that a micro-batch is made of (tokens, labels,
the borders of its documents, totals of the step) lies in a table on every rank, and a stage looks it up by the number
of the micro-batch: nothing ragged is cut or sent.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from torchlinearmoe.mixers.base import Context
from torchlinearmoe.models.decoder import Decoder
from torchlinearmoe.parallel.inputs import Inputs
from torchlinearmoe.parallel.pipeline import carried_between
from torchlinearmoe.recipe.schema import Recipe


class Stage(Decoder):
    """The layers of stage `index`; parameters are named as in the whole model.

    T tokens of a micro-batch on this rank, D width.
    """

    def __init__(self, recipe: Recipe, index: int, layers: range) -> None:
        super().__init__(recipe.model, layers)
        self.index, self.span = index, layers
        self.carried_in = carried_between(recipe.model, layers.start)
        self.carried_out = carried_between(recipe.model, layers.stop)
        self.table: Sequence[Inputs] = ()
        """The micro-batches of the step."""
        self.micro_batch = 0
        """Which of them the next forward takes."""
        self._taps = recipe.parallel.pipeline_schedule == "zero_bubble" and not self.holds_first
        self._tapped: dict[str, Tensor] = {}

    def forward(self, *passed: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Hidden states [T, D] and carried tensors [T, ...] in, the same out.

        The first stage takes none, the last gives the summed cross entropy of its tokens.
        """
        inputs = self.table[self.micro_batch]
        x, *rest = passed or (self.enter(inputs.tokens),)
        shared = self.shared_outputs()
        if self._taps:
            shared = {name: _Tap.apply(x, output.detach(), self._tapped, name) for name, output in shared.items()}
        context = Context(inputs.documents, inputs.documents.whole_positions, shared, inputs.totals)
        x, _, carried = self.run_layers(x, context, None, dict(zip(self.carried_in, rest, strict=True)))
        if self.holds_last:
            return self.project(self.norm(x), inputs.labels)
        # What is only passed on would be a view of what came in, and those cannot be cut off from their graph.
        return x, *(carried[name].clone() for name in self.carried_out)

    def backward_shared(self) -> None:
        """Complete the gradients of the shared modules, where `forward` tapped them: after the step's backwards."""
        for name, gradient in self._tapped.items():
            self.shared[name]().backward(gradient)
        self._tapped.clear()


class _Tap(torch.autograd.Function):
    """The output of a shared module, for a backward in two parts.

    The part that computes the gradients of weights starts anew wherever a weight enters. For one that enters every
    layer of a stage that would be the whole backward again. So the module is left out of the graph: the gradient by its
    output, which depends on no micro-batch, is added up on the way to the stage's input.
    """

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, output: Tensor, tapped: dict[str, Tensor], name: str) -> Tensor:
        ctx.tapped, ctx.name = tapped, name
        return output.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None, None, None]:
        before = ctx.tapped.get(ctx.name)
        ctx.tapped[ctx.name] = grads[0] if before is None else before + grads[0]
        return None, None, None, None
