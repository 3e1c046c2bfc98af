"""A plan's estimate of activations is what a layer's forward keeps."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from torchlinearmoe.moe.layer import MoE
from torchlinearmoe.planning.memory import experts_bytes, feed_forward_bytes, router_bytes
from torchlinearmoe.recipe.schema import MoERecipe

TOKENS, WIDTH, HIDDEN, EXPERTS, TOP_K = 48, 64, 40, 8, 3


def mixture(dtype: torch.dtype, activation: str = "swiglu", **moe: object) -> MoE:
    """Step by step, where nothing else is said: what a CPU does."""
    sizes = {"num_experts": EXPERTS, "top_k": TOP_K, "hidden_size": HIDDEN, "shared_hidden_size": 0}
    rest = {"shared_gate": False, "renormalize": True, "balance": "none", "backend": "torch"}
    recipe = MoERecipe(**{**sizes, **rest, **moe})  # pyright: ignore[reportArgumentType]
    layer = MoE(WIDTH, recipe, 0.02, 0.02, activation)
    for part in layer.children():
        if part is not layer.router:
            part.to(dtype)
    return layer


def kept_bytes(layer: MoE, dtype: torch.dtype) -> int:
    """Bytes that the forward keeps for the backward, but weights and the layer's input."""
    torch.manual_seed(0)
    x_TD = torch.randn(TOKENS, WIDTH).to(dtype).requires_grad_()
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y_TD = layer(x_TD)
    assert y_TD.requires_grad
    for tensor in (x_TD, *layer.parameters()):
        kept.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(kept.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_routed_experts_keep_what_is_planned(dtype: torch.dtype, score: str) -> None:
    layer = mixture(dtype, score=score)
    planned = TOKENS * feed_forward_bytes(layer, dtype)
    offsets = EXPERTS * torch.int32.itemsize
    scores = TOKENS * (EXPERTS + TOP_K) * torch.float32.itemsize  # one more or less of these, by the router's kind
    assert kept_bytes(layer, dtype) - offsets == pytest.approx(planned, abs=scores)
    assert planned > 20 * scores


@pytest.mark.parametrize("latent", [0, 24])
@pytest.mark.parametrize("activation", ["swiglu", "relu2"])
def test_every_kind_of_experts_keeps_what_is_planned(activation: str, latent: int) -> None:
    layer = mixture(torch.float32, activation, latent_size=latent)
    planned = TOKENS * feed_forward_bytes(layer, torch.float32)
    scores = TOKENS * (EXPERTS + TOP_K) * torch.float32.itemsize
    assert kept_bytes(layer, torch.float32) == pytest.approx(planned, abs=1.1 * scores)


@pytest.mark.parametrize("gate", [False, True], ids=["plain", "gated"])
def test_a_shared_expert_adds_its_own(gate: bool) -> None:
    more = {"shared_hidden_size": 48, "shared_gate": gate}
    alone, beside = mixture(torch.bfloat16), mixture(torch.bfloat16, **more)
    added = feed_forward_bytes(beside, torch.bfloat16) - feed_forward_bytes(alone, torch.bfloat16)
    kept = kept_bytes(beside, torch.bfloat16) - kept_bytes(alone, torch.bfloat16)
    assert kept == TOKENS * (added + 2 * gate)  # the gate itself, one number
    assert added == 2 * (4 * 48 + gate * WIDTH)


def test_experts_in_one_operator_keep_their_gates_alone() -> None:
    """See `test_nothing_is_kept_but_the_gates_the_indices_and_what_went_in`."""
    steps, whole = mixture(torch.bfloat16), mixture(torch.bfloat16, backend="triton")
    indices = 2 * 8 * TOP_K
    assert experts_bytes(steps, torch.bfloat16) == 2 * TOP_K * (2 * WIDTH + 3 * HIDDEN) + indices
    assert experts_bytes(whole, torch.bfloat16) == 2 * TOP_K * 2 * HIDDEN + indices
    assert router_bytes(steps, torch.bfloat16) == router_bytes(whole, torch.bfloat16)
