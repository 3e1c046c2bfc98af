"""The balance coefficient of Mixtral and Qwen2-MoE directories weighs what transformers' loss weighs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from torchlinearmoe import load_model
from torchlinearmoe.checkpoint.huggingface.config import read_recipe, write_config
from torchlinearmoe.checkpoint.huggingface.importing import import_directory
from torchlinearmoe.errors import UserError
from torchlinearmoe.models.decoder import Decoder
from torchlinearmoe.moe import StepTotals
from torchlinearmoe.moe.balance import Balance
from torchlinearmoe.recipe import resolve

LAYERS, EXPERTS, K, COEFFICIENT = 3, 6, 2, 0.037
SEQUENCES, LENGTH = 4, 25
SIZE: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "num_experts_per_tok": K,
    "router_aux_loss_coef": COEFFICIENT,
    "output_router_logits": True,
}
CONFIGS = {
    "mixtral": lambda: transformers.MixtralConfig(**SIZE, num_local_experts=EXPERTS),
    "qwen2_moe": lambda: transformers.Qwen2MoeConfig(
        **SIZE, num_experts=EXPERTS, moe_intermediate_size=16, shared_expert_intermediate_size=24
    ),
}


@pytest.fixture(params=CONFIGS)
def theirs(request: pytest.FixtureRequest) -> Any:
    """A random model that routes unevenly, and every layer in another way."""
    torch.manual_seed(0)
    model: Any = transformers.AutoModelForCausalLM.from_config(CONFIGS[request.param]())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter += (0.3 if ".gate.weight" in name else 0.1) * torch.randn_like(parameter)
        model.model.embed_tokens.weight += 0.1  # common to all tokens, so that they prefer the same experts
    return model


def make_layers_alike(model: Any) -> None:
    """Every layer routes as the first: it sees the same hidden states, and its router is the same."""
    first = model.model.layers[0].mlp.gate.weight
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "o_proj" in name or "down_proj" in name:
                parameter.zero_()
            if ".gate.weight" in name:
                parameter.copy_(first)
            if "norm.weight" in name:
                parameter.fill_(1.0)


def imported(model: Any, folder: Path, scope: str = "global") -> Decoder:
    """The same model here, in training."""
    model.save_pretrained(folder / "theirs")
    import_directory(folder / "theirs", folder / "ours")
    ours = load_model(folder / "ours").train()
    for balance in balances(ours):
        balance.scope = scope
    return ours


def balances(model: Decoder) -> list[Balance]:
    return [module for module in model.modules() if isinstance(module, Balance)]


def our_losses(model: Decoder, tokens: Tensor) -> list[Tensor]:
    """The weighted balance loss of every layer, for a step that is this batch."""
    losses: list[Tensor] = []
    hooks = [one.register_forward_hook(lambda _m, _i, out: losses.append(out[0])) for one in balances(model)]
    model(tokens, totals=StepTotals(tokens.numel(), len(tokens)))
    for hook in hooks:
        hook.remove()
    assert len(losses) == LAYERS
    return losses


def their_loss(logits: Sequence[Tensor]) -> Tensor:
    pooled: Any = load_balancing_loss_func
    loss = pooled(tuple(logits), EXPERTS, K)
    assert isinstance(loss, Tensor)
    return COEFFICIENT * loss


def their_logits(model: Any, tokens: Tensor) -> list[Tensor]:
    """Of every layer, [B * T, E]."""
    output = model(tokens, output_router_logits=True)
    torch.testing.assert_close(COEFFICIENT * output.aux_loss, their_loss(output.router_logits))
    return list(output.router_logits)


def routers(model: Any, name: str) -> list[Tensor]:
    """The router's weight of every layer."""
    weights = [parameter for key, parameter in model.named_parameters() if key.endswith(name)]
    assert len(weights) == LAYERS
    return weights


def test_layers_of_the_same_load_have_the_loss_and_gradient_of_transformers(theirs: Any, tmp_path: Path) -> None:
    make_layers_alike(theirs)
    ours, tokens = imported(theirs, tmp_path), torch.randint(96, (SEQUENCES, LENGTH))
    loss, expected = sum(our_losses(ours, tokens)), their_loss(their_logits(theirs, tokens))
    assert isinstance(loss, Tensor) and expected > 1.05 * COEFFICIENT * K
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    logits = ours(tokens, totals=StepTotals(tokens.numel(), len(tokens)))
    found = torch.autograd.grad(logits, routers(ours, "router.weight"), torch.zeros_like(logits))  # the attached losses
    gradients = torch.autograd.grad(expected, routers(theirs, ".gate.weight"))
    for layer, gradient in zip(found, gradients, strict=True):
        assert gradient.abs().max() > 1e-3
        torch.testing.assert_close(layer, gradient, rtol=1e-4, atol=1e-6)


