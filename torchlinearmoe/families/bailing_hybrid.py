"""Ling 3.0: five layers of Kimi Delta Attention, one of latent attention, DeepSeek-V3's router over many experts.

Sizes: `A5B` is Ling-3.0-flash (124B), and `debug`. Decays and gates of the linear layers are of full rank, decays not
below e^-5; what a latent head reads is gated by a number of the token. The first two layers are dense. Ling 2.5, of the
same `model_type`, is another model (`BailingMoeV2_5ForCausalLM`), which is not read.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from torchlinearmoe.errors import RecipeError
from torchlinearmoe.families.base import FAMILIES, Family, model_size, moe_size
from torchlinearmoe.families.huggingface import (
    LATENT,
    MODEL_DEFAULTS,
    MODEL_FIXED,
    OUTER,
    Architecture,
    Config,
    Name,
    Tables,
    experts,
    of_mixer,
    swiglu,
)
from torchlinearmoe.families.sigmoid_routing import (
    BIAS,
    KIMI,
    KIMI_SYNONYMS,
    SIGMOID,
    SIGMOID_IMPLIED,
    grouped,
    read_dense_layers,
    read_experts,
    write_experts,
)


def latent(head: int, rotated: int, value: int, width: int) -> dict[str, Any]:
    """The options of the latent layers."""
    return {"head_dim": head, "qk_rope_head_dim": rotated, "v_head_dim": value, "kv_lora_rank": width}


def delta(heads: int, width: int, bound: float = -5.0) -> dict[str, Any]:
    """The options of the linear layers."""
    return {"heads": heads, "head_dim": width, "gate_bias": False, "full_rank": True, "decay_bound": bound}


def _moe(number: int, top_k: int, hidden: int, dense: int, groups: int, chosen: int) -> dict[str, Any]:
    more = {"shared_hidden_size": hidden, "routed_scaling": 2.5, "first_dense_layers": dense}
    return moe_size(number, top_k, hidden, **more, **SIGMOID, **grouped(groups, chosen))


PRESETS = {
    "debug": (
        model_size(64, 4, 4, 4, 160, 1024, layout="LLLN", max_length=1024, rope_theta=1e4),
        _moe(8, 2, 32, 1, 4, 2),
        latent(16, 8, 16, 32),
        delta(4, 16),
    ),
    "A5B": (
        model_size(2560, 42, 32, 32, 6144, 157184),
        _moe(512, 8, 768, 2, 8, 4),
        latent(128, 64, 128, 512),
        delta(32, 128),
    ),
}

OURS, THEIRS = "layers.{layer}.mixer", "model.layers.{layer}.attention"
DELTA = {
    **{f"{part}_proj.weight": f"{part}_proj.weight" for part in "qkvbg"},
    "decay_proj.weight": "f_proj.weight",
    "o_proj.weight": "dense.weight",
    "decay.A_log": "A_log",
    "decay.dt_bias": "dt_bias",
    "norm.weight": "o_norm.weight",
}
ELSEWHERE = {"model.embed_tokens.weight": "model.word_embeddings.weight"}
ELSEWHERE |= {f"{THEIRS}.o_proj.weight": f"{THEIRS}.dense.weight"}
NAMES = tuple(
    dataclasses.replace(name, theirs=ELSEWHERE.get(found := name.theirs.replace(".self_attn.", ".attention."), found))
    for name in (
        *OUTER,
        *of_mixer("mla", (*LATENT, Name(f"{OURS}.g_proj.weight", f"{THEIRS}.g_proj.weight"))),
        *of_mixer("kda", tuple(Name(f"{OURS}.{ours}", f"{THEIRS}.{theirs}") for ours, theirs in DELTA.items())),
        *(Name(f"{OURS}.convs.{part}.weight", f"{THEIRS}.{part}_conv1d.weight", axes=(0, None, 1)) for part in "qkv"),
        *swiglu("ffn", "mlp"),
        Name("layers.{layer}.ffn.router.weight", "model.layers.{layer}.mlp.gate.weight"),
        Name(BIAS, "model.layers.{layer}.mlp.gate.expert_bias"),
        *experts("mlp.experts", "gate_proj", "up_proj", "down_proj"),
        *swiglu("ffn.shared", "mlp.shared_experts"),
    )
)


def _layer_types(config: Config) -> list[str]:
    """The last layer of every group has latent attention."""
    layers, group = config.get("num_hidden_layers"), config.get("layer_group_size", 6)
    for key, value in (("num_hidden_layers", layers), ("layer_group_size", group)):
        if type(value) is not int or value < 1:
            raise RecipeError(f"{key} = {value!r}: must be a whole number above 0")
    assert isinstance(layers, int)
    return ["linear_attention" if (layer + 1) % group else "full_attention" for layer in range(min(layers, 2**12))]


def _read(config: Config, tables: Tables) -> None:
    read_experts(config, tables, "num_expert_group", "num_shared_experts", 8, 4, 1)
    read_dense_layers(config, tables, 2)
    safe, bound = config.get("kda_safe_gate", True), config.get("kda_lower_bound", -5.0)
    if type(safe) is not bool or (safe and not (isinstance(bound, int | float) and bound < 0)):
        raise RecipeError(f"kda_safe_gate = {safe!r}, kda_lower_bound = {bound!r}: must be a bound below 0, or false")
    heads = config.get("linear_num_heads", config["num_attention_heads"])
    width = config.get("linear_head_dim", config.get("head_dim", 128))
    taps = config.get("linear_conv_kernel_dim", config.get("short_conv_kernel_size", 4))
    tables["mixer.kda"] = {**delta(heads, width, bound if safe else 0.0), "conv": taps}


def _write(tables: Tables, config: Config) -> None:
    write_experts("num_expert_group", "num_shared_experts")(tables, config)
    kda = tables["mixer.kda"]
    config |= {
        "q_lora_rank": config["q_lora_rank"] or None,
        "first_k_dense_replace": tables["moe"]["first_dense_layers"],
        "kda_safe_gate": kda["decay_bound"] < 0,
        "kda_lower_bound": kda["decay_bound"] or -5.0,
        "linear_num_heads": kda["heads"],
        "linear_conv_kernel_dim": kda["conv"],
        "short_conv_kernel_size": kda["conv"],
        **dict.fromkeys(("head_dim", "linear_head_dim"), kda["head_dim"]),
    }


PUBLISHED = Architecture(
    name="BailingHybridForCausalLM",
    model_type="bailing_hybrid",
    keys=KIMI,
    names=NAMES,
    defaults={
        **MODEL_DEFAULTS,
        "model_max_length": 262144,
        "routed_scaling_factor": 2.5,
        "moe_renormalize": True,
        "q_lora_rank": 0,
    },
    fixed={**MODEL_FIXED, "attention_bias": False, "score_function": "sigmoid"},
    implied={"mixer.mla.rope": True, "mixer.mla.output_gate": "head", **SIGMOID_IMPLIED},
    read=_read,
    write=_write,
    synonyms=KIMI_SYNONYMS,
    aliases=("BailingMoeV3ForCausalLM",),
    ignored=(r"model\.layers\.{beyond}\..*",),
    layers={"linear_attention": "kda"},
    layer_types=_layer_types,
    rope_ignored=("partial_rotary_factor",),  # what is rotated of a latent head has a width of its own
    float32=(
        BIAS,
        "layers.{layer}.ffn.router.weight",
        *(f"{OURS}.decay.{name}" for name in ("A_log", "dt_bias")),
        *(f"{OURS}.convs.{part}.weight" for part in "qkv"),
    ),
)

FAMILIES.add(
    "bailing_hybrid",
    Family(
        name="bailing_hybrid",
        attention="mla",
        common={
            "mixer": "kda",
            "layout": "LLLLLN",
            "max_length": 262144,
            "rope_theta": 6e6,
            "norm_eps": 1e-6,
            "tie_embeddings": False,
            "init_std": 0.02,
        },
        options={"output_gate": "head"},
        presets=PRESETS,
        published=(PUBLISHED,),
    ),
)
