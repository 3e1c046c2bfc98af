"""Qwen3-Next: three layers of Gated DeltaNet, one of gated softmax attention, many small experts and a shared one.

Sizes: `A3B` is Qwen3-Next-80B-A3B (and Qwen3-Coder-Next), and `debug`. Softmax heads of 256 channels, 64 of them
rotated, are normed and gated; norms learn how far their weights are from one. A published layer keeps a key head's
queries, keys, values and gates together in one projection. The head that predicts further tokens (`mtp`) is left out.
"""

from __future__ import annotations

from typing import Any

from torchlinearmoe.errors import RecipeError
from torchlinearmoe.families.base import FAMILIES, Family, model_size, moe_size
from torchlinearmoe.families.huggingface import (
    ATTENTION,
    HEAD_NORMS,
    MODEL_DEFAULTS,
    MODEL_FIXED,
    MODEL_KEYS,
    OUTER,
    Architecture,
    Config,
    Name,
    Rows,
    Tables,
    experts,
    of_mixer,
    swiglu,
)
from torchlinearmoe.families.pooled_balance import read_pooled_balance, write_pooled_balance
from torchlinearmoe.recipe.schema import ModelRecipe

DELTA, SOFTMAX = "gated_delta_net", "softmax_attention"
GATED_HEADS = {"qk_norm": "head", "output_gate": True}


def delta(key_heads: int, value_heads: int, width: int = 128) -> dict[str, Any]:
    """The options of the linear layers."""
    return {"heads": key_heads, "head_dim": width, "value_heads": value_heads, "expand_v": 1.0}


def experts_of(number: int, top_k: int, hidden: int) -> dict[str, Any]:
    """`[moe]` of a size; the shared expert is as large as the others."""
    return moe_size(number, top_k, hidden, shared_hidden_size=hidden, shared_gate=True, renormalize=True)


PRESETS = {
    "debug": (
        model_size(64, 4, 4, 2, 160, 1024, head_dim=16, max_length=1024, rope_theta=1e4),
        experts_of(4, 2, 32),
        {"rotary_dim": 4},
        delta(2, 4, 16),
    ),
    "A3B": (
        model_size(2048, 48, 16, 2, 5120, 151936, head_dim=256),
        experts_of(512, 10, 512),
        {"rotary_dim": 64},
        delta(16, 32),
    ),
}


