"""Checkpointed layers hold less memory between forward and backward, and choose the same experts again."""

import gc
from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint, noop_context_fn

from torchlinearmoe import build_model
from torchlinearmoe.errors import RecipeError
from torchlinearmoe.models.decoder import Decoder
from torchlinearmoe.moe.router import Router
from torchlinearmoe.parallel.activation_checkpointing import checkpoint_blocks, selective_contexts
from torchlinearmoe.planning import plan
from torchlinearmoe.recipe import Recipe, resolve

MODES = {
    "none": {},
    "every second": {"activation_checkpointing": "full", "activation_checkpointing_every": 2},
    "selective": {"activation_checkpointing": "selective"},
    "full": {"activation_checkpointing": "full"},
}


class Made(TorchDispatchMode):
    """The storages that operators made while it was entered."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: list[tuple[StorageWeakRef, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outputs = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(outputs):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.storages.append((StorageWeakRef(storage), storage.nbytes()))
        return outputs

    def alive(self) -> int:
        """Bytes of those that are still there."""
        gc.collect()
        return sum({reference.cdata: size for reference, size in self.storages if not reference.expired()}.values())


def recipe_of(mode: str, **model: Any) -> Recipe:
    tables = {"mixer": "gla", "layout": "LN", "num_layers": 4} | model
    training = {"steps": 1, "sequence_length": 64, "dtype": "float32", **MODES[mode]}
    return resolve({"model": tables, "moe": {"shared_hidden_size": 32}, "training": training})


def checkpointed(recipe: Recipe) -> Decoder:
    model = build_model(recipe.model, seed=3)
    checkpoint_blocks(model, recipe.training)
    return model.train()


def tokens() -> torch.Tensor:
    return torch.randint(100, (1, 64), generator=torch.Generator().manual_seed(1))


def test_the_more_is_run_again_the_less_is_held() -> None:
    held = {}
    for mode in MODES:
        model = checkpointed(recipe_of(mode))
        with Made() as made:
            loss = model(tokens(), labels=tokens())
        held[mode] = made.alive()
        loss.backward()
    assert held["full"] < held["selective"] < held["none"]
    assert held["full"] < held["every second"] < held["none"]
    assert held["full"] < 0.5 * held["none"], held


def test_a_plan_follows() -> None:
    planned = {mode: plan(recipe_of(mode), 1, torch.float32)["memory"]["rank"]["activations"] for mode in MODES}
    assert planned["full"] < planned["selective"] < planned["none"]
    assert planned["full"] < planned["every second"] < planned["none"]


@pytest.mark.parametrize("mode, routed_again", [("selective", True), ("full", True), ("every second", False)])
def test_routers_choose_the_same_again(mode: str, routed_again: bool) -> None:
    model = checkpointed(recipe_of(mode))
    choices: dict[str, list[Any]] = {}
    for name, module in model.named_modules():
        if isinstance(module, Router):
            module.register_forward_hook(lambda _, __, routing, name=name: choices.setdefault(name, []).append(routing))
    model(tokens(), labels=tokens()).backward()
    again = [routings for routings in choices.values() if len(routings) == 2]
    assert len(again) == (4 if routed_again else 2)
    for first, second in again:
        assert torch.equal(first.topk_ids_Tk, second.topk_ids_Tk)


def test_selective_takes_the_choice_of_the_forward_even_if_scores_have_moved() -> None:
    model = checkpointed(recipe_of("selective", num_layers=1, layout="L"))
    (router,) = (module for module in model.modules() if isinstance(module, Router))
    choices = []
    router.register_forward_hook(lambda _, __, routing: choices.append(routing.topk_ids_Tk))
    loss = model(tokens(), labels=tokens())
    router.score = lambda logits: (-logits).softmax(-1)  # type: ignore[method-assign]
    loss.backward()
    assert len(choices) == 2 and torch.equal(*choices)


class Buffered(torch.autograd.Function):
    """A matrix product as compiled graphs compute it: into a buffer, which they use again."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        buffer = torch.full((len(x), weight.shape[1]), torch.nan)
        product = torch.mm(x, weight, out=buffer).clone()
        buffer.zero_()
        ctx.save_for_backward(product.sigmoid(), x, weight)
        return product

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        gate, x, weight = ctx.saved_tensors
        return (grads[0] * gate) @ weight.T, x.T @ (grads[0] * gate)


def test_selective_writes_into_the_buffers_of_compiled_graphs() -> None:
    def block(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return Buffered.apply(x.sin(), weight).tanh()  # type: ignore[no-any-return]

    values = torch.randn(16, 8), torch.randn(8, 12)
    gradients = []
    for contexts in (noop_context_fn, selective_contexts):
        x, weight = (value.clone().requires_grad_() for value in values)
        checkpoint(block, x, weight, use_reentrant=False, context_fn=contexts).sum().backward()
        gradients.append((x.grad, weight.grad))
    for plain, selective in zip(*gradients, strict=True):
        assert torch.equal(plain, selective)


def test_names_and_evaluation_stay_as_they_are() -> None:
    plain, model = checkpointed(recipe_of("none")), checkpointed(recipe_of("selective"))
    assert plain.state_dict().keys() == model.state_dict().keys()
    with torch.no_grad():
        assert torch.equal(plain.eval()(tokens()), model.eval()(tokens()))


@pytest.mark.parametrize("mode", ["full", "selective"])
def test_a_backward_in_two_parts_is_refused(mode: str) -> None:
    parallel = {"pipeline": 2, "pipeline_schedule": "zero_bubble", "reshard_after_forward": False}
    with pytest.raises(RecipeError, match=r"'zero_bubble'.*training.activation_checkpointing = 'none'"):
        resolve({"model": {"num_layers": 4}, "training": {"steps": 1, **MODES[mode]}, "parallel": parallel})
    with pytest.raises(RecipeError, match=r"^training.activation_checkpointing_every = 0"):
        resolve({"training": {"steps": 1, "activation_checkpointing_every": 0}})