def test_any_layers_have_the_mean_of_their_losses_one_by_one(theirs: Any, tmp_path: Path) -> None:
    """The loss of all layers together is another where loads differ: by their covariance with the probabilities."""
    ours, tokens = imported(theirs, tmp_path), torch.randint(96, (SEQUENCES, LENGTH))
    logits = their_logits(theirs, tokens)
    one_by_one = torch.stack([their_loss([layer]) for layer in logits])
    found = torch.stack(our_losses(ours, tokens))
    torch.testing.assert_close(found, one_by_one / LAYERS, rtol=1e-4, atol=0)

    probs_LE = torch.stack([layer.softmax(-1).mean(0) for layer in logits])
    loads_LE = torch.stack([layer.topk(K).indices.flatten().bincount(minlength=EXPERTS) for layer in logits])
    fractions_LE = loads_LE / (K * tokens.numel())
    covariance = ((fractions_LE - fractions_LE.mean(0)) * (probs_LE - probs_LE.mean(0))).mean(0).sum()
    apart = COEFFICIENT * K * EXPERTS * covariance
    pooled = their_loss(logits)
    assert apart > 0.02 * pooled
    torch.testing.assert_close(found.sum(), pooled + apart, rtol=1e-4, atol=0)


def test_within_sequences_it_is_the_mean_over_them(theirs: Any, tmp_path: Path) -> None:
    ours, tokens = imported(theirs, tmp_path, "sequence"), torch.randint(96, (SEQUENCES, LENGTH))
    each = [their_loss([layer]) for row in tokens for layer in their_logits(theirs, row[None])]
    found = torch.stack(our_losses(ours, tokens)).sum()
    torch.testing.assert_close(found, torch.stack(each).mean(), rtol=1e-4, atol=0)
    batch = their_loss(their_logits(theirs, tokens))
    assert (found - batch).abs() > 0.02 * batch


def config_of(case: str, **changes: Any) -> dict[str, Any]:
    """`config.json` as transformers writes it."""
    config = CONFIGS[case]()
    architecture = {"mixtral": "MixtralForCausalLM", "qwen2_moe": "Qwen2MoeForCausalLM"}[case]
    return {**config.to_dict(), "architectures": [architecture], **changes}


PUBLISHED: dict[str, tuple[str, dict[str, Any], float]] = {
    "Mixtral 8x7B": ("mixtral", {"num_hidden_layers": 32, "num_experts_per_tok": 2}, 1 / 16),
    "Qwen1.5-MoE": ("qwen2_moe", {"num_hidden_layers": 24, "num_experts_per_tok": 4}, 1 / 6),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_what_was_read_is_written_again(name: str) -> None:
    case, shape, ratio = PUBLISHED[name]
    config = config_of(case, **shape)
    for theirs in (0.001, 0.02, 0.01, 0.0, 1, 1e-3 / 3, 0.00123456789012345, 7.1e-9):
        theirs = float(f"{theirs:.15g}")
        model = read_recipe(Path(), config | {"router_aux_loss_coef": theirs}).model
        assert model.moe.balance_coefficient == pytest.approx(theirs * ratio, rel=1e-15)
        written = write_config(model)
        assert written is not None and written["router_aux_loss_coef"] == theirs
    generator = torch.Generator().manual_seed(0)
    for value in torch.rand(300, dtype=torch.float64, generator=generator).tolist():
        model = read_recipe(Path(), config | {"router_aux_loss_coef": value}).model
        written = write_config(model)
        assert written is not None and abs(written["router_aux_loss_coef"] - value) <= math.ulp(value)
    left_out = {key: value for key, value in config.items() if key != "router_aux_loss_coef"}
    assert read_recipe(Path(), left_out).model.moe.balance_coefficient == pytest.approx(0.001 * ratio, rel=1e-15)


@pytest.mark.parametrize("value", ["much", True, math.inf, math.nan, -0.5])
def test_a_coefficient_that_is_none_is_named(value: object) -> None:
    with pytest.raises(UserError, match="moe.balance_coefficient"):
        read_recipe(Path(), config_of("mixtral", router_aux_loss_coef=value))


@pytest.mark.parametrize("key", ["num_hidden_layers", "num_experts_per_tok"])
def test_counts_that_are_none_are_named(key: str) -> None:
    for value in (0, -1, "two"):
        with pytest.raises(UserError, match="num_layers" if key == "num_hidden_layers" else "top_k"):
            read_recipe(Path(), config_of("mixtral", **{key: value}))


@pytest.mark.parametrize(("family", "key"), [("mixtral", "router_aux_loss_coef"), ("deepseek_v2", "aux_loss_alpha")])
def test_a_model_without_a_balance_loss_is_written_without(family: str, key: str) -> None:
    model: dict[str, Any] = {"family": family, "size": "debug", "layout": "N"}
    for balance in ("loss", "none"):
        moe = {"balance": balance, "balance_coefficient": 0.01}
        written = write_config(resolve({"model": model, "moe": moe, "training": {"steps": 1}}).model)
        expected = 0.01 if family == "deepseek_v2" else 0.01 * 4 / 2
        assert written is not None and written[key] == (expected if balance == "loss" else 0.0)
