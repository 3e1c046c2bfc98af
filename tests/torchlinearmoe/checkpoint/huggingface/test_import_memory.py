"""A model is imported in memory that does not grow with it, however large its files and tensors are."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

LAYERS, WIDTH, VOCAB, EXPERTS, HIDDEN = 2, 512, 32000, 44, 512
IMPORT = """
import sys
from torchlinearmoe.checkpoint.huggingface.importing import import_directory

def memory(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key)) / 1024

def peak():
    open("/proc/self/clear_refs", "w").write("5")
    before = memory("VmRSS")
    import_directory(sys.argv[1], sys.argv[2])
    return memory("VmHWM") - before

print(peak())
"""
"""Prints by how many MiB the process grew."""


def write_directory(folder: Path) -> int:
    """A Qwen2-MoE of random float32 weights in files of unequal sizes, the largest tensors 65 MB each; bytes."""
    folder.mkdir()
    config = {
        "architectures": ["Qwen2MoeForCausalLM"],
        "hidden_size": WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "intermediate_size": HIDDEN,
        "vocab_size": VOCAB,
        "max_position_embeddings": 128,
        "num_experts": EXPERTS,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": HIDDEN,
        "shared_expert_intermediate_size": HIDDEN,
    }
    (folder / "config.json").write_text(json.dumps(config))
    outer = {
        "model.embed_tokens.weight": (VOCAB, WIDTH),
        "lm_head.weight": (VOCAB, WIDTH),
        "model.norm.weight": (WIDTH,),
    }
    files: list[dict[str, tuple[int, ...]]] = [outer]
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        shapes: dict[str, tuple[int, ...]] = {f"{prefix}self_attn.{n}_proj.weight": (WIDTH, WIDTH) for n in "qkvo"}
        shapes |= {f"{prefix}self_attn.{n}_proj.bias": (WIDTH,) for n in "qkv"}
        shapes |= {f"{prefix}{n}_layernorm.weight": (WIDTH,) for n in ("input", "post_attention")}
        shapes |= {f"{prefix}mlp.gate.weight": (EXPERTS, WIDTH), f"{prefix}mlp.shared_expert_gate.weight": (1, WIDTH)}
        for expert in ("shared_expert", *(f"experts.{i}" for i in range(EXPERTS))):
            shapes |= {f"{prefix}mlp.{expert}.{n}_proj.weight": (HIDDEN, WIDTH) for n in ("gate", "up")}
            shapes |= {f"{prefix}mlp.{expert}.down_proj.weight": (WIDTH, HIDDEN)}
        files.append(shapes)
    generator, listed, size = torch.Generator().manual_seed(0), {}, 0
    for number, shapes in enumerate(files):
        tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
        size += sum(tensor.nbytes for tensor in tensors.values())
        save_file(tensors, folder / f"{number}.safetensors")
        listed |= dict.fromkeys(shapes, f"{number}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": listed}))
    return size


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's count of the peak")
def test_four_hundred_megabytes_are_imported_in_a_quarter_of_that(tmp_path: Path) -> None:
    assert 4e8 < write_directory(tmp_path / "published") < 5e8
    arguments = [str(tmp_path / name) for name in ("published", "checkpoint")]
    done = subprocess.run([sys.executable, "-c", IMPORT, *arguments], check=True, capture_output=True, text=True)
    assert 0 < float(done.stdout) < 100
