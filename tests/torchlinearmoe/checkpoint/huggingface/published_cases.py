"""Small random models of the published architectures, as transformers writes them."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

VOCAB = 96
DIMENSIONS: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 128,
    "attn_implementation": "eager",
    "experts_implementation": "eager",
}
EXPERTS: dict[str, Any] = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 24,
}

SCALED: dict[str, Any] = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 24,
}
YARN: dict[str, Any] = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 24}
LATENT: dict[str, Any] = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": 12,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 16,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
}
GROUPS: dict[str, Any] = {
    "topk_method": "group_limited_greedy",
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 2.5,
}
SIGMOID: dict[str, Any] = {
    **{key: value for key, value in LATENT.items() if key != "num_key_value_heads"},
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
    "routed_scaling_factor": 2.5,
}
V3_GROUPS: dict[str, Any] = {"n_group": 4, "topk_group": 2}
PLAIN_EXPERTS: dict[str, Any] = {key: value for key, value in EXPERTS.items() if not key.startswith("shared_")}
HYBRID: dict[str, Any] = {
    **{key: value for key, value in DIMENSIONS.items() if key != "intermediate_size"},
    **EXPERTS,
    "num_hidden_layers": 3,
    "head_dim": 16,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 12,
}
KIMI: dict[str, Any] = {
    **{key: value for key, value in {**DIMENSIONS, **LATENT}.items() if key != "n_routed_experts"},
    "num_hidden_layers": 3,
    "q_lora_rank": None,
    "num_local_experts": 8,
    "n_shared_experts": 1,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "linear_head_dim": 8,
    "linear_num_heads": 4,
    "pad_token_id": None,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
MINIMAX: dict[str, Any] = {
    **DIMENSIONS,
    "num_hidden_layers": 3,
    "num_local_experts": 4,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "linear_attn_alpha_factor": 1.5,
    "linear_attn_beta_factor": 0.75,
    "full_attn_alpha_factor": 3,
    "full_attn_beta_factor": 1.25,
    "mlp_alpha_factor": 2.5,
    "mlp_beta_factor": 0.5,
}
LING: dict[str, Any] = {
    **{key: value for key, value in {**DIMENSIONS, **LATENT}.items() if key != "n_routed_experts"},
    "num_hidden_layers": 3,
    "q_lora_rank": None,
    "num_local_experts": 8,
    "n_shared_experts": 1,
    "n_group": 4,
    "topk_group": 2,
    "head_dim": 8,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "pad_token_id": None,
    "eos_token_id": 1,
}
OLMO: dict[str, Any] = {
    **DIMENSIONS,
    "num_hidden_layers": 3,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "pad_token_id": None,
    "eos_token_id": 1,
}
GRANITE: dict[str, Any] = {
    **DIMENSIONS,
    "num_hidden_layers": 3,
    "intermediate_size": 16,
    "shared_intermediate_size": 24,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_d_state": 12,
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.7,
    "attention_multiplier": 0.2,
    "logits_scaling": 0.6,
}
GRANITE_3: dict[str, Any] = {
    key: value
    for key, value in GRANITE.items()
    if not key.startswith("mamba_") and key not in ("layer_types", "shared_intermediate_size")
}
NEMOTRON: dict[str, Any] = {
    **{key: value for key, value in DIMENSIONS.items() if key != "num_hidden_layers"},
    "head_dim": 12,
    "moe_intermediate_size": 16,
    "moe_shared_expert_intermediate_size": 24,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "routed_scaling_factor": 2.5,
    "mamba_num_heads": 6,
    "mamba_head_dim": 8,
    "ssm_state_size": 12,
    "n_groups": 2,
    "initializer_range": 0.2,
}
MSCALE: dict[str, Any] = {"mscale": 0.8, "mscale_all_dim": 0.5}
WIDE: dict[str, Any] = {"head_dim": 12}


def rope(**parameters: Any) -> dict[str, Any]:
    """`rope_parameters`, of the plain kind unless said otherwise."""
    return {"rope_type": "default", "rope_theta": 5e5, **parameters}


PUBLISHED: dict[str, Callable[[], Any]] = {
    "qwen2": lambda: transformers.Qwen2Config(**DIMENSIONS, rope_parameters=rope()),
    "qwen2 tied": lambda: transformers.Qwen2Config(**DIMENSIONS, rope_parameters=rope(), tie_word_embeddings=True),
    "qwen2 wide heads": lambda: transformers.Qwen2Config(**DIMENSIONS, **WIDE, rope_parameters=rope()),
    "qwen2_moe": lambda: transformers.Qwen2MoeConfig(**DIMENSIONS, **EXPERTS, rope_parameters=rope()),
    "qwen2_moe renormalised": lambda: transformers.Qwen2MoeConfig(
        **DIMENSIONS, **EXPERTS, rope_parameters=rope(), norm_topk_prob=True, qkv_bias=False
    ),
    "mixtral": lambda: transformers.MixtralConfig(**DIMENSIONS, num_local_experts=4, rope_parameters=rope()),
    "llama 3": lambda: transformers.LlamaConfig(**DIMENSIONS, rope_parameters=rope()),
    "llama 3.1": lambda: transformers.LlamaConfig(**DIMENSIONS, rope_parameters=rope(**SCALED)),
    "llama yarn": lambda: transformers.LlamaConfig(**DIMENSIONS, rope_parameters=rope(**YARN)),
    "deepseek_v2": lambda: transformers.DeepseekV2Config(**{**DIMENSIONS, **LATENT}, rope_parameters=rope()),
    "deepseek_v2 uncompressed": lambda: transformers.DeepseekV2Config(
        **{**DIMENSIONS, **LATENT, "q_lora_rank": None, "n_shared_experts": 1}, rope_parameters=rope(**YARN, **MSCALE)
    ),
    "deepseek_v2 grouped": lambda: transformers.DeepseekV2Config(
        **{**DIMENSIONS, **LATENT, **GROUPS}, rope_parameters=rope(**YARN)
    ),
    "qwen3": lambda: transformers.Qwen3Config(**DIMENSIONS, **WIDE, rope_parameters=rope()),
    "qwen3_moe": lambda: transformers.Qwen3MoeConfig(**DIMENSIONS, **PLAIN_EXPERTS, rope_parameters=rope()),
    "qwen3_moe renormalised": lambda: transformers.Qwen3MoeConfig(
        **DIMENSIONS, **PLAIN_EXPERTS, **WIDE, rope_parameters=rope(), norm_topk_prob=True
    ),
    "deepseek_v3": lambda: transformers.DeepseekV3Config(
        **{**DIMENSIONS, **SIGMOID, **V3_GROUPS, "num_key_value_heads": 4}, rope_parameters=rope(**YARN, **MSCALE)
    ),
    "deepseek_v3 uncompressed": lambda: transformers.DeepseekV3Config(
        **{**DIMENSIONS, **SIGMOID, "num_key_value_heads": 4, "q_lora_rank": None, "n_shared_experts": 2},
        rope_parameters=rope(),
        norm_topk_prob=False,
    ),
    "glm4_moe": lambda: transformers.Glm4MoeConfig(
        **DIMENSIONS, **SIGMOID, rope_parameters=rope(), use_qk_norm=True, attention_bias=True
    ),
    "glm4_moe air": lambda: transformers.Glm4MoeConfig(
        **DIMENSIONS, **SIGMOID, **WIDE, rope_parameters=rope(partial_rotary_factor=0.5), attention_bias=True
    ),
    "qwen3_next": lambda: transformers.Qwen3NextConfig(**HYBRID, intermediate_size=48, rope_parameters=rope()),
    "qwen3_5_moe": lambda: transformers.Qwen3_5MoeTextConfig(**HYBRID, rope_parameters=rope()),
    "kimi_linear": lambda: transformers.KimiLinearConfig(**KIMI),
    "bailing_hybrid": lambda: transformers.BailingHybridConfig(**LING, rope_parameters=rope()),
    "bailing_hybrid unbounded": lambda: transformers.BailingHybridConfig(
        **{**LING, "q_lora_rank": 12, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 2},
        rope_parameters=rope(**YARN, **MSCALE),
        kda_safe_gate=False,
    ),
    "olmo_hybrid": lambda: transformers.OlmoHybridConfig(**OLMO, rope_parameters=rope(rope_theta=None)),
    "olmo_hybrid rotated": lambda: transformers.OlmoHybridConfig(
        **OLMO,
        rope_parameters=rope(),
        linear_num_key_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=10,
        linear_allow_neg_eigval=False,
    ),
    "minimax": lambda: transformers.MiniMaxConfig(**MINIMAX, **WIDE, rope_parameters=rope()),
    "granitemoehybrid": lambda: transformers.GraniteMoeHybridConfig(**GRANITE, mamba_n_groups=2),
    "nemotron_h": lambda: transformers.NemotronHConfig(
        **NEMOTRON, layers_block_type=["linear_attention", "moe", "linear_attention", "full_attention", "moe"]
    ),
    "nemotron_h latent": lambda: transformers.NemotronHConfig(
        **NEMOTRON,
        layers_block_type=["full_attention", "linear_attention", "moe", "linear_attention", "mlp"],
        moe_latent_size=24,
        n_group=4,
        topk_group=2,
    ),
    "nemotron_h dense": lambda: transformers.NemotronHConfig(
        **NEMOTRON, layers_block_type=["linear_attention", "mlp", "full_attention", "mlp", "linear_attention"]
    ),
    "granitemoe": lambda: transformers.GraniteMoeConfig(**GRANITE_3, rope_parameters=rope(), tie_word_embeddings=True),
    "granitemoeshared": lambda: transformers.GraniteMoeSharedConfig(
        **GRANITE_3, rope_parameters=rope(), shared_intermediate_size=24
    ),
    "granitemoehybrid attention alone": lambda: transformers.GraniteMoeHybridConfig(
        **{**GRANITE, "num_local_experts": 0, "layer_types": ["full_attention"] * 3},
        position_embedding_type="rope",
        rope_parameters=rope(),
    ),
    "granitemoehybrid dense": lambda: transformers.GraniteMoeHybridConfig(
        **{**GRANITE, "num_local_experts": 0, "num_experts_per_tok": 0},
        tie_word_embeddings=True,
        position_embedding_type="rope",
    ),
}
"""`config.json` of each case."""


def make(case: str, dtype: torch.dtype = torch.float32) -> Any:
    """The random model of a case, always the same; biases and scales are moved away from where they hide errors."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        with without_kernels():
            model: Any = transformers.AutoModelForCausalLM.from_config(PUBLISHED[case]())
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer += 0.3 * torch.randn(buffer.shape, generator=generator)
    for module in model.modules():
        if hasattr(module, "time_step_limit"):  # transformers bounds Nemotron-H's from below, the release does not
            module.time_step_limit = (0.0, float("inf"))
    return model.to(dtype).eval()


