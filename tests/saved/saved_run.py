"""What the saved runs are made of and how they go on: recipes, layouts, and the folder that a run lives in.

A run's folder is moved about, so its recipe names everything relative to the folder around it:

    corpus.jsonl  conversations.jsonl  letters.tiktoken ...     copies of `text/`
    run/checkpoints/step-3/                                     out of an archive
"""

from __future__ import annotations

import json
import shutil
import sys
import tarfile
import tomllib
from collections.abc import Iterator
from contextlib import chdir, contextmanager
from pathlib import Path
from typing import Any

import torch

sys.path.append(str(Path(__file__).parents[1] / "distributed"))

from tiny_run import Settings, build, read_lines, unsettle

from torchlinearmoe import load_model
from torchlinearmoe.runtime import process_group

HERE = Path(__file__).parent
TEXT = HERE / "text"
SAVED_AT, STEPS, LENGTH = 3, 6, 16
STEP = f"run/checkpoints/step-{SAVED_AT}"
PROMPTS = [[31, 5, 9, 2, 1, 17], [31, 30, 4, 4, 22, 8]]

HEADS = {"heads": 2, "head_dim": 4}
OPTIONS: dict[str, dict[str, Any]] = {
    "based": {"feature_dim": 3},
    "delta_net": {"gate": True},
    "gated_delta_net": {"expand_v": 1.0},
    "gla": {"gate_rank": 3, "conv": 2},
    "gsa": {"slots": 4},
    "hgrn2": {"conv": 2},
    "kda": {"decay_rank": 3, "gate_rank": 3},
    "linear_attention": {"feature_map": "hedgehog", "conv": 2},
    "mamba2": {"expand": 1.0, "state": 4, "groups": 2},
    "mom_gla": {"gate_rank": 3, "num_memories": 2, "top_k": 1},
    "mom_gated_delta_net": {"num_memories": 2, "top_k": 1, "expand_v": 1.0},
    "rebased": {"feature_dim": 3, "gate": True},
    "rwkv6": {"mix_rank": 2, "decay_rank": 3},
    "rwkv7": {"decay_rank": 3, "rate_rank": 2, "value_rank": 2, "gate_rank": 3},
    "softmax_attention": {"conv": 2},
}
"""Of each mixer's two heads of 4, beside the defaults."""
TWO_LAYERS = ("hgrn2", "rwkv7")

LAYOUTS: dict[str, tuple[int, dict[str, int]]] = {
    "one process": (1, {}),
    "fsdp 2": (2, {}),
    "tensor 2": (2, {"tensor": 2}),
    "context 2": (2, {"context": 2}),
    "pipeline 2": (2, {"pipeline": 2}),
    "expert 2": (2, {"expert": 2}),
    "tensor 2, expert 2": (2, {"tensor": 2, "expert": 2}),
}


def of_mixer(name: str) -> Settings:
    """One dense layer of the mixer, or two where one says something to the next or lies on another rank."""
    layers = 2 if name in TWO_LAYERS else 1
    return {
        "model": {"mixer": name, "num_layers": layers, "tie_embeddings": True},
        "mixer": {name: {**HEADS, **OPTIONS.get(name, {})}},
    }


EXPERTS: dict[str, Any] = {"num_experts": 4, "top_k": 2, "hidden_size": 4}
LATENT = {"head_dim": 4, "qk_rope_head_dim": 2, "v_head_dim": 4, "kv_lora_rank": 4, "q_lora_rank": 3}
CASES: dict[str, tuple[str, Settings]] = {
    "based": ("one process", of_mixer("based")),
    "delta_net": ("fsdp 2", of_mixer("delta_net")),
    "gated_delta_net": ("tensor 2", of_mixer("gated_delta_net")),
    "gla": ("context 2", of_mixer("gla")),
    "gsa": ("one process", of_mixer("gsa")),
    "hgrn2": ("pipeline 2", of_mixer("hgrn2")),
    "kda": ("fsdp 2", of_mixer("kda")),
    "lightning_attention": ("one process", of_mixer("lightning_attention")),
    "linear_attention": ("tensor 2", of_mixer("linear_attention")),
    "mamba2": ("tensor 2", of_mixer("mamba2")),
    "mom_gated_delta_net": ("one process", of_mixer("mom_gated_delta_net")),
    "mom_gla": ("fsdp 2", of_mixer("mom_gla")),
    "rebased": ("one process", of_mixer("rebased")),
    "retention": ("context 2", of_mixer("retention")),
    "rwkv6": ("tensor 2", of_mixer("rwkv6")),
    "rwkv7": ("pipeline 2", of_mixer("rwkv7")),
    "softmax_attention": ("one process", of_mixer("softmax_attention")),
    "qwen2-hgrn2-LLLN": (
        "expert 2",
        {
            "model": {"mixer": "hgrn2", "layout": "LLLN", "num_layers": 4, "tie_embeddings": True},
            "moe": {
                **EXPERTS,
                "num_experts": 2,
                "top_k": 1,
                "shared_hidden_size": 4,
                "shared_gate": True,
                "z_loss_coefficient": 0.01,
            },
            "mixer": {"hgrn2": HEADS},
        },
    ),
    "deepseek_v2-mla": (
        "expert 2",
        {
            "model": {"family": "deepseek_v2", "layout": "N", "rope_original_length": 8},
            "moe": {
                **EXPERTS,
                "shared_hidden_size": 8,
                "num_groups": 2,
                "top_k_groups": 1,
                "first_dense_layers": 1,
                "balance": "bias",
                "bias_rate": 0.05,
            },
            "mixer": {"mla": LATENT},
        },
    ),
    "mixtral-softmax_attention": (
        "tensor 2, expert 2",
        {"model": {"family": "mixtral", "layout": "N", "num_layers": 1}, "moe": {**EXPERTS, "renormalize": True}},
    ),
    "llama3-tied": ("pipeline 2", {"model": {"family": "llama3", "layout": "N", "tie_embeddings": True}}),
    "llama3-messages": (
        "one process",
        {
            "model": {"family": "llama3", "layout": "N", "num_layers": 1},
            "data": {
                "paths": ["conversations.jsonl"],
                "format": "messages",
                "tokenizer": "chat.tiktoken",
                "chat_template": "turns.toml",
            },
            "training": {"sequence_length": 48, "tokens_per_step": 4 * 48},
        },
    ),
}
"""Every checkpoint: the layout it is saved by and what its recipe says besides `tables`."""


