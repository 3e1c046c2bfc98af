"""A plan counts what the model has, in a world of any size, without making either."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from torchlinearmoe import build_model
from torchlinearmoe.mixers import MIXERS
from torchlinearmoe.models.layer_mixers import layer_mixers
from torchlinearmoe.plan import main
from torchlinearmoe.planning import plan
from torchlinearmoe.recipe import Recipe, resolve

ROOT = Path(__file__).parents[2]
DENSE = {"num_experts": 0, "top_k": 0}
MODELS: dict[str, dict[str, Any]] = {
    "experts": {"model": {"mixer": "hgrn2", "layout": "LLN", "num_layers": 5}, "moe": {"shared_hidden_size": 32}},
    "memories": {"model": {"mixer": "mom_gla", "layout": "LN"}},
    "dense, tied": {"model": {"mixer": "gated_delta_net", "tie_embeddings": True}, "moe": DENSE},
}


def recipe_of(tables: dict[str, Any], **training: Any) -> Recipe:
    return resolve({"training": {"steps": 10, "sequence_length": 64, **training}, **tables})


def preset(size: str, mixer: str, world: int = 1, **sections: Any) -> tuple[Recipe, dict[str, Any]]:
    recipe = recipe_of({"model": {"family": "qwen2", "size": size, "mixer": mixer}, **sections})
    return recipe, plan(recipe, world, torch.bfloat16)


@pytest.mark.parametrize("name", MODELS)
def test_parameters_are_those_of_the_model(name: str) -> None:
    recipe = recipe_of(MODELS[name])
    model = build_model(recipe.model)
    counts = plan(recipe, 1, torch.float32)["parameters"]
    total = sum(p.numel() for p in model.parameters())
    assert counts["total"] == total
    kinds = counts["kinds"]
    layers = sum(
        kind["layers"] * (kind["mixer_parameters"] + kind["ffn_parameters"] + kind["norm_parameters"]) for kind in kinds
    )
    assert layers + counts["embedding"] + counts["head"] + counts["shared"] + counts["final_norm"] == total
    assert sum(kind["layers"] for kind in kinds) == recipe.model.num_layers
    assert (counts["head"] == 0) == recipe.model.tie_embeddings
    if not recipe.model.moe.num_experts:
        assert counts["active"] == total


def test_active_parameters_of_a_preset_by_hand() -> None:
    recipe, found = preset("A0.3B", "linear_attention")
    model, moe = recipe.model, recipe.model.moe
    mixer = 5 * model.hidden_size**2 + model.hidden_size // model.num_heads  # q, k, v, gate, output; the norm of a head
    expert = 3 * model.hidden_size * moe.hidden_size
    rest = model.hidden_size * (moe.num_experts + 2)  # router and norms
    outside = 2 * model.vocab_size * model.hidden_size + model.hidden_size
    counts = found["parameters"]
    assert counts["total"] == 12 * (mixer + moe.num_experts * expert + rest) + outside
    assert counts["active"] == 12 * (mixer + moe.top_k * expert + rest) + outside
    assert counts["total"] == pytest.approx(2.49e9, rel=0.01)
    assert counts["active"] == pytest.approx(0.64e9, rel=0.01)


@pytest.mark.parametrize("name", MODELS)
def test_flops_are_the_sum_of_their_terms(name: str) -> None:
    recipe = recipe_of(MODELS[name])
    flops = plan(recipe, 1, torch.float32)["flops"]
    assert sum(term["flops"] for term in flops["forward_terms"]) == pytest.approx(flops["forward_per_token"])
    assert flops["training_per_token"] == 3 * flops["forward_per_token"]
    kinds = set(layer_mixers(recipe.model))
    assert {term["name"].split()[0] for term in flops["forward_terms"]} == kinds | {"head", "feed-forward"}


def test_layers_without_a_feed_forward_are_not_counted_as_having_one(capsys: pytest.CaptureFixture[str]) -> None:
    tables = ("--world-size", "1", "--model.feed_forwards=E.", "--model.num_layers=5")
    assert main([str(ROOT / "recipes/quickstart.toml"), *tables]) == 0
    told = [line.split() for line in capsys.readouterr().out.splitlines() if line.strip().startswith("feed-forward")]
    assert [words[1] for words in told[:-1]] == ["3"] and told[-1][-2:] == ["3", "layers"]


def test_a_thousand_ranks_are_planned_without_memory_or_processes() -> None:
    _, one = preset("72B", "hgrn2")
    _, many = preset("72B", "hgrn2", 1024, parallel={"data_replicate": 4})
    assert not dist.is_initialized()
    assert many["mesh"] | {"expert": 1} == {
        "pipeline": 1,
        "data_replicate": 4,
        "data_shard": 256,
        "context": 1,
        "tensor": 1,
        "expert": 1,
    }
    assert one["parameters"] == many["parameters"] and many["parameters"]["total"] > 70e9
    # A rank holds its 256th; only parameters with fewer rows than that are held in larger parts.
    share = one["memory"]["rank"]["parameters"] / many["memory"]["rank"]["parameters"]
    assert 255 < share <= 256
    assert one["communication"]["collectives"] == []
    assert {c["axis"] for c in many["communication"]["collectives"]} == {"fsdp", "data_replicate"}


@pytest.mark.slow
def test_a_hundred_thousand_ranks_are_planned_in_seconds_with_progress() -> None:
    """Of the groups and pieces that are other ranks' none is made; what is found does not depend on it."""
    parallel = {"pipeline": 2, "tensor": 2}
    recipe = recipe_of(MODELS["dense, tied"] | {"parallel": parallel}, tokens_per_step=64 * 100_000)
    told: list[tuple[int, int]] = []
    start = time.monotonic()
    found = plan(recipe, 100_000, torch.bfloat16, progress=lambda *counts: told.append(counts))
    assert time.monotonic() - start < 30
    assert told == [(0, 2), (1, 2), (2, 2)]
    assert found["mesh"]["data_shard"] == 25_000
    assert found["memory"]["rank"]["parameters"] < plan(recipe, 400, torch.bfloat16)["memory"]["rank"]["parameters"]