@contextmanager
def without_kernels() -> Iterator[None]:
    """transformers, when it first imports a model's module, binds what computes its layers: here none of the packages
    that may be installed, whose kernels take neither float64 nor the CPU."""
    with pytest.MonkeyPatch.context() as patch:
        for package in ("fla", "causal_conv1d", "mamba_ssm"):
            patch.setitem(sys.modules, package, None)
        yield


@contextmanager
def in_float64() -> Iterator[None]:
    """What transformers computes in float32, whatever the model's type, is computed in float64 inside."""
    usual = torch.float32, torch.float, torch.Tensor.float
    torch.float32, torch.float, torch.Tensor.float = torch.float64, torch.float64, torch.Tensor.double
    try:
        yield
    finally:
        torch.float32, torch.float, torch.Tensor.float = usual


def make_exact(case: str) -> Any:
    """The same model in float64, rotary frequencies too."""
    model = make(case, torch.float64)
    rotary = getattr(model.model, "rotary_emb", None)
    if rotary is not None:
        with in_float64():
            model.model.rotary_emb = type(rotary)(config=model.config)
    for module in model.modules():
        if hasattr(module, "get_slope_rate"):
            set_slopes(module)
    return model


def set_slopes(layer: Any, slopes: torch.Tensor | None = None) -> None:
    """MiniMax's slopes, and what is derived from them, which it makes in the default type; blocks of a few tokens."""
    usual, layer.block_size = torch.get_default_dtype(), 16
    torch.set_default_dtype(torch.float64)
    try:
        layer.slope_rate = layer.get_slope_rate() if slopes is None else slopes
        layer.query_decay, layer.key_decay, layer.diagonal_decay = layer.decay_factors(layer.slope_rate)
    finally:
        torch.set_default_dtype(usual)


