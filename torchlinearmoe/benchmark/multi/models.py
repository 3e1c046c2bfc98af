"""What the sections train: a small model in float32 whose losses are compared, a larger one in bfloat16 that is timed.

On the CPU both are of debug size. Every section compares with the same small model, so one rank computes it once.
The recurrences of the one are PyTorch's, for float32, for which Triton compiles them for tens of seconds; its kernels
are in what is timed. `--quick` gives the other fewer layers.
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any

from torchlinearmoe.benchmark.multi.host import Host
from torchlinearmoe.errors import RecipeError

Tables = dict[str, dict[str, Any]]
TIMED_SECTIONS = ("model", "moe", "mixer", "optimizer")
"""Of which a user may set keys: all else is what is compared."""


def small(host: Host, *, steps: int = 6, model: dict[str, Any] | None = None, **sections: dict[str, Any]) -> Tables:
    """The recipe whose losses are compared: enough heads, experts, layers and micro-batches for every layout.

    `model`: keys beside its own; `sections`: whole tables, or keys of `training` and `checkpoint`.
    """
    width, length = (512, 512) if host.cuda else (128, 64)
    return {
        "model": {
            "mixer": "hgrn2",
            "layout": "LLLN",
            "hidden_size": width,
            "num_layers": layers_of(host),
            "num_heads": 8,
            "num_kv_heads": 8,
            "vocab_size": 1024,
            "kernel_backend": "torch",
            **(model or {}),
        },
        "moe": {"num_experts": 16, "top_k": 2, "hidden_size": width // 4, "balance_coefficient": 0.01},
        "data": {"cache": str(host.folder / "cache")},
        "training": {
            "steps": steps,
            "sequence_length": length,
            "micro_batch_size": 1,
            "tokens_per_step": 2 * host.ranks * length,
            "dtype": "float32",
            **sections.pop("training", {}),
        },
        "optimizer": {"lr": 1e-3, "schedule": "constant", "warmup_steps": 1},
        "metrics": {"interval": 1, "tensorboard": False, "validation_batches": 1},
        "checkpoint": {"interval": 0, **sections.pop("checkpoint", {})},
        **sections,
    }


def layers_of(host: Host) -> int:
    """Layers of a small model: two stages a rank."""
    return max(4, 2 * host.ranks)


def timed(
    host: Host,
    *,
    length: int,
    sequences: int,
    parallel: dict[str, Any],
    micro_batches: int = 1,
    model: dict[str, Any] | None = None,
    checkpointing: str = "none",
    compiled: bool | None = None,
) -> Tables:
    """The recipe that is timed: `sequences` of `length` tokens a micro-batch and data rank, `micro_batches` a step.

    `model`: keys beside its own; `parallel`: the degrees, data_shard among them; `compiled`: None for the host's.
    """
    size: dict[str, Any] = {"family": "qwen2", "size": "A0.3B"}
    if host.quick:
        size["num_layers"] = layers_of(host)
    if not host.cuda:
        size = {"hidden_size": 128, "num_layers": 4, "num_heads": 8, "num_kv_heads": 8, "vocab_size": 1024}
    tables: Tables = {
        "model": {**size, "mixer": "hgrn2", "layout": "LLLN", **(model or {})},
        "moe": {"balance_coefficient": 0.01},
        "data": {"cache": str(host.folder / "cache")},
        "training": {
            "steps": 1000,
            "sequence_length": length,
            "micro_batch_size": sequences,
            "tokens_per_step": length * sequences * micro_batches * parallel["data_shard"],
            "activation_checkpointing": checkpointing,
            "compile": host.compiled if compiled is None else compiled,
        },
        "optimizer": {},
        "metrics": {"tensorboard": False},
        "checkpoint": {"interval": 0},
        "parallel": parallel,
    }
    tables["training"]["tokens_per_step"] *= parallel.get("data_replicate", 1)
    if not host.quick:
        tables["data"]["paths"] = [str(text(host))]
    if not host.cuda:
        tables["moe"] |= {"num_experts": 16, "top_k": 2, "hidden_size": 32}
    for section, keys in host.overrides.items():
        tables[section] = tables.get(section, {}) | keys
    return tables


def text(host: Host) -> Path:
    """The corpus that ships, over and over: long enough for a sequence of the longest length. Nothing is learnt."""
    path = host.folder / "long.jsonl"
    if not path.exists():
        once = (files("torchlinearmoe.data") / "corpus" / "king_james_new_testament.jsonl").read_text()
        path.write_text(once * (8 if host.cuda else 1))
    return path


def about(host: Host) -> str:
    """What `--quick` trains, for the table."""
    cut = f"A0.3B cut to {layers_of(host)} layers" if host.cuda else "debug size"
    return f"compared: float32, recurrences in PyTorch; timed: {cut}"


def check_overrides(overrides: dict[str, Any]) -> None:
    """Raise RecipeError for keys that the sections set themselves."""
    for section in overrides:
        if section not in TIMED_SECTIONS:
            raise RecipeError(
                f"--{section}: is set by the sections of `multi`; what may be given is {', '.join(TIMED_SECTIONS)}"
            )
