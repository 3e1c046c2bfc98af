"""GLM-4.5 and its successors: GQA whose heads are rotated by half, DeepSeek-V3's router (arXiv 2508.06471).

Sizes: `A12B` is GLM-4.5-Air (106B), `A32B` GLM-4.5, 4.6 and 4.7 (355B), whose queries and keys are normed, and `debug`.
Layers behind the last one, which predict further tokens, are left out.
"""

from __future__ import annotations

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
    Tables,
    experts,
    swiglu,
)
from torchlinearmoe.families.sigmoid_routing import (
    BIAS,
    COUNTED,
    SIGMOID,
    SIGMOID_IMPLIED,
    read_experts,
    sigmoid_router,
    write_experts,
)

PRESETS = {
    "debug": (
        model_size(64, 4, 4, 2, 160, 1024, head_dim=16, max_length=1024, rope_theta=1e4),
        moe_size(4, 2, 32, shared_hidden_size=32, routed_scaling=2.5, first_dense_layers=1, **SIGMOID),
        {"qk_norm": "head", "rotary_dim": 8},
    ),
    "A12B": (
        model_size(4096, 46, 96, 8, 10944, 151552, head_dim=128),
        moe_size(128, 8, 1408, shared_hidden_size=1408, first_dense_layers=1, **SIGMOID),
        {"rotary_dim": 64},
    ),
    "A32B": (
        model_size(5120, 92, 96, 8, 12288, 151552, head_dim=128),
        moe_size(160, 8, 1536, shared_hidden_size=1536, routed_scaling=2.5, first_dense_layers=3, **SIGMOID),
        {"qk_norm": "head", "rotary_dim": 64},
    ),
}


def _read(config: Config, tables: Tables) -> None:
    read_experts(config, tables, "n_group", "n_shared_experts", 1, 1, 1)
    tables["mixer.softmax_attention"]["qk_norm"] = "head" if config.get("use_qk_norm") else "none"


def _write(tables: Tables, config: Config) -> None:
    write_experts("n_group", "n_shared_experts")(tables, config)
    config["use_qk_norm"] = tables["mixer.softmax_attention"]["qk_norm"] == "head"


PUBLISHED = Architecture(
    name="Glm4MoeForCausalLM",
    model_type="glm4_moe",
    keys={
        **MODEL_KEYS,
        "attention_bias": "mixer.softmax_attention.qkv_bias",
        **COUNTED,
    },
    names=(
        *OUTER,
        *ATTENTION,
        *HEAD_NORMS,
        *swiglu("ffn", "mlp"),
        *sigmoid_router("mlp"),
        *experts("mlp.experts", "gate_proj", "up_proj", "down_proj"),
        *swiglu("ffn.shared", "mlp.shared_experts"),
    ),
    defaults={
        **MODEL_DEFAULTS,
        "rms_norm_eps": 1e-5,
        "attention_bias": False,
        "first_k_dense_replace": 1,
        "routed_scaling_factor": 1.0,
        "norm_topk_prob": True,
    },
    fixed=MODEL_FIXED,
    implied=SIGMOID_IMPLIED,
    read=_read,
    write=_write,
    ignored=(r"model\.layers\.{beyond}\..*",),
    rotary=("mixer.softmax_attention.rotary_dim", 0.5),
    float32=(BIAS,),
)

FAMILIES.add(
    "glm4_moe",
    Family(
        name="glm4_moe",
        attention="softmax_attention",
        common={
            "max_length": 131072,
            "rope_theta": 1e6,
            "norm_eps": 1e-5,
            "tie_embeddings": False,
            "init_std": 0.02,
        },
        options={"qkv_bias": True},
        presets=PRESETS,
        published=(PUBLISHED,),
    ),
)