def released_name(case: str, name: str) -> str:
    """Where transformers saves a tensor under another name than the release has, the release's."""
    if case.startswith("kimi_linear"):
        return re.sub(r"layers\.0\.block_sparse_moe\.(\w+_proj)", r"layers.0.mlp.\1", name)
    return name


def as_released(case: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What transformers saves under the release's names, without what is derived from the config."""
    found = {released_name(case, name): value for name, value in tensors.items()}
    if case.startswith("olmo_hybrid"):
        found = _olmo_as_released(found)
    return {name: value for name, value in found.items() if not name.endswith(("slope_rate", "_decay"))}


def _olmo_as_released(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Convolutions as wide as their projections, and the names of the norms in softmax layers."""
    found = dict(tensors)
    for name in tensors:
        layer = name.partition(".linear_attn.")[0]
        if name.endswith("q_conv1d.weight"):
            paths = [f"{layer}.linear_attn.{part}_conv1d.weight" for part in "qkv"]
            widths = [len(tensors[f"{layer}.linear_attn.{part}_proj.weight"]) for part in "qkv"]
            found |= zip(paths, torch.cat([tensors[path] for path in paths]).split(widths))
        softmax = name.replace("feedforward_layer_norm", "self_attn.q_norm")
        if softmax != name and softmax in tensors:
            found[name.replace("feedforward_layer_norm", "post_attention_layernorm")] = found.pop(name)
    return found


def save(model: Any, folder: Path, **options: Any) -> Path:
    """Write the directory; returns it."""
    model.save_pretrained(folder, **options)
    return folder


def random_tokens(*shape: int) -> torch.Tensor:
    """Fresh ids, int64."""
    return torch.randint(VOCAB, shape)
