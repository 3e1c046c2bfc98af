"""DeepSeek-V2: latent attention (MLA), YaRN, fine-grained experts beside shared ones, a dense first layer.

Sizes: `A2.4B` is DeepSeek-V2-Lite and `A21B` DeepSeek-V2 (arXiv 2405.04434, section 3.1.2 and appendix B), and `debug`.
The shared experts are one SwiGLU of their summed width, ungated. The large model compresses queries, sends a token to
experts of three of eight groups and multiplies their weights by 16; neither rescales the chosen probabilities.
"""

from __future__ import annotations

from typing import Any

from torchlinearmoe.errors import RecipeError
from torchlinearmoe.families.base import FAMILIES, Family, model_size, moe_size
from torchlinearmoe.families.huggingface import (
    LATENT,
    LATENT_KEYS,
    MODEL_DEFAULTS,
    MODEL_FIXED,
    MODEL_KEYS,
    OUTER,
    Architecture,
    Config,
    Name,
    Tables,
    experts,
    swiglu,
)


def yarn(factor: float, original: int, mscale: float) -> dict[str, Any]:
    """`[model]` of a context `factor` times the `original` one, its attention sharpened by `mscale` in both places."""
    return {
        "max_length": int(factor * original),
        "rope_scaling": "yarn",
        "rope_factor": factor,
        "rope_original_length": original,
        "rope_mscale": mscale,
        "rope_mscale_all_dim": mscale,
    }


def latent_heads(head_dim: int, rope: int, latent: int, query_latent: int) -> dict[str, int]:
    """`[mixer.mla]` of a preset."""
    return {
        "head_dim": head_dim,
        "qk_rope_head_dim": rope,
        "v_head_dim": head_dim,
        "kv_lora_rank": latent,
        "q_lora_rank": query_latent,
    }


PRESETS = {
    "debug": (
        model_size(64, 4, 4, 4, 160, 1024, rope_theta=1e3, init_std=0.02, **yarn(4.0, 256, 0.707)),
        moe_size(8, 2, 32, shared_hidden_size=64, num_groups=4, top_k_groups=2, first_dense_layers=1),
        latent_heads(16, 8, 32, 24),
    ),
    "A2.4B": (
        model_size(2048, 27, 16, 16, 10944, 102400, **yarn(40.0, 4096, 0.707)),
        moe_size(64, 6, 1408, shared_hidden_size=2 * 1408, first_dense_layers=1),
        latent_heads(128, 64, 512, 0),
    ),
    "A21B": (
        model_size(5120, 60, 128, 128, 12288, 102400, **yarn(40.0, 4096, 0.707)),
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
        latent_heads(128, 64, 512, 1536),
    ),
}

ROUTING = {"greedy": False, "group_limited_greedy": True}
"""`topk_method`: whether a token chooses groups of experts first."""


def _read(config: Config, tables: Tables) -> None:
    """Shared experts as one, groups only where they are used, queries compressed unless said otherwise."""
    method = config.get("topk_method") or "greedy"
    if not isinstance(method, str) or method not in ROUTING:
        raise RecipeError(f"topk_method = {method!r}: not supported; legal: {', '.join(ROUTING)}")
    moe, grouped = tables["moe"], ROUTING[method]
    shared = config.get("n_shared_experts", 2) or 0
    for key, value in (("n_shared_experts", shared), ("moe_intermediate_size", moe["hidden_size"])):
        if type(value) is not int:
            raise RecipeError(f"{key} = {value!r}: must be a whole number")
    moe["shared_hidden_size"] = moe["hidden_size"] * shared
    if "q_lora_rank" not in config:  # null means without
        tables["mixer.mla"]["q_lora_rank"] = 1536
    moe["num_groups"] = config.get("n_group") if grouped else 0
    moe["top_k_groups"] = config.get("topk_group") if grouped else 0


def _write(tables: Tables, config: Config) -> None:
    moe = tables["moe"]
    grouped = moe["num_groups"] > 0
    shared, rest = divmod(moe["shared_hidden_size"], moe["hidden_size"])
    if rest or not shared:
        raise RecipeError("moe.shared_hidden_size: not a number of experts")
    config |= {
        "q_lora_rank": config["q_lora_rank"] or None,
        "n_shared_experts": shared,
        "topk_method": "group_limited_greedy" if grouped else "greedy",
        "n_group": moe["num_groups"] if grouped else None,
        "topk_group": moe["top_k_groups"] if grouped else None,
    }


PUBLISHED = Architecture(
    name="DeepseekV2ForCausalLM",
    model_type="deepseek_v2",
    keys={
        **{key: target for key, target in MODEL_KEYS.items() if key != "head_dim"},
        "intermediate_size": "model.ffn_hidden_size",
        "first_k_dense_replace": "moe.first_dense_layers",
        "n_routed_experts": "moe.num_experts",
        "num_experts_per_tok": "moe.top_k",
        "moe_intermediate_size": "moe.hidden_size",
        "routed_scaling_factor": "moe.routed_scaling",
        "aux_loss_alpha": "moe.balance_coefficient",
        **LATENT_KEYS,
    },
    names=(
        *OUTER,
        *LATENT,
        *swiglu("ffn", "mlp"),
        Name("layers.{layer}.ffn.router.weight", "model.layers.{layer}.mlp.gate.weight"),
        *experts("mlp.experts", "gate_proj", "up_proj", "down_proj"),
        *swiglu("ffn.shared", "mlp.shared_experts"),
    ),
    defaults={
        **MODEL_DEFAULTS,
        "first_k_dense_replace": 0,
        "routed_scaling_factor": 1.0,
        "aux_loss_alpha": 0.001,
        "q_lora_rank": 0,
    },
    fixed={
        **MODEL_FIXED,
        "attention_bias": False,
        "mlp_bias": False,
        "norm_topk_prob": False,
        "scoring_func": "softmax",
        "moe_layer_freq": 1,
        "rope_interleave": True,
    },
    implied={"moe.renormalize": False, "moe.shared_gate": False},
    read=_read,
    write=_write,
)

FAMILIES.add(
    "deepseek_v2",
    Family(
        name="deepseek_v2",
        attention="mla",
        common={
            "rope_theta": 1e4,
            "norm_eps": 1e-6,
            "tie_embeddings": False,
            "init_std": 0.006,
        },
        presets=PRESETS,
        published=(PUBLISHED,),
    ),
)
