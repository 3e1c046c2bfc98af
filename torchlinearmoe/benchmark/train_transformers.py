"""Contestant: Hugging Face transformers' Qwen2MoeForCausalLM of the same shape, softmax attention in every layer.

bfloat16 weights and Adam states, fused AdamW, SDPA, its grouped expert products; eager, or with every layer compiled.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import torch

from torchlinearmoe.benchmark.contest import answer
from torchlinearmoe.benchmark.floors import softmax_twin, step_work, update_bytes
from torchlinearmoe.benchmark.labels import label_transformers, labelled
from torchlinearmoe.benchmark.peer_shapes import refuse_other_shapes
from torchlinearmoe.benchmark.profile import profile_steps
from torchlinearmoe.benchmark.timing import time_steps
from torchlinearmoe.errors import UserError
from torchlinearmoe.recipe import load_recipe


def measure(options: dict[str, Any]) -> dict[str, Any]:
    """Figures of `options`: recipe, overrides, sequences, length, steps, compile, profile.

    Raises UserError for a recipe whose shape its model cannot have.
    """
    import transformers  # pyright: ignore[reportMissingImports]

    model_recipe = load_recipe(options["recipe"], options["overrides"]).model
    refuse_other_shapes(model_recipe, "transformers' Qwen2-MoE")
    moe = model_recipe.moe
    config = transformers.Qwen2MoeConfig(
        vocab_size=model_recipe.vocab_size,
        hidden_size=model_recipe.hidden_size,
        intermediate_size=model_recipe.ffn_hidden_size,
        num_hidden_layers=model_recipe.num_layers,
        num_attention_heads=model_recipe.num_heads,
        num_key_value_heads=model_recipe.num_kv_heads,
        max_position_embeddings=model_recipe.max_length,
        rms_norm_eps=model_recipe.norm_eps,
        num_experts=moe.num_experts,
        num_experts_per_tok=moe.top_k,
        moe_intermediate_size=moe.hidden_size,
        shared_expert_intermediate_size=moe.shared_hidden_size,
        norm_topk_prob=moe.renormalize,
        mlp_only_layers=list(range(moe.first_dense_layers)),
        tie_word_embeddings=model_recipe.tie_embeddings,
        use_cache=False,
    )
    config._attn_implementation = "sdpa"
    config._experts_implementation = "grouped_mm"
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with device:
        model = transformers.Qwen2MoeForCausalLM(config).train()
    torch.set_default_dtype(torch.float32)
    if options["compile"]:
        for layer in model.model.layers:
            layer.compile()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    generator = torch.Generator().manual_seed(0)
    shape = (options["sequences"], options["length"])
    tokens = torch.randint(0, config.vocab_size, shape, generator=generator).to(device)

    def update() -> None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def step(update: Callable[[], None] = update) -> None:
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        update()

    def profile(step_s: float) -> dict[str, Any]:
        label_transformers(model, options["compile"])
        states = ((p, (optimizer.state[p]["exp_avg"], optimizer.state[p]["exp_avg_sq"])) for p in model.parameters())
        work = step_work(softmax_twin(model_recipe), tokens.numel(), options["length"], 2, update_bytes(states))
        return profile_steps(lambda: step(labelled(update, "optimizer")), device, work, step_s)

    figures = time_steps(step, steps=options["steps"], device=device)
    return {
        "tokens_per_second": tokens.numel() / figures["step_s"],
        "mfu": None,
        **figures,
        "parameters": sum(p.numel() for p in model.parameters()) / 1e9,
        **({"profile": profile(figures["step_s"])} if options["profile"] else {}),
    }


if __name__ == "__main__":
    try:
        answer(measure(json.loads(sys.argv[1])))
    except UserError as error:
        answer({"error": str(error)})
