"""The decoder in training: packed equals alone, the loss is the cross entropy, builds are reproducible."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from decoder_cases import VOCAB, every_layout, random_tokens, relative, small_model, small_recipe
from torch.nn import functional as F

from torchlinearmoe import build_model
from torchlinearmoe.documents import Documents
from torchlinearmoe.families.base import FAMILIES
from torchlinearmoe.layers.mlp import NoFeedForward
from torchlinearmoe.layers.norm import RMSNorm
from torchlinearmoe.mixers.base import Mixer
from torchlinearmoe.models.block import Block
from torchlinearmoe.models.flops import active_parameters, forward_flops_per_token, training_flops_per_token
from torchlinearmoe.models.layer_mixers import layer_mixers
from torchlinearmoe.moe.layer import MoE
from torchlinearmoe.recipe import resolve


@every_layout
def test_packed_documents_equal_documents_alone(layout: dict[str, Any]):
    model, lengths = small_model(layout), (1, 40, 25, 4)
    tokens = random_tokens(1, sum(lengths))
    borders = F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).int()
    with torch.no_grad():
        packed = model(tokens, cu_seqlens=borders)
        alone = torch.cat([model(part) for part in tokens.split(lengths, 1)], 1)
    assert packed.shape == (1, sum(lengths), VOCAB)
    assert relative(packed, alone) < 1e-10


@pytest.mark.parametrize("tied", [False, True])
def test_embeddings_of_a_size_of_their_own_are_those_of_the_weights_scaled_unless_the_head_shares_them(tied: bool):
    model = {"mixer": "gla", "layout": "LN", "num_layers": 2, "tie_embeddings": tied, "init_std": 0.02}
    plain, other = (
        build_model(resolve({"model": {**model, **more}, "training": {"steps": 1}}).model)
        for more in ({}, {"embed_init_std": 0.5})
    )
    for (name, weight), same in zip(other.named_parameters(), plain.parameters(), strict=True):
        scale = 25 if name == "embed.weight" and not tied else 1
        torch.testing.assert_close(weight, scale * same, rtol=1e-6, atol=0)


@pytest.mark.parametrize("tied", [False, True])
def test_scales_of_the_model_are_scales_of_its_weights(tied: bool):
    plain = {"mixer": "gla", "layout": "LN", "num_layers": 2, "tie_embeddings": tied}
    model = small_model({**plain, "embed_scale": 3.0, "residual_scale": 0.4, "logit_divisor": 5.0})
    scaled = small_model(plain)
    with torch.no_grad():
        for name, weight in scaled.named_parameters():
            writes = name.endswith(("o_proj.weight", "down_proj.weight", "experts.down"))
            weight.mul_(3.0 if name == "embed.weight" else 0.4 if writes else 1.0)
        if tied:  # the head reads the same weight, and the norm before it is free
            scaled.norm.weight.div_(3.0)
        scaled.norm.weight.div_(5.0)
    tokens, labels = random_tokens(2, 30), random_tokens(60, seed=3)
    with torch.no_grad():
        assert relative(model(tokens), scaled(tokens)) < 1e-12
        assert relative(model(tokens, labels=labels), scaled(tokens, labels=labels)) < 1e-12
        embedded = model.embed(tokens)
        assert relative(model(embedded), scaled(3.0 * embedded)) < 1e-12
        found, state = model.prefill(tokens[:, :20], model.init_state(2))
        steps = [found]
        for token in tokens[:, 20:].unbind(1):
            found, state = model.step(token, state)
            steps.append(found[:, None])
        assert relative(torch.cat(steps, 1), scaled(tokens)) < 1e-12


@pytest.mark.parametrize("activation", ["swiglu", "relu2"])
def test_a_layer_has_the_feed_forward_that_its_letter_says(activation: str):
    plain = {"mixer": "gla", "layout": "LN", "num_layers": 5, "activation": activation}
    model = small_model({**plain, "feed_forwards": "E-."}, {"first_dense_layers": 1, "latent_size": 8})
    kinds = {True: "E", False: "-"}
    found = "".join(
        "." if isinstance(layer.ffn, NoFeedForward) else kinds[isinstance(layer.ffn, MoE)]
        for layer in model.layers.values()
    )
    assert found == "--.E-" and model.layers["2"].ffn_norm is None
    whole = small_model({**plain, "feed_forwards": "EE-"}, {"first_dense_layers": 2, "latent_size": 8})
    with torch.no_grad():  # a layer without is one whose feed-forward gives nothing
        whole.load_state_dict(model.state_dict(), strict=False)
        whole.get_parameter("layers.2.ffn.down_proj.weight").zero_()
    tokens = random_tokens(2, 30)
    assert [isinstance(layer.ffn, MoE) for layer in whole.layers.values()] == [False, False, False, True, True]
    with pytest.raises(AssertionError):
        torch.testing.assert_close(model(tokens), whole(tokens))
    whole.layers["4"].ffn = model.layers["4"].ffn
    with torch.no_grad():
        assert relative(model(tokens), whole(tokens)) < 1e-12
        found, state = model.prefill(tokens[:, :25], model.init_state(2))
        for token in tokens[:, 25:].unbind(1):
            last, state = model.step(token, state)
        assert relative(last, whole(tokens)[:, -1]) < 1e-12


@every_layout
def test_a_later_token_changes_no_earlier_logit(layout: dict[str, Any]):
    model, tokens = small_model(layout), random_tokens(2, 66)
    other = tokens.clone()
    other[:, 40] = (other[:, 40] + 1) % VOCAB
    with torch.no_grad():
        before, after = model(tokens), model(other)
    assert relative(after[:, :40], before[:, :40]) < 1e-10
    assert relative(after[:, 40], before[:, 40]) > 1e-4


@pytest.mark.parametrize("tied", [False, True])
def test_the_loss_is_the_summed_cross_entropy_of_the_logits(tied: bool):
    model = small_model({"layout": "LN", "num_layers": 2, "tie_embeddings": tied})
    assert (model.head.weight is None) == tied
    documents = Documents.packed([0, 5, 24, 40], row_length=None)
    tokens, labels = random_tokens(40), random_tokens(40, seed=3)
    labels[[4, 23, 39]] = -100
    logits = model(tokens, documents=documents)
    assert logits.shape == (40, VOCAB)
    expected = F.cross_entropy(logits, labels, reduction="sum")
    loss = model(tokens, documents=documents, labels=labels)
    torch.testing.assert_close(loss, expected)
    parameters = list(model.parameters())
    mine = torch.autograd.grad(loss, parameters, allow_unused=True)
    theirs = torch.autograd.grad(expected, parameters, allow_unused=True)
    for (name, _), a, b in zip(model.named_parameters(), mine, theirs):
        assert a is not None and b is not None, name
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


def test_a_batch_is_rows_of_equal_documents():
    model, tokens = small_model({"layout": "LN", "num_layers": 2}), random_tokens(3, 17)
    with torch.no_grad():
        batch, flat = model(tokens), model(tokens.flatten(), documents=Documents.batch(3, 17))
    assert torch.equal(batch, flat.unflatten(0, (3, 17)))


@pytest.mark.parametrize(
    ("tokens", "borders", "message"),
    [
        ((2, 5), [0, 5, 10], "packed documents come as one row"),
        ((1, 5), [0, 3], "must end at the 5 tokens"),
        ((1, 5), [0, 3, 6], "must end at the 5 tokens"),
        ((1, 5), [], "must end at the 5 tokens"),
        ((1, 5), [1, 5], "must start at 0"),
        ((1, 5), [0, 3, 3, 5], "must strictly increase"),
        ((5,), None, r"must be \[B, T\]"),
        ((1, 0), None, "no tokens"),
    ],
    ids=str,
)
def test_borders_that_do_not_fit_the_tokens_are_refused(tokens: tuple[int, ...], borders: Any, message: str):
    model = small_model({"num_layers": 1})
    cu_seqlens = None if borders is None else torch.tensor(borders, dtype=torch.int32)
    with pytest.raises(ValueError, match=message):
        model(torch.zeros(tokens, dtype=torch.int64), cu_seqlens=cu_seqlens)


def test_builds_are_equal_for_equal_seeds_and_differ_else():
    recipe = small_recipe({"layout": "LN", "num_layers": 2})
    first, second, other = (build_model(recipe, seed=seed) for seed in (5, 5, 6))
    for (name, a), b, c in zip(first.named_parameters(), second.parameters(), other.parameters()):
        assert torch.equal(a, b) and a.dtype == torch.float32, name
        if a.dim() > 1 and not name.startswith("shared."):
            assert not torch.equal(a, c), name


def test_one_shared_module_serves_all_layers_of_its_mixer_and_is_counted_once():
    model = build_model(small_recipe({"mixers": ["hgrn2", "softmax_attention", "hgrn2", "hgrn2"]}))
    assert set(model.shared) == {"hgrn2"}
    assert [name for name, _ in model.named_parameters() if "table" in name] == ["shared.hgrn2.table"]
    assert model.get_parameter("shared.hgrn2.table").shape[0] == 3
    assert [getattr(model.layers[i].mixer, "ordinal", None) for i in "0123"] == [0, None, 1, 2]
    assert not build_model(small_recipe({"num_layers": 1}, hgrn2={"lower_bounds": False})).shared


@every_layout
def test_layers_run_the_named_mixers(layout: dict[str, Any]):
    recipe = small_recipe(layout)
    layers = build_model(recipe).layers.values()
    for layer, name in zip(layers, layer_mixers(recipe), strict=True):
        assert isinstance(layer, Block) and isinstance(layer.mixer, Mixer) and layer.mixer.name == name


def test_flops_count_the_weights_a_token_meets():
    dense = build_model(small_recipe({"num_layers": 1}, {"num_experts": 0}))
    mixer = dense.layers["0"].mixer
    assert isinstance(mixer, Mixer)
    expected = 2 * 32 * VOCAB + mixer.flops_per_token(64) + 2 * 3 * 32 * dense.recipe.ffn_hidden_size
    assert forward_flops_per_token(dense, 64) == expected
    assert training_flops_per_token(dense, 64) == 3 * expected
    shared = {"shared_hidden_size": 8, "shared_gate": True}
    sparse = build_model(small_recipe({"num_layers": 1}, shared))
    met = 2 * 3 * 32 * 16 + 4 * 32 + 3 * 32 * 8 + 32
    assert active_parameters(sparse.layers["0"].ffn) == met
    hybrid = build_model(small_recipe({"layout": "LN", "num_layers": 2}))
    assert forward_flops_per_token(hybrid, 1000) > forward_flops_per_token(hybrid, 10)
    assert forward_flops_per_token(sparse, 1000) == forward_flops_per_token(sparse, 10)


def test_rms_norm_follows_its_formula_with_float32_statistics():
    norm = RMSNorm(8, 1e-3)
    with torch.no_grad():
        norm.weight.normal_()
    x = torch.randn(5, 8, dtype=torch.float64)
    expected = x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-3) * norm.weight.double()
    torch.testing.assert_close(norm.double()(x), expected)
    half = norm.float()(x.bfloat16())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.double(), expected, rtol=2e-2, atol=1e-2)


def test_every_family_has_presets_that_build():
    for family in FAMILIES:
        recipe = resolve({"model": {"family": family, "size": "debug"}, "training": {"steps": 1}}).model
        tokens = torch.randint(0, recipe.vocab_size, (1, 9))
        assert bool(build_model(recipe)(tokens).isfinite().all())
