"""A plan's bytes are those of a real sharded model and of the collectives of its real training step."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import RankPool
from tiny_run import every_run
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from torchlinearmoe.checkpoint.state import model_tensors, optimizer_tensors
from torchlinearmoe.data.packing import MicroBatch
from torchlinearmoe.models.decoder import Decoder
from torchlinearmoe.moe.balance import counting_pass, needs_counting_pass
from torchlinearmoe.moe.totals import StepTotals
from torchlinearmoe.optim.build import build_optimizer
from torchlinearmoe.optim.gradients import gradient_parts
from torchlinearmoe.parallel.apply import build_parallel_model
from torchlinearmoe.parallel.context import own_part
from torchlinearmoe.parallel.inputs import Inputs
from torchlinearmoe.parallel.mesh import Meshes, resolve_degrees, tokens_per_step
from torchlinearmoe.parallel.pipeline import micro_batches
from torchlinearmoe.parallel.tensor import sum_partial_gradients
from torchlinearmoe.planning import plan
from torchlinearmoe.planning.memory import local_bytes, parameter_bytes
from torchlinearmoe.recipe import Recipe, resolve
from torchlinearmoe.run_folder import with_tokens_per_step

LENGTH = 32
ODD = {"mixer": "hgrn2", "layout": "LN", "num_layers": 3, "hidden_size": 80, "num_heads": 5, "num_kv_heads": 1}
STAGED = {"mixer": "hgrn2", "layout": "LLN", "num_layers": 5, "num_kv_heads": 2}
CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "odd experts": (2, {"model": ODD, "moe": {"num_experts": 5}}),
    "dense, tied, kept": (
        2,
        {
            "model": {"mixer": "gated_delta_net", "tie_embeddings": True},
            "moe": {"num_experts": 0, "top_k": 0},
            "parallel": {"reshard_after_forward": False},
        },
    ),
    "replicas, accumulation, bfloat16": (
        4,
        {
            "model": {"mixer": "linear_attention", "num_layers": 2},
            "moe": {"balance_scope": "global"},
            "parallel": {"data_replicate": 2},
            "training": {"tokens_per_step": 4 * 2 * LENGTH, "dtype": "bfloat16"},
        },
    ),
    "experts spread, more ranks than experts each has, counted first": (
        4,
        {
            "model": {"mixer": "linear_attention", "num_layers": 2},
            "moe": {"balance_scope": "global", "num_experts": 2},
            "parallel": {"expert": 2},
            "training": {"tokens_per_step": 4 * 2 * LENGTH, "dtype": "bfloat16"},
        },
    ),
    "heads split, experts spread over them, shared expert": (
        4,
        {
            "model": {"mixer": "hgrn2", "num_layers": 3, "layout": "LLN"},
            "moe": {"balance_scope": "global", "shared_hidden_size": 32},
            "parallel": {"tensor": 2, "expert": 4},
            "training": {"tokens_per_step": 2 * 2 * LENGTH, "dtype": "bfloat16"},
        },
    ),
    "spans, keys gathered, counted first": (
        4,
        {
            "model": {
                "mixers": ["hgrn2", "kda", "softmax_attention", "mom_gla", "rwkv7", "rwkv7"],
                "num_layers": 6,
                "num_kv_heads": 1,
            },
            "mixer": {"mom_gla": {"balance_coefficient": 0.0}},
            "moe": {"balance_scope": "global"},
            "parallel": {"context": 2},
            "training": {"tokens_per_step": 2 * 2 * LENGTH, "dtype": "bfloat16"},
        },
    ),
    "spans, keys gathered, experts spread, every second layer run again": (
        2,
        {
            "model": {"mixers": ["rwkv7", "softmax_attention", "hgrn2"], "num_layers": 3, "num_kv_heads": 1},
            "moe": {"balance_scope": "global"},
            "parallel": {"context": 2, "expert": 2},
            "training": {
                "tokens_per_step": 2 * LENGTH,
                "activation_checkpointing": "selective",
                "activation_checkpointing_every": 2,
            },
        },
    ),
    **{
        f"heads split, experts spread over them, shared expert, layers run again: {mode}": (
            2,
            {
                "model": {"mixer": "hgrn2", "num_layers": 3, "layout": "LLN", **parts},
                "moe": {"balance_scope": "global", "shared_hidden_size": 32, **latent},
                "parallel": {"tensor": 2, "expert": 2},
                "training": {"dtype": "bfloat16", "activation_checkpointing": mode},
            },
        )
        for mode, parts, latent in (
            ("full", {"feed_forwards": ".E-", "activation": "relu2"}, {"latent_size": 16}),
            ("selective", {}, {"first_dense_layers": 1}),
        )
    },
    "spans, their heads split and traded": (
        4,
        {
            "model": {"mixer": "mamba2", "num_layers": 2, "layout": "LN", "num_heads": 4, "num_kv_heads": 4},
            "moe": {"balance_scope": "global"},
            "parallel": {"context": 2, "tensor": 2},
        },
    ),
    "heads split, norms behind, layers run again": (
        2,
        {
            "model": {"mixer": "gla", "num_layers": 2, "layout": "LN", "norm_placement": "post", "feed_forwards": "-."},
            "moe": {"num_experts": 0, "top_k": 0},
            "parallel": {"tensor": 2},
            "training": {"activation_checkpointing": "full"},
        },
    ),
    "heads split, dense, tied": (
        2,
        {
            "model": {"mixer": "retention", "tie_embeddings": True},
            "moe": {"num_experts": 0, "top_k": 0},
            "parallel": {"tensor": 2},
        },
    ),
    "heads split, dense, tied, halves of masters, rounded moments": (
        2,
        {
            "model": {"mixer": "retention", "tie_embeddings": True},
            "moe": {"num_experts": 0, "top_k": 0},
            "parallel": {"tensor": 2},
            "training": {"dtype": "bfloat16"},
            "optimizer": {"states": "bfloat16"},
        },
    ),
    "heads split, experts sharded over them, counted first": (
        2,
        {
            "model": {"mixer": "hgrn2", "num_layers": 3},
            "moe": {"balance_scope": "global"},
            "parallel": {"tensor": 2},
            "training": {"tokens_per_step": 2 * LENGTH},
        },
    ),
    "shards, gradients sent in bfloat16": (
        2,
        {
            "model": {"mixer": "hgrn2", "num_layers": 2},
            "parallel": {"reduce_dtype": "bfloat16"},
            "training": {"dtype": "bfloat16"},
        },
    ),
    "whole experts, sums of halves' gradients": (
        2,
        {
            "model": {"mixer": "linear_attention", "num_layers": 2},
            "parallel": {"expert": 2},
            "training": {"tokens_per_step": 2 * 2 * LENGTH, "dtype": "bfloat16"},
        },
    ),
    "two stages, heads split, tied, counted first, bfloat16": (
        4,
        {
            "model": {"mixer": "hgrn2", "num_layers": 4, "layout": "LLLN", "tie_embeddings": True},
            "moe": {"balance_scope": "global"},
            "parallel": {"pipeline": 2, "tensor": 2},
            "training": {"tokens_per_step": 3 * LENGTH, "dtype": "bfloat16"},
        },
    ),
    "two stages a rank, carried tensors, shards": (
        4,
        {
            "model": {"mixers": ["rwkv7", "softmax_attention", "rwkv7", "rwkv7"], "num_layers": 4},
            "moe": {"num_experts": 0, "top_k": 0},
            "parallel": {"pipeline": 2, "pipeline_schedule": "zero_bubble", "reshard_after_forward": False},
            "training": {"tokens_per_step": 2 * 2 * LENGTH},
        },
    ),
    "two stages, shards": (
        4,
        {"model": STAGED, "parallel": {"pipeline": 2}, "training": {"tokens_per_step": 2 * 4 * LENGTH}},
    ),
    "two stages, experts spread, counted first, layers run again": (
        4,
        {
            "model": STAGED,
            "moe": {"balance_scope": "global"},
            "parallel": {"pipeline": 2, "expert": 2},
            "training": {"tokens_per_step": 2 * 3 * LENGTH, "activation_checkpointing": "full"},
        },
    ),
    "two stages, spans, carried tensors": (
        4,
        {
            "model": STAGED | {"mixer": "rwkv7"},
            "moe": {"balance": "none"},  # the routers' counts are no part of a plan
            "parallel": {"pipeline": 2, "context": 2},
            "training": {"tokens_per_step": 2 * LENGTH},
        },
    ),
    "two interleaved stages a rank": (
        4,
        {
            "model": STAGED,
            "parallel": {"pipeline": 2, "pipeline_schedule": "interleaved"},
            "training": {"tokens_per_step": 2 * 4 * LENGTH},
        },
    ),
}


QUICK = every_run(
    CASES,
    "odd experts",
    "experts spread, more ranks than experts each has, counted first",
    "spans, keys gathered, experts spread, every second layer run again",
    "heads split, experts spread over them, shared expert, layers run again: selective",
    "heads split, norms behind, layers run again",
    "heads split, dense, tied, halves of masters, rounded moments",
    "heads split, experts sharded over them, counted first",
    "shards, gradients sent in bfloat16",
    "whole experts, sums of halves' gradients",
    "two stages, heads split, tied, counted first, bfloat16",
    "two stages, experts spread, counted first, layers run again",
    slow=[
        "dense, tied, kept",
        "replicas, accumulation, bfloat16",
        "spans, their heads split and traded",
        "two stages a rank, carried tensors, shards",
    ],
)


def recipe_of(name: str) -> tuple[int, Recipe, torch.dtype]:
    size, tables = CASES[name]
    training = {"steps": 1, "sequence_length": LENGTH, "dtype": "float32", "device": "cpu"} | tables.get("training", {})
    recipe = resolve(tables | {"training": training})
    recipe = with_tokens_per_step(recipe, tokens_per_step(recipe.training, resolve_degrees(recipe.parallel, size)))
    return size, recipe, torch.float32 if training["dtype"] == "float32" else torch.bfloat16


class Recorded(TorchDispatchMode):
    """Adds up the buffers of collectives, by operation, while it is entered; only those of more than one rank."""

    # Which argument of torch's collective operators is the whole buffer.
    BUFFER = {"_allgather_base_": 0, "_reduce_scatter_base_": 1, "allreduce_": 0, "alltoall_base_": 1, "send": 0}
    # Operators inside which nothing is seen.
    OPERATORS = {
        "torchlinearmoe::gather_rows": "_allgather_base_",
        "torchlinearmoe::scatter_rows": "_reduce_scatter_base_",
        "torchlinearmoe::sum_over": "allreduce_",
        "_c10d_functional::all_gather_into_tensor": "_allgather_base_",
        "_c10d_functional::reduce_scatter_tensor": "_reduce_scatter_base_",
        "_c10d_functional::all_to_all_single": "alltoall_base_",
    }

    def __init__(self) -> None:
        super().__init__()
        self.sums: dict[str, list[int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        namespace, _, name = func._schema.name.partition("::")
        if namespace == "c10d" and name in self.BUFFER:
            buffer = args[self.BUFFER[name]]
            buffers = buffer if isinstance(buffer, list) else [buffer]
            group = next(dist.ProcessGroup.unbox(x) for x in args if isinstance(x, torch.ScriptObject))
            if group.size() > 1 and buffers[0].is_floating_point() and buffers[0].dim():
                self.add(name, buffers)
        elif func._schema.name in self.OPERATORS:
            self.add(self.OPERATORS[func._schema.name], [max(args[0], result, key=torch.numel)])
        return result

    def add(self, name: str, buffers: list[torch.Tensor]) -> None:
        entry = self.sums.setdefault(name, [0, 0])
        entry[0] += 1
        entry[1] += sum(tensor.numel() * tensor.element_size() for tensor in buffers)


def held_and_sent(rank: int, name: str) -> dict[str, Any]:
    size, recipe, dtype = recipe_of(name)
    meshes = Meshes(resolve_degrees(recipe.parallel, size), "cpu")
    built = build_parallel_model(recipe, meshes, torch.device("cpu"), dtype)
    modules = nn.ModuleList(built.parts)
    optimizer = build_optimizer(built.parts, lr=1e-3, states=recipe.optimizer.states)
    degrees = meshes.degrees
    assert recipe.training.tokens_per_step is not None
    totals = StepTotals(recipe.training.tokens_per_step, recipe.training.tokens_per_step // LENGTH)

    def inputs() -> Inputs:
        tokens = torch.randint(recipe.model.vocab_size, (LENGTH,))
        batch = MicroBatch(tokens, tokens.roll(-1), [0, 11, LENGTH], LENGTH, LENGTH)
        own = own_part(batch, meshes, recipe.parallel)
        return Inputs(own.tokens, own.labels, own.documents(), totals)

    batches = [inputs() for _ in range(micro_batches(recipe, degrees))]
    with torch.device("meta"):
        counts_first = len(batches) > 1 and needs_counting_pass(Decoder(recipe.model))
    with Recorded() as recorded:
        if counts_first:
            with counting_pass(modules):
                built.passes.forward(batches)
        built.passes.forward_backward(batches, torch.tensor(recipe.training.tokens_per_step))
        sum_partial_gradients(modules)
        if built.shared is not None:
            built.shared.sum_gradients()
    found = [parts for p in modules.parameters() if (parts := gradient_parts(p)) is not None]
    gradients = local_bytes(part for parts in found for part in parts if part is not None)
    optimizer.step()
    states = local_bytes(value for state in optimizer.state.values() for value in state.values())
    saved: dict[str, torch.Tensor] = {}
    for part in built.parts:
        saved |= model_tensors(part)
    saved |= optimizer_tensors(built.parts, [optimizer])[0]
    return {
        "checkpoint": {key: tensor.numel() * tensor.element_size() for key, tensor in saved.items()},
        "parameters": parameter_bytes(modules),
        "gradients": gradients,
        "optimizer": states,
        "sent": recorded.sums,
    }


CALLED = {
    "all-gather": "_allgather_base_",
    "reduce-scatter": "_reduce_scatter_base_",
    "all-to-all": "alltoall_base_",
    "all-reduce": "allreduce_",
    "send": "send",
}


def planned_sums(collectives: list[dict[str, Any]]) -> dict[str, list[int]]:
    """Count and bytes by torch's operation."""
    sums: dict[str, list[int]] = {}
    for entry in collectives:
        total = sums.setdefault(CALLED[entry["operation"].partition(",")[0]], [0, 0])
        total[0] += entry["count"]
        total[1] += entry["bytes"]
    return sums


