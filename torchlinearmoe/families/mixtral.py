"""Mixtral: GQA, RMSNorm, every feed-forward eight SwiGLU experts of which a token takes two (arXiv 2401.04088).

Sizes: the Linear-MoE preset `Small` (arXiv 2503.05447), `7B` (the published 8x7B), `8x22B`, and `debug`. Routing is a
softmax over the two chosen logits.
"""

from __future__ import annotations

from torchlinearmoe.families.base import FAMILIES, Family, model_size, moe_size
from torchlinearmoe.families.huggingface import (
    ATTENTION,
    MODEL_DEFAULTS,
    MODEL_FIXED,
    MODEL_KEYS,
    OUTER,
    Architecture,
    Name,
    experts,
)
from torchlinearmoe.families.pooled_balance import read_pooled_balance, write_pooled_balance


def _eight(hidden: int):
    return moe_size(8, 2, hidden, renormalize=True)


PRESETS = {
    "debug": (
        model_size(64, 4, 4, 2, 160, 1024, max_length=1024, rope_theta=1e4),
        moe_size(4, 2, 64, renormalize=True),
    ),
    "Small": (model_size(1024, 8, 8, 8, 14336, 32000), _eight(14336)),
    "7B": (model_size(4096, 32, 32, 8, 14336, 32000), _eight(14336)),
    "8x22B": (model_size(6144, 56, 48, 8, 16384, 32000, max_length=65536), _eight(16384)),
}

PUBLISHED = Architecture(
    name="MixtralForCausalLM",
    model_type="mixtral",
    keys={
        **MODEL_KEYS,
        "intermediate_size": "moe.hidden_size",
        "num_local_experts": "moe.num_experts",
        "num_experts_per_tok": "moe.top_k",
        "router_aux_loss_coef": "moe.balance_coefficient",
    },
    names=(
        *OUTER,
        *ATTENTION,
        Name("layers.{layer}.ffn.router.weight", "model.layers.{layer}.block_sparse_moe.gate.weight"),
        *experts("block_sparse_moe.experts", "w1", "w3", "w2"),
    ),
    defaults={**MODEL_DEFAULTS, "rms_norm_eps": 1e-5, "router_aux_loss_coef": 0.001},
    fixed={**MODEL_FIXED, "sliding_window": None},
    implied={"moe.renormalize": True, "moe.shared_hidden_size": 0, "moe.shared_gate": False},
    read=read_pooled_balance,
    write=write_pooled_balance,
)

FAMILIES.add(
    "mixtral",
    Family(
        name="mixtral",
        attention="softmax_attention",
        common={
            "max_length": 32768,
            "rope_theta": 1e6,
            "norm_eps": 1e-5,
            "tie_embeddings": False,
            "init_std": 0.02,
        },
        presets=PRESETS,
        published=(PUBLISHED,),
    ),
)
