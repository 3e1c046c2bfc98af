"""Llama 3: dense, GQA, RMSNorm, SwiGLU (arXiv 2407.21783); from 3.1 on with scaled rotary frequencies.

Sizes: `8B` and `70B` are Llama 3; `3.1-8B` and `3.1-70B`, their successors, have contexts of 131,072 tokens; `1B` and
`3B` are Llama 3.2; `0.3B` is the Linear-MoE preset (arXiv 2503.05447). Where its presets of published sizes deviate (a
head of its own at 1B, feed-forwards of 8192 at 8B), the published models are taken.
"""

from __future__ import annotations

from typing import Any

from torchlinearmoe.families.base import FAMILIES, Family, model_size, plain
from torchlinearmoe.families.huggingface import (
    ATTENTION,
    MODEL_DEFAULTS,
    MODEL_FIXED,
    MODEL_KEYS,
    OUTER,
    Architecture,
    swiglu,
)


def _scaled(factor: float) -> dict[str, Any]:
    return {
        "max_length": 131072,
        "rope_scaling": "llama3",
        "rope_factor": factor,
        "rope_original_length": 8192,
        "rope_beta_slow": 1.0,
        "rope_beta_fast": 4.0,
    }


PRESETS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "debug": (model_size(64, 4, 4, 2, 160, 1024, max_length=1024, rope_theta=1e4), {}),
    "0.3B": (model_size(1024, 12, 32, 8, 4096, 128256, max_length=131072), {}),
    "1B": (model_size(2048, 16, 32, 8, 8192, 128256, tie_embeddings=True, **_scaled(32.0)), {}),
    "3B": (model_size(3072, 28, 24, 8, 8192, 128256, tie_embeddings=True, **_scaled(32.0)), {}),
    "8B": (model_size(4096, 32, 32, 8, 14336, 128256), {}),
    "70B": (model_size(8192, 80, 64, 8, 28672, 128256), {}),
    "3.1-8B": (model_size(4096, 32, 32, 8, 14336, 128256, **_scaled(8.0)), {}),
    "3.1-70B": (model_size(8192, 80, 64, 8, 28672, 128256, **_scaled(8.0)), {}),
}

PUBLISHED = Architecture(
    name="LlamaForCausalLM",
    model_type="llama",
    keys={**MODEL_KEYS, "intermediate_size": "model.ffn_hidden_size"},
    names=(*OUTER, *ATTENTION, *swiglu("ffn", "mlp")),
    defaults=MODEL_DEFAULTS,
    fixed={**MODEL_FIXED, "attention_bias": False, "mlp_bias": False},
    implied={**{f"moe.{key}": value for key, value in plain("moe").items()}},
)

FAMILIES.add(
    "llama3",
    Family(
        name="llama3",
        attention="softmax_attention",
        common={
            "max_length": 8192,
            "rope_theta": 5e5,
            "norm_eps": 1e-5,
            "tie_embeddings": False,
            "init_std": 0.02,
        },
        presets=PRESETS,
        published=(PUBLISHED,),
    ),
)