def test_every_rank_is_told_what_it_holds_and_the_largest_beside_it() -> None:
    recipe = recipe_of({"model": {"hidden_size": 72, "num_heads": 4, "num_kv_heads": 2, "layout": "N"}})
    total = plan(recipe, 1, torch.float32)["memory"]["rank"]["parameters"]
    plans = [plan(recipe, 5, torch.float32, rank)["memory"] for rank in range(5)]
    held = [found["rank"]["parameters"] for found in plans]
    assert sum(held) == total and len(set(held)) > 1  # neither 72 nor 4 experts divide by 5
    assert {found["largest"]["rank"] for found in plans} == {0}
    assert {found["largest"]["parameters"] for found in plans} == {max(held)}
    # What is allocated is the same on all.
    assert len({found["rank"]["parameters"] + found["rank"]["padding"] for found in plans}) == 1


def test_memory_of_a_small_dense_model_by_hand() -> None:
    tables = {"model": {"layout": "N", "num_layers": 2, "tie_embeddings": True}, "moe": DENSE}
    tables["mixer"] = {"softmax_attention": {"qkv_bias": False}}
    width, hidden, vocab, tokens = 64, 160, 1024, 2 * 64
    block = 4 * width * width * 3 // 4 + 3 * width * hidden + 2 * width  # q, o of 64; k, v of 32
    root = vocab * width + width
    whole = 2 * block + root
    found = plan(recipe_of(tables, micro_batch_size=2), 2, torch.bfloat16)["memory"]["rank"]
    assert found["parameters"] == found["gradients"] == 4 * whole // 2 and found["padding"] == 0
    names = 2 * (2 + 4 + 3) + 2  # parameters, each with a step count of 4 bytes
    assert found["optimizer"] == 2 * found["parameters"] + 4 * names
    assert found["gathered_weights"] == 2 * whole  # two blocks and the root, which is kept
    assert found["gradient_buffers"] == (2 + 4) * max(block, root)
    mixer = 64 + 32 + 32 + 64  # q, k, v, and o's input
    assert found["activations"] == tokens * 2 * (2 * width + 2 * (4 * width + mixer + 4 * hidden))
    assert found["loss"] == tokens * vocab * 2 * (2 + 4) + 2 * tokens * width + 2 * vocab * width
    assert plan(recipe_of(tables), 2, torch.bfloat16)["checkpoint_bytes"] == 3 * 4 * whole + 4 * names
    assert found["total"] == sum(size for row, size in found.items() if row not in ("rank", "total"))
    accumulating = plan(recipe_of(tables, micro_batch_size=2, tokens_per_step=4 * 64 * 2), 2, torch.bfloat16)
    assert accumulating["step"]["accumulation"] == 2
    assert accumulating["memory"]["rank"]["gradients"] == 4 * whole


