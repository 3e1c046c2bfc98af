"""Recipes that together say something else than the default with every key there is."""

from __future__ import annotations

from typing import Any

from torchlinearmoe.recipe import ModelRecipe, resolve
from torchlinearmoe.recipe.parse import flatten

HEADS = {"heads": 4, "head_dim": 16}
CONVOLVED = {**HEADS, "conv": 3}
OUTPUT = {"output_norm": "none", "gate_activation": "sigmoid"}
DELTA = {**CONVOLVED, **OUTPUT, "value_heads": 8, "expand_v": 1.5, "negative_eigenvalues": True}
GATED = {
    **CONVOLVED,
    **OUTPUT,
    "kv_heads": 2,
    "expand_k": 0.75,
    "expand_v": 1.5,
    "gate_rank": 5,
    "gate_normalizer": 12.0,
    "clamp_min": -0.5,
    "feature_map": "silu",
}
MEMORIES = {
    "num_memories": 3,
    "top_k": 1,
    "shared_memory": False,
    "shared_projections": True,
    "renormalize": False,
    "balance_coefficient": 0.02,
    "balance_scope": "global",
}
MIXERS: dict[str, dict[str, Any]] = {
    "based": {**CONVOLVED, "feature_dim": 8, "gate": True},
    "delta_net": {**DELTA, "expand_k": 0.5, "gate": True},
    "gated_delta_net": DELTA,
    "gla": GATED,
    "gsa": {
        **CONVOLVED,
        "output_norm": "none",
        "slots": 16,
        "kv_heads": 2,
        "expand_k": 0.5,
        "expand_v": 1.5,
        "gate_normalizer": 4.0,
    },
    "hgrn2": {**CONVOLVED, "output_norm": "none", "lower_bounds": False},
    "kda": {**DELTA, "gate_activation": "swish", "decay_rank": 6, "gate_rank": 7},
    "lightning_attention": {**CONVOLVED, "layer_factor": False, "norm": "head", "gate": "swish"},
    "linear_attention": {
        **CONVOLVED,
        **OUTPUT,
        "expand_v": 2.0,
        "feature_map": "t2r",
        "feature_dim": 24,
        "nu": 3,
        "tie_feature_maps": True,
        "normalize": True,
    },
    "mamba2": {"heads": 12, "head_dim": 16, "expand": 3.0, "state": 32, "groups": 2, "conv": 3},
    "mom_gated_delta_net": {**DELTA, **MEMORIES},
    "mom_gla": {**GATED, **MEMORIES},
    "rebased": {**CONVOLVED, "feature_dim": 8, "gate": True, "tie_norms": True},
    "retention": {**CONVOLVED, **OUTPUT, "expand_v": 1.5, "rope_theta": 500.0, "feature_map": "elu"},
    "rwkv6": {**HEADS, "mix_rank": 9, "decay_rank": 10},
    "rwkv7": {**HEADS, "decay_rank": 5, "rate_rank": 6, "value_rank": 7, "gate_rank": 8},
    "softmax_attention": {**CONVOLVED, "kv_heads": 2, "window": 512, "qkv_bias": True},
}
RECIPES: dict[str, dict[str, dict[str, Any]]] = {
    "every_mixer": {
        "model": {
            "family": "mixtral",
            "size": "Small",
            "mixer": "gla",
            "mixers": list(MIXERS),
            "hidden_size": 64,
            "num_heads": 4,
            "num_kv_heads": 2,
            "head_dim": 16,
            "vocab_size": 2048,
            "max_length": 4000,
            "rope_theta": 2000.0,
            "norm_eps": 1e-4,
            "tie_embeddings": True,
            "init_std": 0.03,
            "attention_backend": "flex",
            "kernel_backend": "reference",
        },
        "moe": {
            "num_experts": 6,
            "top_k": 3,
            "hidden_size": 48,
            "balance_coefficient": 0.03,
            "balance_scope": "global",
            "z_loss_coefficient": 0.002,
            "capacity_factor": 1.25,
            "eval_capacity_factor": 2.0,
            "drop_policy": "position",
            "backend": "loop",
        },
        "mixer": MIXERS,
        "data": {
            "paths": ["text", 'more/é "quoted".jsonl'],
            "tokenizer": "tokenizer.json",
            "validation_fraction": 0.01,
            "validation_split": "tokens",
            "workers": 2,
            "cache": "tokens",
        },
        "training": {
            "steps": 123,
            "sequence_length": 512,
            "micro_batch_size": 2,
            "tokens_per_step": 8192,
            "seed": 7,
            "output_dir": "runs/every_mixer",
            "dtype": "bfloat16",
            "device": "cuda",
            "compile": True,
            "compile_backend": "aot_eager",
            "activation_checkpointing": "selective",
            "activation_checkpointing_every": 2,
            "max_skipped_steps": 4,
            "deterministic": True,
        },
        "optimizer": {
            "lr": 1e-3,
            "min_lr": 1e-4,
            "schedule": "wsd",
            "warmup_steps": 11,
            "decay_fraction": 0.3,
            "betas": [0.8, 0.99],
            "eps": 1e-7,
            "weight_decay": 0.05,
            "clip_norm": 0.5,
            "states": "bfloat16",
        },
        "parallel": {
            "data_replicate": 2,
            "data_shard": 4,
            "context": 2,
            "context_attention": "gather",
            "context_states": "bfloat16",
            "expert": 2,
            "reshard_after_forward": False,
            "reduce_dtype": "bfloat16",
        },
        "checkpoint": {"interval": 50, "keep": 2, "resume": "never", "asynchronous": False},
        "metrics": {
            "interval": 5,
            "validation_interval": 25,
            "validation_batches": 3,
            "tensorboard": False,
            "baselines": True,
            "mixer_ablation": True,
            "peak_tflops": 989.0,
            "profile_steps": [3, 5],
            "memory_snapshot_step": 4,
        },
    },
    "deepseek_v2-mla": {
        "model": {
            "family": "deepseek_v2",
            "size": "A21B",
            "layout": "NLL",
            "mixer": "mamba2",
            "hidden_size": 96,
            "num_layers": 6,
            "num_heads": 6,
            "num_kv_heads": 6,
            "head_dim": 12,
            "ffn_hidden_size": 200,
            "rope_scaling": "llama3",
            "rope_factor": 3.0,
            "rope_original_length": 777,
            "rope_beta_slow": 2.0,
            "rope_beta_fast": 16.0,
            "rope_mscale": 0.5,
            "rope_mscale_all_dim": 0.6,
        },
        "moe": {
            "num_experts": 12,
            "top_k": 2,
            "hidden_size": 40,
            "shared_hidden_size": 80,
            "shared_gate": True,
            "renormalize": True,
            "routed_scaling": 2.5,
            "num_groups": 4,
            "top_k_groups": 2,
            "first_dense_layers": 2,
            "balance": "bias",
            "bias_rate": 0.002,
        },
        "mixer": {
            "mla": {
                "heads": 6,
                "head_dim": 10,
                "qk_rope_head_dim": 6,
                "v_head_dim": 14,
                "kv_lora_rank": 20,
                "q_lora_rank": 18,
            },
            "mamba2": {"head_dim": 24, "state": 16},
        },
        "data": {
            "format": "messages",
            "chat_template": "plain",
            "on_change": "restart_epoch",
            "begin_of_text": True,
            "trained_roles": ["user"],
        },
        "training": {"tokens": 10**12, "sequence_length": 1024, "output_dir": "runs/deepseek"},
        "optimizer": {"warmup_tokens": 10**9, "schedule": "constant"},
        "parallel": {
            "tensor": 2,
            "pipeline": 2,
            "pipeline_schedule": "zero_bubble",
            "pipeline_stages_per_rank": 2,
            "reshard_after_forward": False,
        },
        "checkpoint": {"init_from": "weights", "upcycle_noise": 0.01},
    },
    "mixture": {
        "model": {"mixer": "gla"},
        "data": {
            "sources": [
                {"path": "web/*.jsonl.zst", "weight": 3.5},
                {"path": "books", "weight": 1, "split": "train"},
                {"path": "papers", "split": "validation"},
            ],
            "text_key": "content.text",
            "packing": "best_fit",
            "min_length": 200,
            "validation_paths": ["forum=some/posts", "more/code.jsonl"],
        },
        "training": {"steps": 9},
    },
    "mom_gla-inner": {
        "model": {"mixers": ["mom_gla", "mom_gated_delta_net"]},
        "mixer": {"mom_gla": {"inner": "linear_attention"}, "mom_gated_delta_net": {"inner": "gsa"}},
        "training": {"steps": 9},
    },
    "linear_attention-hedgehog": {
        "model": {"mixer": "linear_attention"},
        "mixer": {"linear_attention": {"feature_map": "hedgehog", "feature_scale": 2.0}},
        "training": {"steps": 9},
    },
    "sigmoid-gated_heads": {
        "model": {"family": "llama3", "mixers": ["softmax_attention", "kda"], "norm_offset": 1.0},
        "moe": {
            "num_experts": 8,
            "top_k": 2,
            "hidden_size": 32,
            "score": "sigmoid",
            "selection_bias": True,
            "num_groups": 4,
            "top_k_groups": 2,
            "group_score": "top2",
        },
        "mixer": {
            "softmax_attention": {"qk_norm": "head", "rotary_dim": 8, "output_gate": True},
            "kda": {"gate_bias": False},
        },
        "training": {"steps": 9},
    },
    "scaled-latent": {
        "model": {
            "family": "llama3",
            "layout": "N",
            "feed_forwards": "E.-",
            "activation": "relu2",
            "embed_scale": 12.0,
            "residual_scale": 0.22,
            "logit_divisor": 6.0,
        },
        "moe": {"num_experts": 8, "top_k": 2, "hidden_size": 32, "latent_size": 16},
        "mixer": {"softmax_attention": {"scale": 0.0078125}},
        "training": {"steps": 9},
    },
    "placed-weighed": {
        "model": {
            "family": "llama3",
            "mixers": [
                "kda",
                "softmax_attention",
                "lightning_attention",
                "gated_delta_net",
                "mom_gated_delta_net",
                "mla",
            ],
            "norm_placement": "stream",
            "attention_norm_placement": "post",
            "linear_scales": [1.5, 0.75],
            "attention_scales": [3.0, 1.25],
            "ffn_scales": [2.5, 0.5],
        },
        "mixer": {
            "kda": {"full_rank": True, "decay_bound": -5.0},
            "softmax_attention": {"qk_norm": "full"},
            "lightning_attention": {"norm_eps": 1e-6, "depth_eps": 1e-5},
            "gated_delta_net": {"norm_eps": 1e-5},
            "mom_gated_delta_net": {"norm_eps": 1e-5},
            "mla": {"output_gate": "head"},
        },
        "training": {"steps": 9},
    },
    "unrotated-recall": {
        "model": {"family": "llama3", "layout": "N"},
        "mixer": {"softmax_attention": {"rope": False}},
        "data": {
            "format": "recall",
            "recall": [{"pairs": 4, "length": 64, "examples": 300}, {"pairs": 16, "length": 128}],
            "recall_vocabulary": 512,
            "recall_fill": "zero",
            "recall_seed": 3,
        },
        "training": {"steps": 9, "sequence_length": 256},
        "metrics": {"validation_accuracy": True},
    },
    "unrotated_mla-evaluated": {
        "model": {"family": "deepseek_v3", "layout": "N"},
        "mixer": {"mla": {"rope": False}},
        "training": {"steps": 9},
        "metrics": {"wandb": "some-project"},
        "evaluation": {
            "interval": 50,
            "tasks": ["local_text", "hellaswag"],
            "num_fewshot": 2,
            "limit": 100,
            "batch_tokens": 4096,
        },
    },
    "embeddings-float8": {
        "model": {"family": "llama3", "embed_init_std": 0.2},
        "training": {"steps": 9, "float8": "rowwise"},
    },
}
ONE_VALUE = {"optimizer.name"}
"""Keys with a single legal value."""


def keys_at_their_default() -> list[str]:
    """The keys with which no recipe here says something else than what the model gets that says nothing."""
    every, said = set[str](), set[str]()
    for tables in RECIPES.values():
        preset = {key: tables["model"][key] for key in ("family", "size") if key in tables["model"]}
        untouched = flatten(resolve({"model": preset, "training": {"steps": 1}}))
        untouched |= {"model.family": ModelRecipe.family, "model.size": ModelRecipe.size}
        found = flatten(resolve(tables))
        every |= found.keys()
        said |= {key for key, value in found.items() if value != untouched[key]}
    return sorted(every - said - ONE_VALUE)
