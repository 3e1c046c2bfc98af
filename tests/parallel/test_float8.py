"""Which layers compute in float8, what their products are, and what is refused before a run begins."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from torchlinearmoe.errors import RecipeError
from torchlinearmoe.families import FAMILIES
from torchlinearmoe.initialize import initialize
from torchlinearmoe.layers.mlp import FeedForward
from torchlinearmoe.mixers import MIXERS
from torchlinearmoe.models.decoder import Decoder
from torchlinearmoe.parallel import float8
from torchlinearmoe.parallel.float8 import check_machine, check_sizes, convert_to_float8, float8_layers
from torchlinearmoe.planning import plan
from torchlinearmoe.recipe import Recipe, resolve

pytestmark = pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="needs torchao")

DELTA = {"b_proj"}
GLA = {"decay_down", "decay_up"}
LOW_RANK = {f"{name}_lora.{end}" for name in ("decay", "rate", "value", "gate") for end in ("down", "up")}
KEPT: dict[str, set[str]] = {
    "delta_net": DELTA,
    "gated_delta_net": DELTA | {"a_proj"},
    "gla": GLA,
    "gsa": {"f_proj"},
    "hgrn2": {"f_proj"},
    "kda": DELTA | GLA | {"decay_proj", "gate_down", "gate_up"},
    "mamba2": {"dt_proj"},
    "mla": {"g_proj"},
    "mom_gated_delta_net": {f"inner.{name}" for name in DELTA | {"a_proj"}},
    "mom_gla": {f"inner.{name}" for name in GLA},
    "rwkv6": GLA,
    "rwkv7": LOW_RANK,
}
"""By mixer, what makes its decays, what is a number a head, and low-rank gates: never in float8."""


def recipe_of(training: dict[str, Any] | None = None, parallel: dict[str, Any] | None = None, **model: Any) -> Recipe:
    settings = {"steps": 1, "float8": "rowwise", **(training or {})}
    sizes = {"family": "llama3", "size": "debug", "mixer": "gla", "num_layers": 2, "num_heads": 2, "num_kv_heads": 2}
    tables = {"model": {**sizes, "hidden_size": 64, **model}, "training": settings, "parallel": parallel or {}}
    return resolve(tables)


def on_meta(recipe: Recipe) -> Decoder:
    with torch.device("meta"):
        return Decoder(recipe.model)


def linears(module: nn.Module) -> set[str]:
    return {name for name, part in module.named_modules() if isinstance(part, nn.Linear)}


@pytest.mark.parametrize("name", [*MIXERS.names(), "mla"])
def test_projections_of_every_mixer_are_in_float8_but_for_decays_and_what_is_narrow(name: str):
    shared = [{"shared_projections": True}] if name.startswith("mom_") else []
    kept, declared, present = set[str](), set[str](), set[str]()
    for options in ({}, *MIXERS[name].variants, *shared):
        tables = {
            "model": {"mixer": name, "layout": "L", "hidden_size": 64, "num_layers": 2, "num_heads": 2}
            | {"num_kv_heads": 2},
            "mixer": {name: options},
            "training": {"steps": 1},
        }
        for layer in on_meta(resolve(tables)).layers.values():
            mixer = layer.get_submodule("mixer")
            chosen = {path for path, _ in float8_layers(mixer)}
            kept |= linears(mixer) - chosen
            present |= chosen
            declared |= {f"{path}.{each}".lstrip(".") for path, part in mixer.named_modules() for each in said(part)}
    assert kept == KEPT.get(name, set())
    written = {"inner.k_proj", "inner.v_proj"} if name.startswith("mom_") else set()
    assert declared <= present | written, "a name that no layer of this mixer has"


def said(module: nn.Module) -> tuple[str, ...]:
    return getattr(module, "float8", ())


@pytest.mark.parametrize("name", FAMILIES)
def test_dense_and_shared_feed_forwards_of_every_family_are_in_float8_and_nothing_else_outside_mixers(name: str):
    recipe = resolve({"model": {"family": name, "size": "debug"}, "training": {"steps": 1}})
    model = on_meta(recipe)
    wanted = {
        f"{path}.{each}"
        for path, part in model.named_modules()
        if isinstance(part, FeedForward)
        for each in linears(part)
    }
    assert {path for path, _ in float8_layers(model) if ".mixer." not in path} == wanted


def emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    scaling = float8.scaling
    monkeypatch.setattr(float8, "scaling", lambda kind: replace(scaling(kind), emulate=True))


def test_names_values_and_tied_distributions_stay(monkeypatch: pytest.MonkeyPatch):
    emulated(monkeypatch)
    recipe = recipe_of(mixers=["rwkv7", "softmax_attention"])
    plain, converted = on_meta(recipe), on_meta(recipe)
    convert_to_float8(converted, "rowwise")
    for model in plain, converted:
        model.to_empty(device="cpu")
        initialize(model, 5)
    expected, found = plain.state_dict(), converted.state_dict()
    assert [*expected] == [*found] and all(torch.equal(found[name], value) for name, value in expected.items())
    exchanged = {path for path, _ in float8_layers(plain)}
    assert exchanged == {path for path, part in converted.named_modules() if type(part).__name__ == "Float8Linear"}


def rounded(x: Tensor, dim: int) -> Tensor:
    """x as float8 holds it, with a scale for what lies along `dim`: the greatest power of two that fits."""
    largest = torch.finfo(torch.float8_e4m3fn).max
    scale = torch.exp2(torch.floor(torch.log2(largest / x.abs().amax(dim, keepdim=True).double().clamp(min=1e-12))))
    return (x.double() * scale).float().to(torch.float8_e4m3fn).double() / scale


@pytest.mark.parametrize("bias", [False, True])
def test_both_sides_of_each_of_the_three_products_are_rounded_along_what_is_summed(bias: bool, monkeypatch):
    emulated(monkeypatch)
    recipe = resolve(
        {
            "model": {"family": "llama3", "size": "debug", "layout": "N", "num_layers": 1},
            "mixer": {"softmax_attention": {"qkv_bias": bias}},
            "training": {"steps": 1},
        }
    )
    model = on_meta(recipe)
    convert_to_float8(model, "rowwise")
    model.to_empty(device="cpu")
    initialize(model, 5)
    layer = model.layers["0"].get_submodule("mixer.q_proj")
    assert isinstance(layer, nn.Linear)
    weight = layer.weight.detach().double()
    x = (torch.randn(48, weight.shape[1]) * torch.logspace(-3, 3, 48)[:, None]).requires_grad_()
    y = layer(x)
    d_y = torch.randn_like(y) * torch.logspace(-5, 2, y.shape[1])
    d_x, d_weight = torch.autograd.grad(y, (x, layer.weight), d_y)
    x = x.detach()
    expected = (
        rounded(x, 1) @ rounded(weight, 1).T + (0 if layer.bias is None else layer.bias.double()),
        rounded(d_y, 1) @ rounded(weight, 0),
        rounded(d_y, 0).T @ rounded(x, 0),
    )
    for found, wanted in zip((y, d_x, d_weight), expected, strict=True):
        assert (found - wanted).abs().max() < 1e-6 * wanted.abs().max()


def refused(recipe: Recipe) -> str:
    with pytest.raises(RecipeError) as error:
        check_sizes(on_meta(recipe), recipe)
    return str(error.value)


def test_sizes_that_are_no_multiples_of_16_are_refused_with_the_layer_and_a_way_out():
    check_sizes(on_meta(recipe_of()), recipe_of())
    end = "no multiple of 16; change the model's sizes, or set training.float8 = 'none'"
    key = "training.float8 = 'rowwise': "
    narrow = recipe_of(ffn_hidden_size=72)
    assert refused(narrow) == f"{key}layers.0.ffn.gate_proj has 72 outputs, {end}"
    split = recipe_of(parallel={"tensor": 2}, ffn_hidden_size=80)
    assert refused(split) == (f"{key}layers.0.ffn.gate_proj has 40 outputs of each of parallel.tensor = 2 ranks, {end}")
    short = recipe_of({"sequence_length": 40}, {"context": 2})
    assert refused(short) == (
        f"{key}20 tokens of a micro-batch and context-parallel rank are no multiple of 16; change "
        "training.sequence_length, or set training.float8 = 'none'"
    )
    without = recipe_of({"float8": "none"}, ffn_hidden_size=72)
    check_sizes(on_meta(without), without)


@pytest.mark.parametrize(
    ("device", "capability", "dtype", "missing", "told"),
    [
        ("cuda", (9, 0), torch.bfloat16, True, "torchao cannot be imported; pip install torchlinearmoe[float8], or "),
        ("cpu", (0, 0), torch.bfloat16, False, "it needs a GPU, training runs on the cpu; use one, or "),
        ("cuda", (8, 0), torch.bfloat16, False, "it needs compute capability 8.9, this GPU has 8.0; use another GPU"),
        ("cuda", (9, 0), torch.float32, False, "what is around it computes in bfloat16, not in float32; set train"),
        ("cuda", (8, 9), torch.bfloat16, False, ""),
    ],
)
def test_machines_that_cannot_are_refused(device, capability, dtype, missing, told, monkeypatch):
    find, machine = importlib.util.find_spec, float8.this_machine()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: find("torchao.none" if missing else "torch"))
    monkeypatch.setattr(float8, "this_machine", lambda: replace(machine, capability=capability))
    if not told:
        check_machine(recipe_of(), torch.device(device), dtype)
        return
    with pytest.raises(RecipeError, match="^training.float8 = 'rowwise': ") as error:
        check_machine(recipe_of(), torch.device(device), dtype)
    assert told in str(error.value) and str(error.value).endswith("or set training.float8 = 'none'")
    check_machine(recipe_of({"float8": "none"}), torch.device(device), dtype)


def test_a_plan_needs_no_torchao_and_refuses_the_same_sizes(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao", None)
    training = {"sequence_length": 64, "tokens_per_step": 128}
    wanted, plain = (
        plan(recipe_of({**training, "float8": kind}), 2, torch.bfloat16, 0) for kind in ("rowwise", "none")
    )
    assert wanted["ranks"] == plain["ranks"] if "ranks" in wanted else wanted.keys() == plain.keys()
    with pytest.raises(RecipeError, match="ffn.gate_proj has 72 outputs, no multiple of 16"):
        plan(recipe_of(training, ffn_hidden_size=72), 2, torch.bfloat16, 0)


@pytest.mark.gpu
@pytest.mark.parametrize("compiles", [False, True])
def test_a_gpu_multiplies_what_the_emulation_multiplies(compiles: bool, monkeypatch):
    recipe = recipe_of(hidden_size=256, ffn_hidden_size=512, num_layers=1, layout="N")
    check_machine(recipe, torch.device("cuda"), torch.bfloat16)
    results, weights = [], {}
    for emulates in (False, True):
        with monkeypatch.context() as patched:
            if emulates:
                emulated(patched)
            model = on_meta(recipe)
            convert_to_float8(model, "rowwise")
        feed_forward = model.layers["0"].get_submodule("ffn").to_empty(device="cuda").bfloat16()
        for name, parameter in feed_forward.named_parameters():
            if name not in weights:
                weights[name] = torch.randn(parameter.shape, device="cuda").bfloat16() / 16
            parameter.data.copy_(weights[name])
        torch.manual_seed(0)
        x = torch.randn(320, 256, device="cuda").bfloat16().requires_grad_()
        function = torch.compile(feed_forward) if compiles and not emulates else feed_forward
        y = function(x)
        gradients = torch.autograd.grad(y, (x, *feed_forward.parameters()), torch.randn_like(y))
        results.append([y.detach(), *gradients])
    for found, expected in zip(*results, strict=True):
        assert found.dtype == torch.bfloat16
        # A number beside one of float8's borders falls to either side after a sum of another order: 6 % of it.
        assert (found.float() - expected.float()).norm() < 0.03 * expected.float().norm()