def test_the_run_is_the_one_that_training_does() -> None:
    recipe = resolve({"training": {"tokens": 100_000, "sequence_length": 128, "tokens_per_step": 128 * 2 * 4 * 3}})
    recipe_2 = resolve({"training": {"steps": 7, "sequence_length": 128, "micro_batch_size": 2}})
    found = plan(recipe, 4, torch.float32)
    assert found["step"]["accumulation"] == 6 and found["step"]["tokens"] == 3072
    assert found["run"] == {"steps": 33, "tokens": 33 * 3072}
    assert plan(recipe_2, 4, torch.float32)["run"] == {"steps": 7, "tokens": 7 * 128 * 2 * 4}


# ---------------------------------------------------------------------------------------------------------------------
# the command


def test_the_command_prints_tables_and_json(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [str(ROOT / "recipes/quickstart.toml"), "--world-size", "2", "--training.dtype=bfloat16"]
    assert main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["dtype"] == "bfloat16" and found["world_size"] == 2
    assert main(arguments) == 0
    text = capsys.readouterr().out
    for told in (
        f"{found['parameters']['total']:,}",
        "all-gather, backward",
        "reduce-scatter",
        "MiB",
    ):
        assert told in text


@pytest.mark.parametrize(
    "arguments, told",
    [
        (["no-such.toml"], "no-such.toml: cannot be read"),
        (["{recipe}", "--world-size", "6", "--parallel.data_replicate=4"], "does not divide 6 ranks"),
        (["{recipe}", "--world-size", "4", "--parallel.data_shard=3"], "not to 4 ranks"),
        (["{recipe}", "--world-size", "3"], "training.tokens_per_step = 4096: must be a multiple"),
        (["{recipe}", "--world-size", "0"], "--world-size 0"),
        (["{recipe}", "--world-size", "2", "--rank", "2"], "rank = 2"),
        (["{recipe}", "--model.num_layer=3"], "did you mean 'num_layers'"),
    ],
)
def test_a_mistake_is_one_line(capsys: pytest.CaptureFixture[str], arguments: list[str], told: str) -> None:
    recipe = ROOT / "recipes/quickstart.toml"
    with pytest.raises(SystemExit) as stopped:
        main([argument.format(recipe=recipe) for argument in arguments])
    out, err = capsys.readouterr()
    assert stopped.value.code == 1 and out == ""
    assert err.count("\n") == 1 and err.startswith("error: ") and told in err
    assert not dist.is_initialized()


@pytest.mark.parametrize("mixer", MIXERS)
def test_linear_layers_exchange_as_much_for_long_sequences_as_for_short_ones(mixer: str) -> None:
    def between_spans(length: int, context: int) -> list[dict[str, Any]]:
        tables = {
            "model": {"mixer": mixer, "layout": "L", "num_layers": 2},
            "parallel": {"context": context},
            "training": {"steps": 1, "sequence_length": length},
        }
        return plan(recipe_of(tables), context, torch.float32)["communication"]["spans"]

    # From four ranks on a sequence passes through whole spans.
    (*_, short), (*_, long), (*_, wide) = between_spans(64, 4), between_spans(128, 4), between_spans(64, 8)
    assert short["calls"] == long["calls"] and sum(short["bytes"].values()) > 0
    if MIXERS[mixer].keeps_past:
        assert all(long["bytes"][operation] == 2 * size for operation, size in short["bytes"].items())
    else:
        assert short["bytes"] == long["bytes"]
        assert all(wide["bytes"][operation] == 2 * size for operation, size in short["bytes"].items())
    assert between_spans(64, 1) == []


def test_a_window_is_gathered_and_not_the_whole_sequence() -> None:
    def gathered(length: int, window: int) -> int:
        tables = {
            "model": {"layout": "N", "num_layers": 1},
            "mixer": {"softmax_attention": {"window": window}},
            "parallel": {"context": 2},
            "training": {"steps": 1, "sequence_length": length},
        }
        (layer,) = plan(recipe_of(tables), 2, torch.float32)["communication"]["spans"]
        return layer["bytes"].get("all-gather, forward", 0)

    assert gathered(64, 17) == gathered(128, 17) == 16 * gathered(64, 2)
    assert gathered(64, 1) == 0


def test_lists_of_numbers_leave_the_recipe_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--world-size", "1", "recipes/quickstart.toml", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["world_size"] == 1
