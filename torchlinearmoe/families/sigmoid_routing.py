"""What published models with DeepSeek-V3's router have in common: groups, experts and shared experts in `config.json`.

A router with one group has none here. Its correction bias is read and kept, whatever `moe.balance` says.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torchlinearmoe.errors import RecipeError
from torchlinearmoe.families.huggingface import LATENT_KEYS, MODEL_KEYS, Config, Name, Tables

SIGMOID_IMPLIED = {"moe.score": "sigmoid", "moe.selection_bias": True, "moe.shared_gate": False}
SIGMOID = {"score": "sigmoid", "selection_bias": True, "renormalize": True}
"""The same of a size's `[moe]`, whose weights are rescaled in all releases."""
BIAS = "layers.{layer}.ffn.router.expert_bias"
COUNTED = {
    "intermediate_size": "model.ffn_hidden_size",
    "first_k_dense_replace": "moe.first_dense_layers",
    "n_routed_experts": "moe.num_experts",
    "num_experts_per_tok": "moe.top_k",
    "moe_intermediate_size": "moe.hidden_size",
    "routed_scaling_factor": "moe.routed_scaling",
    "norm_topk_prob": "moe.renormalize",
}
"""Keys of DeepSeek-V3 and GLM-4.5."""
KIMI = {
    **{key: ours for key, ours in MODEL_KEYS.items() if key not in ("head_dim", "max_position_embeddings")},
    "model_max_length": "model.max_length",
    "intermediate_size": "model.ffn_hidden_size",
    "num_experts": "moe.num_experts",
    "num_experts_per_token": "moe.top_k",
    "moe_intermediate_size": "moe.hidden_size",
    "routed_scaling_factor": "moe.routed_scaling",
    "moe_renormalize": "moe.renormalize",
    **LATENT_KEYS,
}
"""Keys of Kimi Linear and Ling 3."""
KIMI_SYNONYMS = {
    "max_position_embeddings": "model_max_length",
    "norm_topk_prob": "moe_renormalize",
    "n_group": "num_expert_group",
    "num_local_experts": "num_experts",
    "num_experts_per_tok": "num_experts_per_token",
    "n_shared_experts": "num_shared_experts",
}
"""What transformers calls the same."""


def sigmoid_router(theirs: str) -> tuple[Name, ...]:
    """The router's tensors, `theirs` being where its experts live."""
    path = f"model.layers.{{layer}}.{theirs}.gate"
    return (
        Name("layers.{layer}.ffn.router.weight", f"{path}.weight"),
        Name(BIAS, f"{path}.e_score_correction_bias"),
    )


def grouped(groups: int, chosen: int) -> dict[str, Any]:
    """Groups that score as their two best experts."""
    return {"num_groups": groups, "top_k_groups": chosen, "group_score": "top2"}


def read_experts(
    config: Config, tables: Tables, groups_key: str, shared_key: str, groups: int, chosen: int, shared: int
) -> None:
    """Groups and shared experts by their keys, and what is meant where these are missing."""
    moe = tables["moe"]
    counts = {groups_key: groups, "topk_group": chosen, shared_key: shared}
    found = {key: missing if config.get(key) is None else config[key] for key, missing in counts.items()}
    for key, value in (*found.items(), ("moe_intermediate_size", moe["hidden_size"])):
        if type(value) is not int:
            raise RecipeError(f"{key} = {value!r}: must be a whole number")
    moe["shared_hidden_size"] = moe["hidden_size"] * found[shared_key]
    within = found[groups_key] > 1
    moe["num_groups"] = found[groups_key] if within else 0
    moe["top_k_groups"] = found["topk_group"] if within else 0
    moe["group_score"] = "top2" if within else "max"


def read_dense_layers(config: Config, tables: Tables, usual: int) -> None:
    """The dense layers at the bottom, listed layer by layer or counted; `usual` of them where nothing is said."""
    dense, kinds = config.get("first_k_dense_replace", usual), config.get("mlp_layer_types")
    if isinstance(kinds, list):
        dense = kinds.count("dense")
        if kinds != ["dense"] * dense + ["sparse"] * (len(kinds) - dense):
            raise RecipeError("mlp_layer_types: only the first layers may be dense")
    tables["moe"]["first_dense_layers"] = dense


def write_experts(groups_key: str, shared_key: str) -> Callable[[Tables, Config], None]:
    """The same the other way."""

    def write(tables: Tables, config: Config) -> None:
        moe = tables["moe"]
        shared, rest = divmod(moe["shared_hidden_size"], moe["hidden_size"])
        if rest or not shared:
            raise RecipeError("moe.shared_hidden_size: not a number of experts")
        config |= {
            shared_key: shared,
            groups_key: moe["num_groups"] or 1,
            "topk_group": moe["top_k_groups"] or 1,
            "num_nextn_predict_layers": 0,
        }

    return write