def tables(name: str) -> Settings:
    """A case's recipe: a model of a thousand parameters, six steps, a checkpoint after the third."""
    layout, changes = CASES[name]
    base: Settings = {
        "model": {
            "hidden_size": 8,
            "num_layers": 2,
            "num_heads": 2,
            "num_kv_heads": 2,
            "head_dim": 4,
            "ffn_hidden_size": 4,
            "vocab_size": 34,
            "max_length": 64,
            "norm_eps": 1e-1,
            "init_std": 0.2,
        },
        "moe": {"num_experts": 0, "top_k": 0, "hidden_size": 0, "shared_hidden_size": 0, "shared_gate": False},
        "data": {"paths": ["corpus.jsonl"], "tokenizer": "letters.tiktoken", "validation_fraction": 0.2},
        "training": {
            "steps": STEPS,
            "sequence_length": LENGTH,
            "tokens_per_step": 4 * LENGTH,
            "dtype": "float32",
            "device": "cpu",
            "output_dir": "run",
        },
        "optimizer": {"lr": 1e-2, "min_lr": 1e-3, "warmup_steps": 2},
        "parallel": dict(LAYOUTS[layout][1]),
        "checkpoint": {"interval": SAVED_AT, "keep": 9},
        "metrics": {"interval": 1, "tensorboard": False},
    }
    for section, table in changes.items():
        base[section] = {**base.get(section, {}), **table}
    return base


def train(rank: int, folder: str, recipe: Settings, fresh: bool) -> list[dict[str, Any]]:
    """Run a recipe to its end inside `folder`, on the ranks that exist; its metrics, which hold every logged step."""
    with chdir(folder):
        trainer = build(recipe)
        assert (trainer.step == 0) == fresh
        if fresh:
            for part in trainer.parts:
                unsettle(part)
        assert trainer.run() is None
        return read_lines(trainer.folder)


def resumed(folder: Path, recipe: Settings) -> list[dict[str, Any]]:
    """Go on in `folder` as one process; the steps from the checkpoint on."""
    one: Settings = {**recipe, "parallel": {}}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with process_group(torch.device("cpu")):
            lines = train(0, str(folder), one, fresh=False)
    finally:
        torch.set_num_threads(threads)
    return [line for line in lines if line["step"] > SAVED_AT]


def figures(lines: list[dict[str, Any]]) -> dict[str, list[float]]:
    """What is recorded of a run: losses, gradient norms and the held-out loss."""
    keys = ("loss", "grad_norm", "validation_loss")
    return {key: [line[key] for line in lines if key in line] for key in keys}


@torch.no_grad()
def last_logits(model: torch.nn.Module) -> list[list[float]]:
    """What a model says after each of `PROMPTS`."""
    return [[float(f"{value:.7g}") for value in row] for row in model(torch.tensor(PROMPTS))[:, -1].tolist()]


def logits_of(checkpoint: Path) -> list[list[float]]:
    """The same of a checkpoint's model."""
    return last_logits(load_model(checkpoint))


def recipe_of(checkpoint: Path) -> Settings:
    """The tables of the recipe that a checkpoint carries."""
    return tomllib.loads((checkpoint / "recipe.toml").read_text())


def expected(archive: Path) -> dict[str, Any]:
    """What was recorded beside an archive."""
    return json.loads(archive.with_suffix("").with_suffix(".json").read_text())


def pack(folder: Path, archive: Path, *names: str) -> None:
    """Files and folders of `folder` into an archive without times and owners."""

    def plain(entry: tarfile.TarInfo) -> tarfile.TarInfo:
        entry.mtime = entry.uid = entry.gid = 0
        entry.uname = entry.gname = ""
        return entry

    archive.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(archive, "x:xz", preset=9) as tar:
        for path in sorted(file for name in names for file in (folder / name).rglob("*") if file.is_file()):
            tar.add(path, str(path.relative_to(folder)), filter=plain)


def unpack(archive: Path, folder: Path) -> Path:
    """An archive's files and the text beside them, in `folder`."""
    shutil.copytree(TEXT, folder, dirs_exist_ok=True)
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    return folder


@contextmanager
def no_tokenizing() -> Iterator[None]:
    """Whoever tokenises inside fails."""
    from torchlinearmoe.data.tokenizer import TiktokenTokenizer

    def refuse(*_: Any) -> None:
        raise AssertionError("the text is tokenised again")

    names = ("encode", "encode_batch", "encode_arrays")
    usual = {name: getattr(TiktokenTokenizer, name) for name in names}
    for name in names:
        setattr(TiktokenTokenizer, name, refuse)
    try:
        yield
    finally:
        for name in names:
            setattr(TiktokenTokenizer, name, usual[name])
