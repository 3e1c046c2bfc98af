"""Activation checkpointing: a block keeps its input and runs again when the backward comes to it.

`full` keeps nothing else. `selective` also keeps what is costly to compute and small to hold: outputs of dense matrix
products, attention and finished sums over ranks, and the routers' choices. Experts' rows, gates, norms and recurrences
are computed again, and so are the exchanges of tokens and spans between them.

The block's `forward` is wrapped, not the block: names stay, and FSDP's hooks, which lie around `forward`, have the
weights gathered before a block runs again. What is wrapped is the forward as every other room has left it. See
Korthikanti et al. 2022, arXiv 2205.05198, section 5.
"""

from __future__ import annotations

from collections import defaultdict
from functools import cache, partial
from typing import Any

from torch import Tensor
from torch._subclasses import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.checkpoint import checkpoint

from torchlinearmoe.kernels.operator import operators
from torchlinearmoe.models.decoder import Decoder
from torchlinearmoe.recipe.schema import TrainingRecipe

KEPT_OPERATORS = (
    "aten::mm",
    "aten::addmm",
    "aten::_scaled_mm",
    "aten::topk",
    "torchlinearmoe::scatter_rows",
    "torchlinearmoe::sum_over",
)
"""Whose outputs `selective` keeps, besides those that backends name."""


def is_checkpointed(training: TrainingRecipe, layer: int) -> bool:
    """Whether layer number `layer` of the whole model runs again in the backward."""
    return training.activation_checkpointing != "none" and layer % training.activation_checkpointing_every == 0


def checkpoint_blocks(model: Decoder, training: TrainingRecipe) -> None:
    """Checkpoint the blocks of `model` that the recipe names, in place."""
    # Nothing in a block is random, so no generator has to be set back.
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    if training.activation_checkpointing == "selective":
        options["context_fn"] = selective_contexts
    for index, layer in model.layers.items():
        if is_checkpointed(training, int(index)):
            layer.forward = partial(checkpoint, layer.forward, **options)


def selective_contexts() -> tuple[TorchDispatchMode, TorchDispatchMode]:
    """The contexts of a block's forward and of its recomputation."""
    outputs: dict[Any, list[Any]] = defaultdict(list)
    return _Keep(outputs), _Reuse(outputs)


@cache
def _kept() -> frozenset[str]:
    backends = (backend for operator in operators().values() for backend in operator.find_backends().values())
    return frozenset(KEPT_OPERATORS).union(*(backend.kept for backend in backends))


@cache
def _is_kept(operator: Any) -> bool:
    return getattr(operator, "_schema", None) is not None and operator._schema.name in _kept()


class _Selective(TorchDispatchMode):
    """Looks at the kept operators and lets all others through, those that FSDP and the compiler add to a pass too.

    Torch's own pair (`create_selective_checkpoint_contexts`) wants both passes to run the same operators throughout.
    """

    def __init__(self, outputs: dict[Any, list[Any]]) -> None:
        super().__init__()
        self.outputs = outputs

    # The compiler refuses to run under a mode unless it is told that it does not matter; torch 2.13 asks the second.
    @classmethod
    def is_infra_mode(cls) -> bool:
        return True

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not _is_kept(func) or any(isinstance(value, FakeTensor) for value in args):
            return func(*args, **kwargs)
        return self.run(func, args, kwargs)

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        """The output of a kept operator."""
        raise NotImplementedError


class _Keep(_Selective):
    """Keeps outputs, in the order in which an operator gives them."""

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        output = func(*args, **kwargs)
        # A compiled graph has them written into buffers, which it uses again.
        keep = Tensor.clone if func._schema.is_mutable else Tensor.detach
        self.outputs[func].append(tree_map_only(Tensor, keep, output))
        return output


class _Reuse(_Selective):
    """Gives each output back once, in that order."""

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        if not self.outputs[func]:
            raise RuntimeError(f"{func} runs more often in a recomputation than in the forward, or backward runs twice")
        output = self.outputs[func].pop(0)
        if not func._schema.is_mutable:
            return output
        written = [kwargs[argument.name] for argument in func._schema.arguments if argument.is_out]
        for buffer, value in zip(written, tree_leaves(output), strict=True):
            buffer.copy_(value)
        return written[0] if len(written) == 1 else tuple(written)
