"""Of all layouts that fit, the fastest is chosen, with the figures of a plan of it."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from torchlinearmoe.models.decoder import Decoder
from torchlinearmoe.parallel.mesh import Degrees
from torchlinearmoe.plan import main
from torchlinearmoe.planning import Machine, choose_layouts, plan
from torchlinearmoe.planning.communication import Collective
from torchlinearmoe.planning.context import SpanTraffic
from torchlinearmoe.planning.time import StepTime, busiest_flops, collective_seconds, step_time, trading
from torchlinearmoe.recipe import load_recipe
from torchlinearmoe.run_folder import with_tokens_per_step

RECIPES = Path(__file__).parents[2] / "recipes"
RECIPE = str(RECIPES / "qwen3_next.toml")
DEBUG = ["--model.size=debug", "--training.dtype=bfloat16"]
KEYS = ("pipeline", "tensor", "expert", "context")
# So slow a machine that layouts of a small model differ in every respect.
MACHINE = Machine(flops=1e10, node_ranks=2, node_bytes=1e8, network_bytes=3e7)


def choose(worlds: list[int], lengths: list[int], memories: list[float], *overrides: str) -> list[dict[str, Any]]:
    given = [*DEBUG, *overrides]
    fixed = {override.removeprefix("--").partition("=")[0] for override in given}
    return choose_layouts(
        lambda more: load_recipe(RECIPE, [*given, *more]), fixed, worlds, lengths, memories, torch.bfloat16, MACHINE
    )


def planned(world: int, length: int, layout: dict[str, Any], *overrides: str) -> tuple[dict[str, Any], StepTime]:
    """A plan of one layout, and its time made of what the plan says."""
    given = [f"parallel.{key}={layout[key]}" for key in KEYS]
    given += [f"training.activation_checkpointing={layout['activation_checkpointing']}"]
    recipe = load_recipe(RECIPE, [*DEBUG, *overrides, *given, f"training.sequence_length={length}"])
    found = plan(recipe, world, torch.bfloat16)
    recipe = with_tokens_per_step(recipe, found["step"]["tokens"])
    communication = found["communication"]
    with torch.device("meta"):
        model = Decoder(recipe.model)
    traded = trading([SpanTraffic(**kind) for kind in communication["spans"]])
    flops = busiest_flops(model, recipe.training, layout["context"], traded)
    collectives = [Collective(**entry) for entry in communication["collectives"]]
    return found, step_time(recipe, Degrees(**found["mesh"]), flops, collectives, MACHINE)


def test_the_fastest_of_all_layouts_that_fit_is_chosen_with_the_figures_of_its_plan() -> None:
    world, length = 4, 512
    every = []
    for expert, context in itertools.product((1, 2, 4), (1, 2)):
        for mode in ("none", "selective", "full"):
            layout: dict[str, Any] = {"pipeline": 1, "tensor": 1, "expert": expert, "context": context}
            layout["activation_checkpointing"] = mode
            found, time = planned(world, length, layout)
            every.append((found["memory"]["largest"]["total"], found["step"]["tokens"] / time.total, layout))
    sizes = sorted({size for size, _, _ in every})
    limits = [size / MACHINE.usable / 2**30 * 1.0001 for size in sizes[:: len(sizes) // 4]]
    rows = choose([world], [length], limits)
    assert not dist.is_initialized()
    for limit, row in zip(limits, rows, strict=True):
        fitting = [entry for entry in every if entry[0] <= MACHINE.usable * limit * 2**30]
        size, speed, layout = max(fitting, key=lambda entry: entry[1])
        assert row["fits"] and row["tried"] == len(every)
        assert {key: row["layout"][key] for key in layout} == layout
        assert row["memory"]["total"] == size and row["tokens_per_second"] == pytest.approx(speed)
    chosen = [tuple(row["layout"].items()) for row in rows]
    assert len(set(chosen)) > 1 and rows == sorted(rows, key=lambda row: row["tokens_per_second"])


def test_tensor_is_tried_where_nothing_fits_without() -> None:
    (alone,) = choose([4], [256], [1e-6])
    assert not alone["fits"] and "alone are" in alone["why"] and alone["tried"] == 0
    (least,) = choose([4], [256], [3e-3])
    assert not least["fits"] and "the least is" in least["why"]
    assert least["tried"] > choose([4], [256], [1.0])[0]["tried"]


@pytest.mark.parametrize("axis", ["tensor", "pipeline"])
def test_what_the_command_line_gives_stays(axis: str) -> None:
    (row,) = choose([4], [512], [1.0], f"--parallel.{axis}=2", "--training.activation_checkpointing=full")
    assert row["layout"][axis] == 2 and row["layout"]["activation_checkpointing"] == "full"
    tokens = f"training.tokens_per_step={row['tokens_per_step']}"
    found, time = planned(4, 512, row["layout"], tokens)
    assert row["memory"] == {k: v for k, v in found["memory"]["largest"].items() if k != "rank"}
    if axis == "tensor":
        assert row["seconds"]["total"] == pytest.approx(time.total)
    else:  # four micro-batches a stage, a quarter of the last stage's compute is waited for
        assert row["tokens_per_step"] == 8 * 512 * row["layout"]["data_shard"]
        assert row["seconds"]["bubble"] == pytest.approx(row["seconds"]["compute"] / 8)


def test_a_cell_that_cannot_be_says_why() -> None:
    rows = choose([2, 3], [512], [1.0], "--training.tokens_per_step=1024")
    assert rows[0]["fits"] and rows[0]["tokens_per_step"] == 1024
    assert not rows[1]["fits"] and "tokens_per_step = 1024: must be a multiple" in rows[1]["why"]


# ---------------------------------------------------------------------------------------------------------------------
# seconds


def test_the_last_span_has_what_the_whole_has_more_than_the_others() -> None:
    given = ("training.sequence_length=1024", "training.activation_checkpointing=none", "parallel.expert=1")
    recipe = load_recipe(RECIPE, [*DEBUG, *given])
    with torch.device("meta"):
        model = Decoder(recipe.model)
    longer = [dataclasses.replace(recipe.training, sequence_length=length) for length in (256, 512, 768, 1024)]
    totals = [0.0, *(training.sequence_length * busiest_flops(model, training, 1) for training in longer)]
    for spans in (2, 4):
        last = 1024 // spans * busiest_flops(model, longer[-1], spans)
        assert last == pytest.approx(totals[4] - totals[4 - 4 // spans])
    traded = busiest_flops(model, longer[-1], 4, {"softmax_attention"})
    assert traded == pytest.approx(totals[4] / 1024, rel=0.01)  # a linear layer's chunks alone
    again = {
        mode: busiest_flops(model, dataclasses.replace(longer[-1], activation_checkpointing=mode), 1)
        for mode in ("none", "selective", "full")
    }
    head = 3 * 2 * 64 * 1024
    assert again["full"] - head == pytest.approx((again["none"] - head) * 4 / 3)
    assert again["none"] < again["selective"] < again["full"]


def test_seconds_of_collectives_by_hand() -> None:
    machine = Machine(node_ranks=8, node_bytes=100.0, network_bytes=10.0)
    degrees = Degrees(pipeline=2, data_replicate=1, data_shard=8, context=4, tensor=2, expert=16)

    def seconds(axis: str, ranks: int, operation: str) -> float:
        return collective_seconds(Collective(axis, ranks, operation, 1, 0, 1000), degrees, machine)

    assert seconds("tensor", 2, "all-gather, forward") == 10  # side by side
    assert seconds("context", 4, "all-gather, forward") == 10  # every second rank: four of a node
    assert seconds("fsdp", 32, "all-gather, forward") == 25  # four of each of eight nodes, with their networks
    assert seconds("efsdp", 4, "reduce-scatter, gradients") == 100  # one a node
    assert seconds("ep", 16, "all-to-all, forward") == pytest.approx(1000 * 8 / 15 / 10)  # two nodes, half stays
    assert seconds("pipeline", 2, "send, forward") == 100
    assert StepTime(compute=3, bubble=1, sharding=5, exchange=2).total == 7
    assert StepTime(compute=3, bubble=1, sharding=2, exchange=2).total == 6


# ---------------------------------------------------------------------------------------------------------------------
# the command


def test_the_command_prints_a_table_and_json(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--world-size", "1", "2", "--sequence-length", "256", "512", "--memory", "1", "0.001"]
    assert main([RECIPE, *sizes, *DEBUG, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [(row["gpu_gib"], row["world_size"], row["sequence_length"]) for row in found["cells"]] == list(
        itertools.product((1, 0.001), (1, 2), (256, 512))
    )
    assert [row["fits"] for row in found["cells"]] == [True] * 4 + [False] * 4
    assert found["machine"]["flops"] == Machine().flops
    assert main([RECIPE, "--world-size", "2", *sizes[3:], *DEBUG]) == 0
    text = capsys.readouterr().out
    assert "GPUs of 1 GiB" in text and "GPUs of 0.001 GiB" in text and "the least is" in text
    for row in found["cells"][2:4]:
        assert f"{row['tokens_per_second'] / row['world_size']:,.0f}" in text


@pytest.mark.parametrize(
    "arguments, told",
    [
        (["--sequence-length", "0"], "--sequence-length 0: must be at least 1"),
        (["--memory", "0"], "--memory 0.0: must be above 0"),
        (["--tflops", "nan"], "--tflops nan: must be above 0"),
        (["--world-size", "2", "4", "--rank", "1"], "--rank 1: "),
    ],
)
def test_a_mistake_is_one_line(capsys: pytest.CaptureFixture[str], arguments: list[str], told: str) -> None:
    with pytest.raises(SystemExit):
        main([RECIPE, *arguments, *DEBUG])
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and told in err
