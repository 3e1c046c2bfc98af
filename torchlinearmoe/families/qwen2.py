"""Qwen2 and Qwen2-MoE: GQA with biases on q, k and v, RMSNorm, SwiGLU, a sigmoid-gated shared expert.

Sizes: the Linear-MoE presets A0.3B-2B and A1B-7B (arXiv 2503.05447, table 2), the published Qwen2 models
(arXiv 2407.10671, tables 1 and 2), and `debug`. Routing follows Qwen2-MoE: softmax over all experts, the chosen
probabilities not rescaled.
"""

from __future__ import annotations

from torchlinearmoe.families.base import FAMILIES, Family, model_size, moe_size, plain
from torchlinearmoe.families.huggingface import (
    ATTENTION,
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

PRESETS = {
    "debug": (model_size(64, 4, 4, 2, 160, 1024, max_length=1024, rope_theta=1e4, init_std=0.02), moe_size(4, 2, 64)),
    "0.5B": (model_size(896, 24, 14, 2, 4864, 151936, tie_embeddings=True), {}),
    "1.5B": (model_size(1536, 28, 12, 2, 8960, 151936, tie_embeddings=True), {}),
    "7B": (model_size(3584, 28, 28, 4, 18944, 152064), {}),
    "72B": (model_size(8192, 80, 64, 8, 29568, 152064, norm_eps=1e-5), {}),
    "A0.3B": (model_size(1024, 12, 8, 8, 896, 151936, rope_theta=1e4), moe_size(64, 8, 896)),
    "A1B": (model_size(2048, 16, 16, 16, 1024, 151936, rope_theta=1e4), moe_size(64, 8, 1024)),
    "A14B": (
        model_size(3584, 28, 28, 4, 18944, 151936),
        moe_size(64, 8, 2560, shared_hidden_size=20480, shared_gate=True),
    ),
}

QKV_BIAS = "mixer.softmax_attention.qkv_bias"
FIXED = {**MODEL_FIXED, "use_sliding_window": False}
DENSE_MODEL = Architecture(
    name="Qwen2ForCausalLM",
    model_type="qwen2",
    keys={**MODEL_KEYS, "intermediate_size": "model.ffn_hidden_size"},
    names=(*OUTER, *ATTENTION, *swiglu("ffn", "mlp")),
    defaults=MODEL_DEFAULTS,
    fixed=FIXED,
    implied={QKV_BIAS: True, **{f"moe.{key}": value for key, value in plain("moe").items()}},
)
MOE_MODEL = Architecture(
    name="Qwen2MoeForCausalLM",
    model_type="qwen2_moe",
    keys={
        **MODEL_KEYS,
        "intermediate_size": "model.ffn_hidden_size",
        "qkv_bias": QKV_BIAS,
        "num_experts": "moe.num_experts",
        "num_experts_per_tok": "moe.top_k",
        "moe_intermediate_size": "moe.hidden_size",
        "shared_expert_intermediate_size": "moe.shared_hidden_size",
        "norm_topk_prob": "moe.renormalize",
        "router_aux_loss_coef": "moe.balance_coefficient",
    },
    names=(
        *OUTER,
        *ATTENTION,
        Name("layers.{layer}.ffn.router.weight", "model.layers.{layer}.mlp.gate.weight"),
        *experts("mlp.experts", "gate_proj", "up_proj", "down_proj"),
        *swiglu("ffn.shared", "mlp.shared_expert"),
        Name("layers.{layer}.ffn.shared_gate.weight", "model.layers.{layer}.mlp.shared_expert_gate.weight"),
    ),
    defaults={
        **MODEL_DEFAULTS,
        "qkv_bias": True,
        "norm_topk_prob": False,
        "router_aux_loss_coef": 0.001,
    },
    fixed={**FIXED, "decoder_sparse_step": 1, "mlp_only_layers": []},
    implied={"moe.shared_gate": True},
    read=read_pooled_balance,
    write=write_pooled_balance,
)

FAMILIES.add(
    "qwen2",
    Family(
        name="qwen2",
        attention="softmax_attention",
        common={
            "max_length": 131072,
            "rope_theta": 1e6,
            "norm_eps": 1e-6,
            "tie_embeddings": False,
            "init_std": 0.02,
        },
        options={"qkv_bias": True},
        presets=PRESETS,
        published=(DENSE_MODEL, MOE_MODEL),
    ),
)
