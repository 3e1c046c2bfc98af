"""DeepSeek-V2: latent attention (MLA), YaRN, fine-grained experts beside shared ones, a dense first layer.

Sizes: `A2.4B` is DeepSeek-V2-Lite and `A21B` DeepSeek-V2 (arXiv 2405.04434, section 3.1.2 and appendix B), and `debug`.
The shared experts are one SwiGLU of their summed width, ungated. The large model compresses queries, sends a token to
experts of three of eight groups and multiplies their weights by 16; neither rescales the chosen probabilities.
"""

from __future__ import annotations

from typing import Any

from torchlinearmoe.models.families.base import FAMILIES, Family, model_size, moe_size


def _yarn(factor: float, original: int) -> dict[str, Any]:
    return {
        "max_length": int(factor * original),
        "rope_scaling": "yarn",
        "rope_factor": factor,
        "rope_original_length": original,
        "rope_mscale": 0.707,
        "rope_mscale_all_dim": 0.707,
    }


def _mla(head_dim: int, rope: int, latent: int, query_latent: int) -> dict[str, int]:
    return {
        "head_dim": head_dim,
        "qk_rope_head_dim": rope,
        "v_head_dim": head_dim,
        "kv_lora_rank": latent,
        "q_lora_rank": query_latent,
    }


PRESETS = {
    "debug": (
        model_size(64, 4, 4, 4, 160, 1024, rope_theta=1e3, init_std=0.02, **_yarn(4.0, 256)),
        moe_size(8, 2, 32, shared_hidden_size=64, num_groups=4, top_k_groups=2, first_dense_layers=1),
        _mla(16, 8, 32, 24),
    ),
    "A2.4B": (
        model_size(2048, 27, 16, 16, 10944, 102400, **_yarn(40.0, 4096)),
        moe_size(64, 6, 1408, shared_hidden_size=2 * 1408, first_dense_layers=1),
        _mla(128, 64, 512, 0),
    ),
    "A21B": (
        model_size(5120, 60, 128, 128, 12288, 102400, **_yarn(40.0, 4096)),
        moe_size(
            160,
            6,
            1536,
            shared_hidden_size=2 * 1536,
            num_groups=8,
            top_k_groups=3,
            routed_scaling=16.0,
            first_dense_layers=1,
        ),
        _mla(128, 64, 512, 1536),
    ),
}

FAMILIES.add(
    "deepseek_v2",
    Family(
        name="deepseek_v2",
        attention="mla",
        common={
            "rope_theta": 1e4,
            "norm_eps": 1e-6,
            "qkv_bias": False,
            "tie_embeddings": False,
            "init_std": 0.006,
        },
        presets=PRESETS,
    ),
)
