"""Qwen3 and Qwen3-MoE: GQA with a norm on each head's queries and keys, RMSNorm, SwiGLU (arXiv 2505.09388).

Sizes: the released dense models, the mixtures `A3B` (30B) and `A22B` (235B), `A35B` (Qwen3-Coder-480B), and `debug`. A
token's chosen probabilities are rescaled to sum to one; there is no shared expert.
"""

from __future__ import annotations

from typing import Any

from torchlinearmoe.families.base import FAMILIES, Family, model_size, moe_size, plain
from torchlinearmoe.families.huggingface import (
    ATTENTION,
    HEAD_NORMS,
    MODEL_DEFAULTS,
    MODEL_FIXED,
    MODEL_KEYS,
    OUTER,
    Architecture,
    Name,
    experts,
    swiglu,
)
from torchlinearmoe.families.pooled_balance import read_pooled_balance, write_pooled_balance


def _dense(width: int, layers: int, heads: int, ffn: int, **more: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    return model_size(width, layers, heads, 8, ffn, 151936, head_dim=128, **more), {}


def _sparse(number: int, hidden: int) -> dict[str, Any]:
    return moe_size(number, 8, hidden, renormalize=True)


PRESETS = {
    "debug": (
        model_size(64, 4, 4, 2, 160, 1024, max_length=1024, rope_theta=1e4),
        moe_size(4, 2, 64, renormalize=True),
    ),
    "0.6B": _dense(1024, 28, 16, 3072, tie_embeddings=True),
    "1.7B": _dense(2048, 28, 16, 6144, tie_embeddings=True),
    "4B": _dense(2560, 36, 32, 9728, tie_embeddings=True),
    "8B": _dense(4096, 36, 32, 12288),
    "14B": _dense(5120, 40, 40, 17408),
    "32B": _dense(5120, 64, 64, 25600),
    "A3B": (model_size(2048, 48, 32, 4, 6144, 151936, head_dim=128), _sparse(128, 768)),
    "A22B": (model_size(4096, 94, 64, 4, 12288, 151936, head_dim=128), _sparse(128, 1536)),
    "A35B": (
        model_size(6144, 62, 96, 8, 8192, 151936, head_dim=128, max_length=262144, rope_theta=1e7),
        _sparse(160, 2560),
    ),
}

FIXED = {**MODEL_FIXED, "use_sliding_window": False, "attention_bias": False}
ALWAYS = {"mixer.softmax_attention.qk_norm": "head"}
DENSE_MODEL = Architecture(
    name="Qwen3ForCausalLM",
    model_type="qwen3",
    keys={**MODEL_KEYS, "intermediate_size": "model.ffn_hidden_size"},
    names=(*OUTER, *ATTENTION, *HEAD_NORMS, *swiglu("ffn", "mlp")),
    defaults={**MODEL_DEFAULTS, "head_dim": 128},
    fixed=FIXED,
    implied={**ALWAYS, **{f"moe.{key}": value for key, value in plain("moe").items()}},
)
MOE_MODEL = Architecture(
    name="Qwen3MoeForCausalLM",
    model_type="qwen3_moe",
    keys={
        **MODEL_KEYS,
        "intermediate_size": "model.ffn_hidden_size",
        "num_experts": "moe.num_experts",
        "num_experts_per_tok": "moe.top_k",
        "moe_intermediate_size": "moe.hidden_size",
        "norm_topk_prob": "moe.renormalize",
        "router_aux_loss_coef": "moe.balance_coefficient",
    },
    names=(
        *OUTER,
        *ATTENTION,
        *HEAD_NORMS,
        Name("layers.{layer}.ffn.router.weight", "model.layers.{layer}.mlp.gate.weight"),
        *experts("mlp.experts", "gate_proj", "up_proj", "down_proj"),
    ),
    defaults={**MODEL_DEFAULTS, "norm_topk_prob": False, "router_aux_loss_coef": 0.001},
    fixed={**FIXED, "decoder_sparse_step": 1, "mlp_only_layers": []},
    implied={**ALWAYS, "moe.shared_hidden_size": 0, "moe.shared_gate": False},
    read=read_pooled_balance,
    write=write_pooled_balance,
    synonyms={"num_local_experts": "num_experts"},
)

FAMILIES.add(
    "qwen3",
    Family(
        name="qwen3",
        attention="softmax_attention",
        common={
            "max_length": 40960,
            "rope_theta": 1e6,
            "norm_eps": 1e-6,
            "tie_embeddings": False,
            "init_std": 0.02,
        },
        options={"qk_norm": "head"},
        presets=PRESETS,
        published=(DENSE_MODEL, MOE_MODEL),
    ),
)
