"""Qwen2 and Qwen2-MoE: GQA with biases on q, k and v, RMSNorm, SwiGLU, a sigmoid-gated shared expert.

Sizes: the Linear-MoE presets A0.3B-2B and A1B-7B (arXiv 2503.05447, table 2), the published Qwen2 models
(arXiv 2407.10671, tables 1 and 2), and `debug`. Routing follows Qwen2-MoE: softmax over all experts, the chosen
probabilities not rescaled.
"""

from __future__ import annotations

from typing import Any

from torchlinearmoe.models.families.base import FAMILIES, Family


def _moe(experts: int, top_k: int, hidden: int, shared: int = 0) -> dict[str, Any]:
    return {
        "num_experts": experts,
        "top_k": top_k,
        "hidden_size": hidden,
        "shared_hidden_size": shared,
        "shared_gate": shared > 0,
    }


def _size(width: int, layers: int, heads: int, kv_heads: int, ffn: int, vocab: int, **more: Any) -> dict[str, Any]:
    return {
        "hidden_size": width,
        "num_layers": layers,
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "ffn_hidden_size": ffn,
        "vocab_size": vocab,
        **more,
    }


PRESETS = {
    "debug": (_size(64, 4, 4, 2, 160, 1024, max_length=1024, rope_theta=1e4, init_std=0.02), _moe(4, 2, 64)),
    "0.5B": (_size(896, 24, 14, 2, 4864, 151936, tie_embeddings=True), {}),
    "1.5B": (_size(1536, 28, 12, 2, 8960, 151936, tie_embeddings=True), {}),
    "7B": (_size(3584, 28, 28, 4, 18944, 152064), {}),
    "72B": (_size(8192, 80, 64, 8, 29568, 152064, norm_eps=1e-5), {}),
    "A0.3B": (_size(1024, 12, 8, 8, 896, 151936, rope_theta=1e4), _moe(64, 8, 896)),
    "A1B": (_size(2048, 16, 16, 16, 1024, 151936, rope_theta=1e4), _moe(64, 8, 1024)),
    "A14B": (_size(3584, 28, 28, 4, 18944, 151936), _moe(64, 8, 2560, shared=20480)),
}

FAMILIES.add(
    "qwen2",
    Family(
        name="qwen2",
        attention="softmax_attention",
        common={
            "max_length": 131072,
            "rope_theta": 1e6,
            "norm_eps": 1e-6,
            "qkv_bias": True,
            "tie_embeddings": False,
            "init_std": 0.02,
        },
        presets=PRESETS,
    ),
)
