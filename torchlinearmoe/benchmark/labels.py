"""Which code serves what: functions wrapped so that a profile shows their category as a range on the host.

The product knows nothing of this. A contestant labels its own process, after it was timed; wrappers stand around
modules and regions, outside compiled graphs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.profiler import record_function

from torchlinearmoe.benchmark.categories import LAYER

PREFIX = "benchmark/"
"""Of the ranges' names; the category follows."""


def labelled(function: Callable[..., Any], category: str) -> Callable[..., Any]:
    """The function, in a range of the category."""

    def run(*args: Any, **kwargs: Any) -> Any:
        with record_function(PREFIX + category):
            return function(*args, **kwargs)

    return run


def label(owner: Any, name: str, category: str) -> None:
    """Put a method of an object, or a function of a module of Python's, into a range."""
    setattr(owner, name, labelled(getattr(owner, name), category))


def label_ours(model: nn.Module) -> None:
    """Label a model of this project, and in this process the steps around it."""
    import torchlinearmoe.moe.layer as moe_layer
    import torchlinearmoe.trainer as trainer
    from torchlinearmoe.mixers.base import Mixer
    from torchlinearmoe.models.block import Block
    from torchlinearmoe.models.decoder import Head
    from torchlinearmoe.moe.experts import Experts
    from torchlinearmoe.moe.router import Router

    label(trainer, "gradient_norm", "optimizer")
    label(trainer, "step_if_finite", "optimizer")
    label(moe_layer, "account", "moe")
    for module in model.modules():
        if isinstance(module, Mixer):
            softmax = module.keeps_past
            label(module, "forward", "attention" if softmax else "recurrence")
        elif isinstance(module, Router):
            label(module, "forward", "moe")
        elif isinstance(module, moe_layer.MoE):
            label(module.dispatcher, "dispatch", "moe")
            label(module.dispatcher, "combine", "moe")
        elif isinstance(module, Head):
            label(module, "forward", "head")
        elif isinstance(module, (Block, Experts)):
            label(module, "forward", LAYER)


def label_transformers(model: Any, compiled: bool) -> None:
    """Label a causal language model of transformers; inside layers that are compiled whole, names alone tell."""
    label(model.lm_head, "forward", "head")
    label(model, "loss_function", "head")
    if compiled:
        return
    for layer in model.model.layers:
        label(layer, "forward", LAYER)
        label(layer.self_attn, "forward", "attention")
        for name, module in layer.mlp.named_children():
            if name == "gate":
                label(module, "forward", "moe")


def label_torchtitan(trainer: Any) -> None:
    """Label torchtitan's trainer, and in this process its clipping; its layers are compiled whole."""
    import torchtitan.distributed.utils as distributed  # pyright: ignore[reportMissingImports]

    label(trainer, "loss_fn", "head")
    label(distributed, "clip_grad_norm_", "optimizer")
    label(trainer.optimizers, "step", "optimizer")
