"""A plan of a pipeline holds and sends what its real training step does, on every rank."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import RankPool
from test_plan_over_ranks import LENGTH, Recorded

from torchlinearmoe.data.packing import MicroBatch
from torchlinearmoe.moe.balance import counting_pass, needs_counting_pass
from torchlinearmoe.moe.totals import StepTotals
from torchlinearmoe.optim.build import build_optimizer
from torchlinearmoe.parallel.apply import build_parallel_model
from torchlinearmoe.parallel.context import own_part
from torchlinearmoe.parallel.inputs import Inputs
from torchlinearmoe.parallel.mesh import Meshes, resolve_degrees
from torchlinearmoe.parallel.tensor import sum_partial_gradients
from torchlinearmoe.planning import plan
from torchlinearmoe.planning.memory import local_bytes
from torchlinearmoe.recipe import Recipe, resolve

MODEL: dict[str, Any] = {"mixer": "hgrn2", "layout": "LLN", "num_layers": 5, "num_kv_heads": 2}
CASES: dict[str, tuple[int, dict[str, Any], int]] = {
    "1f1b, shards": (4, {"parallel": {"pipeline": 2}}, 4),
    "1f1b, counted first, layers run again": (
        4,
        {
            "parallel": {"pipeline": 2, "expert": 2},
            "moe": {"balance_scope": "global"},
            "training": {"activation_checkpointing": "full"},
        },
        3,
    ),
    "1f1b, tied, heads split": (
        4,
        {
            "model": {"tie_embeddings": True},
            "moe": {"balance": "none"},
            "parallel": {"pipeline": 2, "tensor": 2},
        },
        2,
    ),
    "1f1b, spans": (
        4,
        {
            "model": {"mixer": "rwkv7"},
            "moe": {"balance": "none"},
            "parallel": {"pipeline": 2, "context": 2},
        },
        2,
    ),
    "interleaved": (4, {"parallel": {"pipeline": 2, "pipeline_schedule": "interleaved"}}, 4),
    "zero bubble": (
        4,
        {"parallel": {"pipeline": 2, "pipeline_schedule": "zero_bubble", "reshard_after_forward": False}},
        4,
    ),
}


def recipe_of(name: str) -> tuple[int, Recipe]:
    size, tables, batches = CASES[name]
    degrees = tables["parallel"]
    data_ranks = size // 2 // degrees.get("tensor", 1) // degrees.get("context", 1)
    training = {"steps": 1, "sequence_length": LENGTH, "dtype": "float32", "device": "cpu"}
    training |= {"tokens_per_step": LENGTH * data_ranks * batches, **tables.get("training", {})}
    return size, resolve({**tables, "model": MODEL | tables.get("model", {}), "training": training})


class RecordedSends(Recorded):
    """Sends from rank to rank too."""

    BUFFER = {**Recorded.BUFFER, "send": 0}

    def add(self, name: str, buffers: list[torch.Tensor]) -> None:
        if any(tensor.dim() for tensor in buffers):  # the loss is not counted
            super().add(name, buffers)


def held_and_sent(rank: int, name: str) -> dict[str, Any]:
    size, recipe = recipe_of(name)
    meshes = Meshes(resolve_degrees(recipe.parallel, size), "cpu")
    built = build_parallel_model(recipe, meshes, torch.device("cpu"), torch.float32)
    modules = torch.nn.ModuleList(built.parts)
    optimizer = build_optimizer(modules, lr=1e-3)
    total = recipe.training.tokens_per_step or 0
    totals = StepTotals(total, total // LENGTH)
    inputs = []
    for _ in range(total // LENGTH // meshes.degrees.data_ranks):
        tokens = torch.randint(recipe.model.vocab_size, (LENGTH,))
        batch = own_part(MicroBatch(tokens, tokens.roll(-1), [0, 11, LENGTH], LENGTH, LENGTH), meshes, recipe.parallel)
        inputs.append(Inputs(batch.tokens, batch.labels, batch.documents(), totals))
    with RecordedSends() as recorded:
        if needs_counting_pass(modules):
            with counting_pass(modules):
                built.passes.forward(inputs)
        built.passes.forward_backward(inputs, torch.tensor(float(total)))
        sum_partial_gradients(modules)
        assert built.shared is not None
        built.shared.sum_gradients()
    dist.barrier()
    gradients = local_bytes(p.grad for p in modules.parameters() if p.grad is not None)
    optimizer.step()
    return {
        "parameters": local_bytes(modules.parameters()),
        "gradients": gradients,
        "optimizer": local_bytes(value for state in optimizer.state.values() for value in state.values()),
        "sent": recorded.sums,
    }


@pytest.mark.parametrize("name", CASES)
def test_a_real_pipeline_holds_and_sends_what_was_planned(ranks: RankPool, name: str) -> None:
    size, recipe = recipe_of(name)
    real = ranks(size, held_and_sent, name)
    called = {
        "all-gather": "_allgather_base_",
        "reduce-scatter": "_reduce_scatter_base_",
        "all-to-all": "alltoall_base_",
        "all-reduce": "allreduce_",
        "send": "send",
    }
    for rank in range(size):
        planned = plan(recipe, size, torch.float32, rank)
        own, sent = planned["memory"]["rank"], dict(real[rank]["sent"])
        assert own["parameters"] == real[rank]["parameters"] == real[rank]["gradients"]
        assert own["optimizer"] == real[rank]["optimizer"]
        expected: dict[str, list[int]] = {}
        for entry in planned["communication"]["collectives"]:
            total = expected.setdefault(called[entry["operation"].partition(",")[0]], [0, 0])
            total[0] += entry["count"]
            total[1] += entry["bytes"]
        if "alltoall_base_" in expected:  # uneven
            assert expected.pop("alltoall_base_")[0] == sent.pop("alltoall_base_")[0]
        assert sent == expected, rank