def of_delta(model: ModelRecipe) -> tuple[int, int, int]:
    """(key heads, channels of a key head, value channels that go with a key head)."""
    options = model.mixer_options[DELTA]
    heads, values = options.heads, options.value_heads or options.heads
    return heads, options.head_dim, round(options.head_dim * options.expand_v) * (values // heads)


def values_of(model: ModelRecipe) -> int:
    """Value heads of a key head."""
    options = model.mixer_options[DELTA]
    return (options.value_heads or options.heads) // options.heads


def by_head(index: int):
    """Part `index` of each key head's queries, keys, values and gates."""

    def rows(model: ModelRecipe) -> Rows:
        heads, keys, values = of_delta(model)
        return Rows(heads, (keys, keys, values, values), index)

    return rows


def two_by_head(index: int):
    """Part `index` of each key head's strengths and decays, one a value head."""
    return lambda model: Rows(of_delta(model)[0], (values_of(model),) * 2, index)


def joined(index: int):
    """Part `index` of all heads' queries, then keys, then values."""

    def rows(model: ModelRecipe) -> Rows:
        heads, keys, values = of_delta(model)
        return Rows(1, (heads * keys, heads * keys, heads * values), index)

    return rows


def query_and_gate(index: int):
    """A softmax head's queries, then its gates."""

    def rows(model: ModelRecipe) -> Rows:
        options = model.mixer_options[SOFTMAX]
        heads, width = options.heads or model.num_heads, options.head_dim or model.head_dim
        return Rows(heads, (width, width), index) if options.output_gate else Rows(1, (heads * width,), 0)

    return rows


OURS, THEIRS = "layers.{layer}.mixer", "model.layers.{layer}.linear_attn"
QUERY = "model.layers.{layer}.self_attn.q_proj.weight"
ATTENTION_NAMES = of_mixer(
    SOFTMAX,
    (
        Name(f"{OURS}.q_proj.weight", QUERY, rows=query_and_gate(0)),
        Name(f"{OURS}.g_proj.weight", QUERY, rows=query_and_gate(1)),
        *(name for name in ATTENTION if not name.theirs.endswith((".q_proj.weight", ".bias"))),
        *HEAD_NORMS,
    ),
)
DELTA_NAMES = of_mixer(
    DELTA,
    (
        *(
            Name(f"{OURS}.convs.{part}.weight", f"{THEIRS}.conv1d.weight", rows=joined(index), axes=(0, None, 1))
            for index, part in enumerate("qkv")
        ),
        Name(f"{OURS}.decay.A_log", f"{THEIRS}.A_log"),
        Name(f"{OURS}.decay.dt_bias", f"{THEIRS}.dt_bias"),
        Name(f"{OURS}.norm.weight", f"{THEIRS}.norm.weight"),
        Name(f"{OURS}.o_proj.weight", f"{THEIRS}.out_proj.weight"),
    ),
)
SHARED_NAMES = (
    Name("layers.{layer}.ffn.router.weight", "model.layers.{layer}.mlp.gate.weight"),
    *swiglu("ffn.shared", "mlp.shared_expert"),
    Name("layers.{layer}.ffn.shared_gate.weight", "model.layers.{layer}.mlp.shared_expert_gate.weight"),
)
EXPERT_NAMES = experts("mlp.experts", "gate_proj", "up_proj", "down_proj")

KEYS = {
    **MODEL_KEYS,
    "num_experts": "moe.num_experts",
    "num_experts_per_tok": "moe.top_k",
    "moe_intermediate_size": "moe.hidden_size",
    "shared_expert_intermediate_size": "moe.shared_hidden_size",
    "router_aux_loss_coef": "moe.balance_coefficient",
    "linear_num_key_heads": f"mixer.{DELTA}.heads",
    "linear_key_head_dim": f"mixer.{DELTA}.head_dim",
    "linear_num_value_heads": f"mixer.{DELTA}.value_heads",
    "linear_conv_kernel_dim": f"mixer.{DELTA}.conv",
}
DEFAULTS = {
    **MODEL_DEFAULTS,
    "head_dim": 256,
    "router_aux_loss_coef": 0.001,
    "linear_num_key_heads": 16,
    "linear_key_head_dim": 128,
    "linear_num_value_heads": 32,
    "linear_conv_kernel_dim": 4,
}
IMPLIED = {
    "model.norm_offset": 1.0,
    "moe.shared_gate": True,
    **{f"mixer.{SOFTMAX}.{key}": value for key, value in GATED_HEADS.items()},
}


def read_delta(config: Config, tables: Tables) -> None:
    """The width of a value head as a multiple of a key head's."""
    read_pooled_balance(config, tables)
    width, value_width = tables[f"mixer.{DELTA}"]["head_dim"], config.get("linear_value_head_dim") or 128
    for key, value in (("linear_key_head_dim", width), ("linear_value_head_dim", value_width)):
        if type(value) is not int or value < 1:
            raise RecipeError(f"{key} = {value!r}: must be a whole number above 0")
    tables[f"mixer.{DELTA}"]["expand_v"] = value_width / width


def write_delta(tables: Tables, config: Config) -> None:
    """The same the other way."""
    write_pooled_balance(tables, config)
    options = tables[f"mixer.{DELTA}"]
    config["linear_value_head_dim"] = round(options["head_dim"] * options["expand_v"])


def every_fourth(config: Config) -> list[str]:
    """`layer_types` of a directory that does not list them."""
    layers, interval = config.get("num_hidden_layers"), config.get("full_attention_interval", 4)
    for key, value in (("num_hidden_layers", layers), ("full_attention_interval", interval)):
        if type(value) is not int or value < 1:
            raise RecipeError(f"{key} = {value!r}: must be a whole number above 0")
    assert isinstance(layers, int)
    return ["linear_attention" if (layer + 1) % interval else "full_attention" for layer in range(min(layers, 2**12))]


PUBLISHED = Architecture(
    name="Qwen3NextForCausalLM",
    model_type="qwen3_next",
    keys={**KEYS, "intermediate_size": "model.ffn_hidden_size", "norm_topk_prob": "moe.renormalize"},
    names=(
        *OUTER,
        *ATTENTION_NAMES,
        *DELTA_NAMES,
        *of_mixer(
            DELTA,
            tuple(
                Name(f"{OURS}.{part}_proj.weight", f"{THEIRS}.in_proj_qkvz.weight", rows=by_head(index))
                for index, part in enumerate("qkvg")
            ),
        ),
        *of_mixer(
            DELTA,
            tuple(
                Name(f"{OURS}.{part}_proj.weight", f"{THEIRS}.in_proj_ba.weight", rows=two_by_head(index))
                for index, part in enumerate("ba")
            ),
        ),
        *SHARED_NAMES,
        *EXPERT_NAMES,
    ),
    defaults={**DEFAULTS, "intermediate_size": 5632, "norm_topk_prob": True},
    fixed={**MODEL_FIXED, "attention_bias": False, "decoder_sparse_step": 1, "mlp_only_layers": []},
    implied=IMPLIED,
    read=read_delta,
    write=write_delta,
    ignored=(r"mtp\..*",),
    layers={"linear_attention": DELTA},
    layer_types=every_fourth,
    rotary=(f"mixer.{SOFTMAX}.rotary_dim", 0.25),
)

COMMON = {
    "mixer": DELTA,
    "layout": "LLLN",
    "max_length": 262144,
    "rope_theta": 1e7,
    "norm_eps": 1e-6,
    "norm_offset": 1.0,
    "tie_embeddings": False,
    "init_std": 0.02,
}

FAMILIES.add(
    "qwen3_next",
    Family(
        name="qwen3_next",
        attention=SOFTMAX,
        common=COMMON,
        options=GATED_HEADS,
        presets=PRESETS,
        published=(PUBLISHED,),
    ),
)
