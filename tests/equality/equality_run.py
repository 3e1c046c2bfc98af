"""Ten optimizer steps of the trainer on made-up rows, for every mixer and family, and what they are compared by.

A case is a recipe. Its losses and gradient norms are a function of the code and the machine alone: the first values
come from the seed, the rows from the step's number, and one thread adds in one order.
"""

from __future__ import annotations

import platform
import random
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

sys.path.append(str(Path(__file__).parents[1] / "distributed"))

from tiny_run import Settings, build, settings, unsettle, write_corpus

from torchlinearmoe.data.packing import IGNORED, Sample, collate
from torchlinearmoe.families import FAMILIES
from torchlinearmoe.mixers import MIXERS
from torchlinearmoe.runtime import process_group

STEPS, LENGTH, DOCUMENTS = 10, 64, (1, 3)
VOCABULARY = 1024

# Outputs near zero make a norm a step function, which magnifies rounding; a greater epsilon hides the mixer behind it.
# With these a decay or output off by a thousandth is tens of times what the rounding of another processor makes.
MODEL = {"norm_eps": 3e-2, "init_std": 0.125, "num_layers": 2, "layout": "LN"}
CONDITIONED: dict[str, dict[str, float]] = {
    "based": {"norm_eps": 1e-1},
    "linear_attention": {"norm_eps": 1e-1},
    "rebased": {"norm_eps": 1e-1, "init_std": 0.05},
    "kda": {"norm_eps": 1e-2},
    "gated_delta_net": {"norm_eps": 2e-2},
}
BESIDE = {"qwen2": "gated_delta_net", "deepseek_v2": "mamba2", "mixtral": "gla", "llama3": "lightning_attention"}
BESIDE |= {"qwen3_next": "gated_delta_net", "qwen3_5_moe": "gated_delta_net", "kimi_linear": "kda"}
BESIDE |= {"minimax": "lightning_attention", "olmo_hybrid": "gated_delta_net", "bailing_hybrid": "kda"}
BESIDE |= {"granitemoehybrid": "mamba2", "nemotron_h": "mamba2"}
"""The linear mixer that a family is run with besides its own attention; another family takes HGRN2."""

WITH_OWN_EPSILON = {"minimax": "lightning_attention", "olmo_hybrid": "gated_delta_net"}
"""Families whose linear mixer has an epsilon that is not the model's; here it takes that."""


class Figures(NamedTuple):
    """What a case is compared by, a number a step."""

    losses: list[float]
    grad_norms: list[float]


def of_mixer(name: str) -> Settings:
    """A dense Qwen2 of the mixer and softmax attention: two heads of any mixer, and no router but the mixer's own."""
    dimensions = {"hidden_size": 64, "num_kv_heads": 2, "ffn_hidden_size": 96}
    dense = dict.fromkeys(("hidden_size", "shared_hidden_size", "num_experts", "top_k"), 0) | {"shared_gate": False}
    return {"model": {"mixer": name, **dimensions, **MODEL, **CONDITIONED.get(name, {})}, "moe": dense}


def of_family(name: str, mixer: str) -> Settings:
    """The family's `debug` size, which has its kind of experts, with every way that its routers are balanced."""
    brought = {
        "model": ("hidden_size", "num_heads", "num_kv_heads"),
        "moe": ("num_experts", "top_k", "hidden_size", "shared_hidden_size", "shared_gate"),
    }
    own = {section: dict.fromkeys(keys) for section, keys in brought.items()}
    model = {**own["model"], "family": name, "size": "debug", "mixer": mixer, **MODEL}
    moe: dict[str, Any] = own["moe"]
    if name == "qwen2":
        moe |= {"shared_hidden_size": 32, "shared_gate": True}
    if name == "deepseek_v2":
        moe |= {"balance": "bias", "bias_rate": 0.01}
    epsilon = {WITH_OWN_EPSILON[name]: {"norm_eps": 0.0}} if name in WITH_OWN_EPSILON else {}
    return {"model": model, "moe": moe, "mixer": epsilon}


def cases() -> dict[str, Settings]:
    """Every case by its name, which holds that of its mixer and of its family."""
    found = {name: of_mixer(name) for name in MIXERS}
    for name, family in FAMILIES.items():
        for mixer in (family.attention, BESIDE.get(name, "hgrn2")):
            found[f"{name}-{mixer}"] = of_family(name, mixer)
    return found


def rows_of(step: int) -> list[Sample]:
    """The packed sequences of a step, with uneven documents and a tenth of the labels left out."""
    chooser = random.Random(step)
    samples = []
    for documents in DOCUMENTS:
        ids = np.array([chooser.randrange(VOCABULARY) for _ in range(LENGTH + 1)])
        labels = np.array([IGNORED if chooser.random() < 0.1 else label for label in ids[1:]])
        starts = [0, *sorted(chooser.sample(range(1, LENGTH), documents - 1))]
        samples.append(Sample(ids[:-1], labels, starts))
    return samples


def run(tables: Settings, folder: Path) -> Figures:
    """Train a case in `folder`, on one thread."""
    folder.mkdir(parents=True, exist_ok=True)
    steps: Settings = {
        "training": {"steps": STEPS, "sequence_length": LENGTH, "tokens_per_step": len(DOCUMENTS) * LENGTH},
        "optimizer": {"lr": 1e-3, "min_lr": 1e-3, "schedule": "constant", "warmup_steps": 0},
    }
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with process_group(torch.device("cpu")):
            trainer = build(settings(write_corpus(folder), folder / "run", steps, tables))
            for part in trainer.parts:
                unsettle(part)
            figures = Figures([], [])
            for step in range(STEPS):
                loss, grad_norm, _ = trainer.train_step([collate([row]) for row in rows_of(step)])
                figures.losses.append(loss.item())
                figures.grad_norms.append(grad_norm.item())
            trainer.metrics.close()
    finally:
        torch.set_num_threads(threads)
    return figures


def machine() -> dict[str, str]:
    """What the last bits of a sum depend on: the processor, its instructions that are used, and torch."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    told = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    wide = ("avx", "amx", "fma", "sve", "asimd")
    return {
        "processor": " ".join(
            [platform.machine(), *(told.get(key, "") for key in ("model name", "cpu family", "model"))]
        ),
        "instructions": " ".join(sorted(flag for flag in told.get("flags", "").split() if flag.startswith(wide))),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "threads": "1",
    }