@pytest.mark.parametrize("name", QUICK)
def test_a_real_step_holds_and_sends_what_was_planned(ranks: RankPool, name: str) -> None:
    size, recipe, dtype = recipe_of(name)
    real = ranks(size, held_and_sent, name)
    planned = [plan(recipe, size, dtype, rank) for rank in range(size)]
    checkpoint = {key: size for entry in real for key, size in entry["checkpoint"].items()}  # of all stages
    for rank in range(size):
        own = planned[rank]["memory"]["rank"]
        assert own["parameters"] == real[rank]["parameters"]
        if planned[rank]["step"]["accumulation"] == 1:
            assert own["gradients"] == real[rank]["gradients"] + own["padding"]
        else:  # whole weights' until the last one is reduced
            assert own["gradients"] >= real[rank]["gradients"]
        assert own["optimizer"] == real[rank]["optimizer"]
        assert planned[rank]["checkpoint_bytes"] == sum(checkpoint.values())
        if recipe.parallel.pipeline == 1:
            assert planned[rank]["communication"] == planned[0]["communication"]
    found = [entry["sent"] for entry in real]
    expected = [planned_sums(entry["communication"]["collectives"]) for entry in planned]
    exchanged = [[sums.pop("alltoall_base_", [0, 0]) for sums in every] for every in (found, expected)]
    assert [count for count, _ in exchanged[0]] == [count for count, _ in exchanged[1]]
    # Uneven: only the sum over the ranks is known.
    assert sum(sent for _, sent in exchanged[0]) == sum(sent for _, sent in exchanged[1])
    assert found == expected
