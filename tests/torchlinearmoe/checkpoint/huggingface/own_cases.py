"""Small random models of this project's own architecture, as checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

from torchlinearmoe import build_model
from torchlinearmoe.checkpoint import CheckpointManager
from torchlinearmoe.checkpoint.model import model_files
from torchlinearmoe.data.tokenizer import load_tokenizer
from torchlinearmoe.models.decoder import Decoder
from torchlinearmoe.recipe import resolve

MODELS = {
    "linear": {"model": {"mixer": "gated_delta_net", "layout": "L"}},
    "hybrid": {"model": {"mixer": "hgrn2", "layout": "LN"}},
    "latent hybrid": {"model": {"family": "deepseek_v2", "mixer": "gla", "layout": "LN"}},
    "dense experts' family": {"model": {"family": "mixtral", "layout": "N"}, "moe": {"num_experts": 0}},
    "biased selection": {"model": {"layout": "N"}, "moe": {"balance": "bias"}},
    "dropping in evaluation": {"model": {"layout": "N"}, "moe": {"eval_capacity_factor": 1.5}},
}


def checkpoint(folder: Path, kind: str) -> tuple[Path, Decoder]:
    """A complete checkpoint of random weights, and its model."""
    tables: dict[str, Any] = {**MODELS[kind], "training": {"steps": 1}}
    tables["model"] = {"num_layers": 2, "init_std": 0.2, **tables["model"]}
    recipe = resolve(tables)
    model = build_model(recipe.model, seed=3).eval()
    with torch.no_grad():
        for buffer in (value for name, value in model.state_dict().items() if name.endswith("expert_bias")):
            buffer += torch.randn_like(buffer)
    manager = CheckpointManager(folder, keep=1)
    extra = {"tokens": 0, "skipped_steps": 0}
    manager.save(1, model, None, extra, model_files(recipe, load_tokenizer()), blocking=True)
    return folder / "step-1", model


def load(folder: Path, **options: Any) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **options)
