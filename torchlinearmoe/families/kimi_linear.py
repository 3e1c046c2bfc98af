"""Kimi Linear: three layers of Kimi Delta Attention, one of latent attention without positions (arXiv 2510.26692).

Sizes: `A3B` is Kimi-Linear-48B-A3B, and `debug`. The router is DeepSeek-V3's, the first layer dense. In the published
model the gate of the linear layers has no bias, and `head_dim` means nothing.
"""

from __future__ import annotations

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
    read_dense_layers,
    read_experts,
    sigmoid_router,
    write_experts,
)

PRESETS = {
    "debug": (
        model_size(64, 4, 4, 4, 160, 1024, max_length=1024, rope_theta=1e4),
        moe_size(8, 2, 32, shared_hidden_size=32, routed_scaling=2.446, first_dense_layers=1, **SIGMOID),
        {"head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16, "kv_lora_rank": 32},
        {"heads": 4, "head_dim": 16, "gate_bias": False},
    ),
    "A3B": (
        model_size(2304, 27, 32, 32, 9216, 163840, layout="LLLN" * 6 + "LLN"),
        moe_size(256, 8, 1024, shared_hidden_size=1024, routed_scaling=2.446, first_dense_layers=1, **SIGMOID),
        {"head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "kv_lora_rank": 512},
        {"heads": 32, "head_dim": 128, "gate_bias": False},
    ),
}

LINEAR = "linear_attn_config"
OURS, THEIRS = "layers.{layer}.mixer", "model.layers.{layer}.self_attn"
DELTA = {
    **{f"{part}_proj.weight": f"{part}_proj.weight" for part in "qkvbo"},
    "decay_down.weight": "f_a_proj.weight",
    "decay_up.weight": "f_b_proj.weight",
    "decay.dt_bias": "dt_bias",
    "gate_down.weight": "g_a_proj.weight",
    "gate_up.weight": "g_b_proj.weight",
    "norm.weight": "o_norm.weight",
}
DELTA_NAMES = (
    *(Name(f"{OURS}.{ours}", f"{THEIRS}.{theirs}") for ours, theirs in DELTA.items()),
    Name(f"{OURS}.decay.A_log", f"{THEIRS}.A_log", axes=(None, None, 0, None)),
    *(Name(f"{OURS}.convs.{part}.weight", f"{THEIRS}.{part}_conv1d.weight", axes=(0, None, 1)) for part in "qkv"),
)
OPTIONS = {"head_dim": ("linear_head_dim", 128), "num_heads": ("linear_num_heads", 32)}
OPTIONS |= {"short_conv_kernel_size": ("linear_conv_kernel_dim", 4)}
"""Keys of `linear_attn_config`, what transformers calls them beside it, and their defaults."""


def _linear(config: Config) -> Config:
    linear = config.get(LINEAR) or {}
    if not isinstance(linear, dict):
        raise RecipeError(f"{LINEAR} = {linear!r}: must be an object")
    return linear


def _layer_types(config: Config) -> list[str]:
    """Layers are counted from one there."""
    layers, full = config.get("num_hidden_layers"), _linear(config).get("full_attn_layers")
    if type(layers) is not int or layers < 1:
        raise RecipeError(f"num_hidden_layers = {layers!r}: must be a whole number above 0")
    if not isinstance(full, list):
        raise RecipeError(f"{LINEAR}.full_attn_layers = {full!r}: must be a list of layers, the first one being 1")
    return ["full_attention" if layer in full else "linear_attention" for layer in range(1, min(layers, 2**12) + 1)]


def _read(config: Config, tables: Tables) -> None:
    read_experts(config, tables, "num_expert_group", "num_shared_experts", 1, 1, 1)
    linear = _linear(config)
    width, heads, taps = (linear.get(key, config.get(other, usual)) for key, (other, usual) in OPTIONS.items())
    tables["mixer.kda"] = {"heads": heads, "head_dim": width, "conv": taps, "gate_bias": False}
    read_dense_layers(config, tables, 1)


def _write(tables: Tables, config: Config) -> None:
    write_experts("num_expert_group", "num_shared_experts")(tables, config)
    kda, layers = tables["mixer.kda"], config["layer_types"]
    config |= {
        "q_lora_rank": config["q_lora_rank"] or None,
        "first_k_dense_replace": tables["moe"]["first_dense_layers"],
        LINEAR: {
            "full_attn_layers": [n for n, kind in enumerate(layers, 1) if kind == "full_attention"],
            "kda_layers": [n for n, kind in enumerate(layers, 1) if kind != "full_attention"],
            "head_dim": kda["head_dim"],
            "num_heads": kda["heads"],
            "short_conv_kernel_size": kda["conv"],
        },
    }


PUBLISHED = Architecture(
    name="KimiLinearForCausalLM",
    model_type="kimi_linear",
    keys=KIMI,
    names=(
        *OUTER,
        *of_mixer("mla", LATENT),
        *of_mixer("kda", DELTA_NAMES),
        *swiglu("ffn", "mlp"),
        *sigmoid_router("block_sparse_moe"),
        *experts("block_sparse_moe.experts", "w1", "w3", "w2"),
        *swiglu("ffn.shared", "block_sparse_moe.shared_experts"),
    ),
    defaults={
        **MODEL_DEFAULTS,
        "rms_norm_eps": 1e-5,
        "model_max_length": 1048576,
        "routed_scaling_factor": 2.446,
        "moe_renormalize": True,
        "q_lora_rank": 0,
    },
    fixed={
        **MODEL_FIXED,
        "attention_bias": False,
        "moe_router_activation_func": "sigmoid",
        "moe_layer_freq": 1,
        "mla_use_nope": True,
    },
    implied={"mixer.mla.rope": False, **SIGMOID_IMPLIED},
    read=_read,
    write=_write,
    synonyms=KIMI_SYNONYMS,
    spellings=(swiglu("ffn", "block_sparse_moe"),),
    layers={"linear_attention": "kda"},
    layer_types=_layer_types,
    float32=(BIAS, "layers.{layer}.ffn.router.weight", "layers.{layer}.mixer.decay.dt_bias"),
)

FAMILIES.add(
    "kimi_linear",
    Family(
        name="kimi_linear",
        attention="mla",
        common={
            "mixer": "kda",
            "layout": "LLLN",
            "max_length": 1048576,
            "rope_theta": 1e4,
            "norm_eps": 1e-5,
            "tie_embeddings": False,
            "init_std": 0.02,
        },
        options={"rope": False},
        presets=PRESETS,
        published=(PUBLISHED,),
    ),
)
