"""Every preset is the published architecture of its family, written as config.json and read again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from torchlinearmoe import FAMILIES
from torchlinearmoe.checkpoint.huggingface.config import read_recipe, write_config
from torchlinearmoe.recipe import ModelRecipe, resolve

PRESETS = [(family, size) for family in FAMILIES for size in FAMILIES[family].presets]
UNPUBLISHED = {("qwen2", "debug"), ("qwen2", "A0.3B"), ("qwen2", "A1B")}
"""Experts without a shared one, which Qwen2-MoE always has."""


def model_of(family: str, size: str, **changes: Any) -> ModelRecipe:
    moe, mixer = changes.pop("moe", {}), changes.pop("mixer", {})
    own = FAMILIES[family].common.get("layout") is not None
    model = {"family": family, "size": size, **({} if own else {"layout": "N"}), **changes}
    return resolve({"model": model, "moe": moe, "mixer": mixer, "training": {"steps": 1}}).model


@pytest.mark.parametrize(("family", "size"), PRESETS)
def test_a_preset_is_the_same_model_after_config_json(family: str, size: str) -> None:
    model = model_of(family, size)
    config = write_config(model)
    if (family, size) in UNPUBLISHED:
        assert config is None
        return
    assert config is not None
    again = read_recipe(Path(), json.loads(json.dumps(config))).model
    assert (again.size, again.moe.num_experts, again.num_layers) == (size, model.moe.num_experts, model.num_layers)
    for key, value in vars(model).items():
        if key not in ("mixer", "moe") and not (key.startswith("rope_") and model.rope_scaling == "none"):
            assert getattr(again, key) == value, key


@pytest.mark.parametrize(
    "changes",
    [
        {"layout": "LN"},
        {"norm_offset": 1.0},
        {"norm_placement": "post"},
        {"attention_norm_placement": "stream"},
        {"attention_scales": [2.0, 1.0]},
        {"ffn_scales": [1.0, 0.5]},
        {"embed_scale": 2.0},
        {"residual_scale": 0.5},
        {"logit_divisor": 2.0},
        {"mixer": {"softmax_attention": {"scale": 0.5}}},
        {"moe": {"score": "sigmoid"}},
        {"moe": {"selection_bias": True}},
        {"moe": {"balance": "bias"}},
        {"moe": {"eval_capacity_factor": 2.0}},
        {"moe": {"renormalize": False}},
        {"moe": {"routed_scaling": 2.0}},
        {"moe": {"num_groups": 4, "top_k_groups": 2}},
        {"moe": {"first_dense_layers": 1}},
        {"moe": {"shared_hidden_size": 32}},
        {"moe": {"num_experts": 0}},
        {"mixer": {"softmax_attention": {"qkv_bias": True}}},
        {"mixer": {"softmax_attention": {"qk_norm": "full"}}},
    ],
)
def test_a_model_that_no_key_describes_is_not_written_as_another(changes: dict[str, Any]) -> None:
    assert write_config(model_of("mixtral", "debug", **changes)) is None
    assert write_config(model_of("mixtral", "debug")) is not None


@pytest.mark.parametrize(
    "changes",
    [
        {"moe": {"shared_hidden_size": 0}},
        {"moe": {"shared_hidden_size": 48}},
        {"moe": {"shared_gate": True}},
        {"moe": {"renormalize": True}},
        {"moe": {"num_experts": 0}},
        {"layout": "LN"},
        {"mixer": {"mla": {"output_gate": "head"}}},
    ],
)
def test_a_latent_model_that_no_key_describes_is_not_written_as_another(changes: dict[str, Any]) -> None:
    assert write_config(model_of("deepseek_v2", "debug", **changes)) is None
    assert write_config(model_of("deepseek_v2", "debug")) is not None


LITE: dict[str, Any] = {
    "architectures": ["DeepseekV2ForCausalLM"],
    "attention_bias": False,
    "aux_loss_alpha": 0.001,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 10944,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "moe_intermediate_size": 1408,
    "moe_layer_freq": 1,
    "n_group": 1,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "norm_topk_prob": False,
    "num_attention_heads": 16,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 27,
    "num_key_value_heads": 16,
    "q_lora_rank": None,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 0.707,
        "mscale_all_dim": 0.707,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 1.0,
    "scoring_func": "softmax",
    "seq_aux": True,
    "tie_word_embeddings": False,
    "topk_group": 1,
    "topk_method": "greedy",
    "v_head_dim": 128,
    "vocab_size": 102400,
}
"""What describes the model in the `config.json` of DeepSeek-V2-Lite, older than `rope_parameters`."""


def test_the_config_of_deepseek_v2_lite_is_the_preset() -> None:
    model = read_recipe(Path(), LITE).model
    preset = write_config(model_of("deepseek_v2", "A2.4B", init_std=0.02, moe={"balance_coefficient": 0.001}))
    assert write_config(model) == preset and model.mixer_options["mla"].q_lora_rank == 0
    compressed = {key: value for key, value in LITE.items() if key != "q_lora_rank"}
    assert read_recipe(Path(), compressed).model.mixer_options["mla"].q_lora_rank == 1536
