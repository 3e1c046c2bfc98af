"""What is asked in a sweep, and how its models are trained: tables of a recipe, and the tests.

published   Arora et al. 2023 (arXiv 2312.04927) as their repository has it since 2024: 8192 ids, documents of 64 to 256
            tokens trained, up to 1024 asked. Ours: sequences of 256 tokens packed from documents of one kind, a step of
            128 of them (about their 256 documents), and a feed-forward of one channel where they have none.
small       Fewer ids and pairs, so that a model learns it on one CPU core in a minute or two.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torchlinearmoe.recipe.schema import RecallRecipe

CONV = 4
"""Width of the short convolution of every mixer that has one; the published ones stand behind a convolution each."""


@dataclass(frozen=True)
class Setting:
    """A sweep without its models."""

    tables: dict[str, dict[str, Any]]
    """Of a recipe."""
    tests: tuple[RecallRecipe, ...]
    """Held-out documents; accuracy is the mean over all of them, each counting the same."""
    mixers: tuple[str, ...]
    """Taken where none are named."""
    widths: tuple[int, ...]
    lrs: tuple[float, ...]
    enough: float
    """Accuracy at which training ends."""


def _entry(pairs: int, length: int, examples: int) -> dict[str, int]:
    return {"pairs": pairs, "length": length, "examples": examples}


def _tables(data: dict[str, Any], training: dict[str, Any], optimizer: dict[str, Any], ffn: int) -> dict[str, Any]:
    return {
        "model": {
            "family": "qwen2",
            "size": "debug",
            "layout": "L",
            "num_layers": 2,
            "num_heads": 2,
            "num_kv_heads": 2,
            "ffn_hidden_size": ffn,
            "vocab_size": data["recall_vocabulary"],
            "max_length": 1024,
        },
        "moe": {"num_experts": 0},
        "data": {"format": "recall", **data},
        "training": training,
        "optimizer": optimizer,
    }


SETTINGS = {
    "published": Setting(
        tables=_tables(
            {
                "recall": [
                    _entry(4, 64, 100_000),
                    _entry(8, 128, 20_000),
                    _entry(16, 256, 20_000),
                    _entry(32, 256, 20_000),
                    _entry(64, 256, 20_000),
                ],
                "recall_vocabulary": 8192,
                "recall_seed": 123,
            },
            {"steps": 8000, "sequence_length": 256, "tokens_per_step": 128 * 256, "seed": 123},
            {"schedule": "cosine", "min_lr": 0.0, "warmup_steps": 100, "weight_decay": 0.1, "betas": [0.9, 0.999]},
            ffn=1,
        ),
        tests=tuple(
            RecallRecipe(pairs=pairs, length=length, examples=1000)
            for pairs, length in ((4, 64), (8, 64), (16, 64), (32, 128), (64, 256), (128, 512), (256, 1024))
        ),
        mixers=("gated_delta_net", "delta_net", "gla", "based", "mamba2"),
        widths=(64, 128),
        lrs=(1e-3, 3.2e-3, 1e-2, 3.2e-2),
        enough=0.99,
    ),
    "small": Setting(
        tables=_tables(
            {"recall": [_entry(4, 16, 20_000)], "recall_vocabulary": 32, "recall_fill": "zero"},
            {"steps": 800, "sequence_length": 16, "tokens_per_step": 64 * 16},
            {"min_lr": 0.0, "warmup_steps": 25, "weight_decay": 0.01, "betas": [0.9, 0.98]},
            ffn=128,
        ),
        tests=(RecallRecipe(pairs=4, length=16, examples=256),),
        mixers=("gated_delta_net", "linear_attention"),
        widths=(64,),
        lrs=(5e-3,),
        enough=0.97,
    ),
}
