"""DeepSeek-V3: latent attention, a sigmoid router whose bias balances, dense first layers (arXiv 2412.19437).

Sizes: `A37B` is DeepSeek-V3 (and R1), `A3B` Moonlight-16B (arXiv 2502.16982), and `debug`. A token chooses experts by
sigmoid and bias, of four of eight groups in the large model, and weighs them by the sigmoids alone, rescaled to one
and multiplied. The released V3 is of 8 bits, which is not read: take a copy in bfloat16. Layers behind the last one,
which predict further tokens, are left out.
"""

from __future__ import annotations

from torchlinearmoe.families.base import FAMILIES, Family, model_size, moe_size
from torchlinearmoe.families.deepseek_v2 import latent_heads, yarn
from torchlinearmoe.families.huggingface import (
    LATENT,
    LATENT_KEYS,
    MODEL_DEFAULTS,
    MODEL_FIXED,
    MODEL_KEYS,
    OUTER,
    Architecture,
    Config,
    Tables,
    experts,
    swiglu,
)
from torchlinearmoe.families.sigmoid_routing import (
    BIAS,
    COUNTED,
    SIGMOID,
    SIGMOID_IMPLIED,
    grouped,
    read_experts,
    sigmoid_router,
    write_experts,
)

PRESETS = {
    "debug": (
        model_size(64, 4, 4, 4, 160, 1024, rope_theta=1e3, **yarn(4.0, 256, 1.0)),
        moe_size(8, 2, 32, shared_hidden_size=32, routed_scaling=2.5, first_dense_layers=1, **SIGMOID, **grouped(4, 2)),
        latent_heads(16, 8, 32, 24),
    ),
    "A3B": (
        model_size(2048, 27, 16, 16, 11264, 163840, max_length=8192, rope_theta=5e4, norm_eps=1e-5),
        moe_size(64, 6, 1408, shared_hidden_size=2 * 1408, routed_scaling=2.446, first_dense_layers=1, **SIGMOID),
        latent_heads(128, 64, 512, 0),
    ),
    "A37B": (
        model_size(7168, 61, 128, 128, 18432, 129280, **yarn(40.0, 4096, 1.0)),
        moe_size(
            256, 8, 2048, shared_hidden_size=2048, routed_scaling=2.5, first_dense_layers=3, **SIGMOID, **grouped(8, 4)
        ),
        latent_heads(128, 64, 512, 1536),
    ),
}


def _read(config: Config, tables: Tables) -> None:
    """Queries are compressed unless said otherwise."""
    read_experts(config, tables, "n_group", "n_shared_experts", 8, 4, 1)
    if "q_lora_rank" not in config:  # null means without
        tables["mixer.mla"]["q_lora_rank"] = 1536


def _write(tables: Tables, config: Config) -> None:
    write_experts("n_group", "n_shared_experts")(tables, config)
    config["q_lora_rank"] = config["q_lora_rank"] or None


PUBLISHED = Architecture(
    name="DeepseekV3ForCausalLM",
    model_type="deepseek_v3",
    keys={
        **{key: target for key, target in MODEL_KEYS.items() if key != "head_dim"},
        **COUNTED,
        **LATENT_KEYS,
    },
    names=(
        *OUTER,
        *LATENT,
        *swiglu("ffn", "mlp"),
        *sigmoid_router("mlp"),
        *experts("mlp.experts", "gate_proj", "up_proj", "down_proj"),
        *swiglu("ffn.shared", "mlp.shared_experts"),
    ),
    defaults={
        **MODEL_DEFAULTS,
        "first_k_dense_replace": 3,
        "routed_scaling_factor": 2.5,
        "norm_topk_prob": True,
        "q_lora_rank": 0,
    },
    fixed={
        **MODEL_FIXED,
        "attention_bias": False,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "moe_layer_freq": 1,
        "rope_interleave": True,
    },
    implied=SIGMOID_IMPLIED,
    read=_read,
    write=_write,
    ignored=(r"model\.layers\.{beyond}\..*",),
    float32=(BIAS,),
)

FAMILIES.add(
    "deepseek_v3",
    Family(
        name="deepseek_v3",
        attention="mla",
        common={
            "rope_theta": 1e4,
            "norm_eps": 1e-6,
            "tie_embeddings": False,
            "init_std": 0.02,
        },
        presets=PRESETS,
        published=(PUBLISHED,),
    ),
)
