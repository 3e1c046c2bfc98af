"""How all models are trained: tables of a recipe.

10.5 M tokens of `text.py`, each read once, on 17 to 45 M parameters beside the embeddings: six layers of 512 channels,
heads of 64, a dense SwiGLU of 1408. What differs is the mixer alone.
"""

from __future__ import annotations

from typing import Any

from torchlinearmoe.curves.text import VOCABULARY

EMBED_STD = 0.5
SEQUENCE = 1024
STEP_TOKENS = 16 * SEQUENCE
STEPS = 640
POINTS = 10
"""Validations of a run, its last step's among them."""

TABLES: dict[str, dict[str, Any]] = {
    "model": {
        "family": "llama3",
        "size": "debug",
        "layout": "L",
        "hidden_size": 512,
        "num_layers": 6,
        "num_heads": 8,
        "num_kv_heads": 8,
        "head_dim": 64,
        "ffn_hidden_size": 1408,
        "vocab_size": VOCABULARY,
        "max_length": SEQUENCE,
        "rope_theta": 10000.0,
        "tie_embeddings": False,
        "init_std": 0.02,
        "embed_init_std": EMBED_STD,
    },
    "moe": {"num_experts": 0},
    "data": {"validation_fraction": 0.02},
    "training": {
        "steps": STEPS,
        "sequence_length": SEQUENCE,
        "micro_batch_size": STEP_TOKENS // SEQUENCE,
        "tokens_per_step": STEP_TOKENS,
    },
    "optimizer": {"lr": 2e-3, "min_lr": 2e-4, "warmup_steps": STEPS // 10, "weight_decay": 0.1},
    "checkpoint": {"interval": 0, "keep": 1},
    "metrics": {"interval": STEPS // POINTS // 4, "validation_interval": STEPS // POINTS, "tensorboard": False},
}
