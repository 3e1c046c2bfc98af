"""Weights from elsewhere fall into place on any layout, and what two ranks train leaves again."""

from pathlib import Path
from typing import Any

import pytest
import torch
from harness import RankPool
from tiny_run import Settings, build, settings, whole, write_corpus
from torch import Tensor

from torchlinearmoe import load_model
from torchlinearmoe.checkpoint.huggingface.exporting import export_checkpoint
from torchlinearmoe.generation import generate

SPARSE = {"num_experts": 4, "hidden_size": 16, "shared_hidden_size": 16, "shared_gate": True}
UPCYCLED = {"num_experts": 4, "hidden_size": 40, "shared_hidden_size": 0, "shared_gate": False}


LATENT: Settings = {
    "model": {
        "family": "deepseek_v2",
        "rope_scaling": "none",
        "rope_theta": 1e4,
        "ffn_hidden_size": 40,
        "num_kv_heads": 2,
    },
    "moe": {**SPARSE, "shared_gate": False, "num_groups": 2, "top_k_groups": 1, "first_dense_layers": 1},
    "mixer": {"mla": {"head_dim": 12, "qk_rope_head_dim": 4, "v_head_dim": 16, "kv_lora_rank": 20, "q_lora_rank": 14}},
}


def publish(folder: Path, kind: str) -> Path:
    """A random published model of the shape of the tiny runs."""
    import transformers  # the ranks import this file too, and have no use for it

    dimensions: dict[str, Any] = {
        "vocab_size": 1024,
        "hidden_size": 32,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "intermediate_size": 40,
        "max_position_embeddings": 1024,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    }
    if kind == "dense":
        config: Any = transformers.Qwen2Config(**dimensions)
    elif kind == "sparse":
        experts: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "shared_expert_intermediate_size": 16}
        config = transformers.Qwen2MoeConfig(**dimensions, **experts, moe_intermediate_size=16)
    else:
        experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "first_k_dense_replace": 1}
        groups = {"topk_method": "group_limited_greedy", "n_group": 2, "topk_group": 1}
        latent = {**LATENT["mixer"]["mla"]}
        latent["qk_nope_head_dim"] = latent.pop("head_dim")
        config = transformers.DeepseekV2Config(**dimensions, **experts, **groups, **latent, moe_intermediate_size=16)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def started(rank: int, tables: Settings) -> dict[str, Tensor]:
    """Whole parameters of a fresh run, of the layers that this rank has a part of."""
    trainer = build(tables)
    state = {name: whole(value) for part in trainer.parts for name, value in part.state_dict().items()}
    trainer.metrics.close()
    return state


def train(rank: int, tables: Settings) -> None:
    build(tables).run()


@pytest.mark.parametrize("kind", ["sparse", "dense"])
def test_any_layout_starts_where_one_process_does(ranks: RankPool, tmp_path: Path, kind: str) -> None:
    source = publish(tmp_path / "published", kind)
    corpus = write_corpus(tmp_path, documents=40)
    checkpoint = {"init_from": str(source), "upcycle_noise": 0.0 if kind == "sparse" else 0.02}
    moe = SPARSE if kind == "sparse" else UPCYCLED
    change: Settings = {"model": {"num_kv_heads": 2}, "moe": moe, "checkpoint": checkpoint}
    (expected,) = ranks(1, started, settings(corpus, tmp_path / "one", change))
    for axes in ({"expert": 2}, {"pipeline": 2}, {"tensor": 2, "data_shard": 2}):
        world_size = 4 if len(axes) > 1 else 2
        tables = settings(corpus, tmp_path / "-".join(axes), change, {"parallel": axes})
        states = ranks(world_size, started, tables)
        assert set[str]().union(*states) == expected.keys()
        for name, value in ((name, value) for state in states for name, value in state.items()):
            assert torch.equal(value, expected[name]), (axes, name)


@pytest.mark.parametrize("layout", ["N", "LLLN"])
@pytest.mark.parametrize("kind", ["sparse", "latent"])
def test_what_two_ranks_trained_from_a_directory_is_a_directory_again(
    ranks: RankPool, tmp_path: Path, kind: str, layout: str
) -> None:
    import transformers

    source = publish(tmp_path / "published", kind)
    corpus = write_corpus(tmp_path, documents=40)
    base = LATENT if kind == "latent" else {"model": {"num_kv_heads": 2}, "moe": SPARSE}
    change: Settings = {
        **base,
        "model": {**base["model"], "layout": layout},
        "training": {"steps": 2},
        "checkpoint": {"init_from": str(source)},
        "parallel": {"tensor": 2 if kind == "latent" else 1},
    }
    ranks(2, train, settings(corpus, tmp_path / "run", change))
    checkpoint = tmp_path / "run" / "checkpoints" / "step-2"
    ours = load_model(checkpoint)
    export_checkpoint(checkpoint, tmp_path / "exported")
    load: Any = transformers.AutoModelForCausalLM.from_pretrained
    before, theirs = load(source), load(tmp_path / "exported", trust_remote_code=layout != "N")
    assert type(theirs).__name__ == (type(before).__name__ if layout == "N" else "TorchLinearMoEForCausalLM")
    tokens = torch.randint(1024, (2, 30))
    torch.testing.assert_close(theirs(tokens).logits, ours(tokens), atol=1e-4, rtol=0)
    assert (before(tokens).logits - theirs(tokens).logits).abs().max() > 1e-2  # it was trained
    found = theirs.generate(tokens, max_new_tokens=8, do_sample=False, eos_token_id=None)
    assert found[:, 30:].t().tolist() == list(generate(ours, tokens.tolist(), 8))
