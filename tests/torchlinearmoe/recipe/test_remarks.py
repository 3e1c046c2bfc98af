"""What a recipe says in vain: refused on the command line, told of a file, and nothing of what is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from torchlinearmoe import load_recipe
from torchlinearmoe.errors import RecipeError
from torchlinearmoe.recipe import Recipe, dump, resolve
from torchlinearmoe.recipe.parse import parse_overrides
from torchlinearmoe.recipe.remarks import remarks
from torchlinearmoe.run_folder import with_tokens_per_step

ROOT = Path(__file__).parents[3]
STEPS = {"steps": 10}
VAIN: list[tuple[str, Any, str, list[str]]] = [
    ("model.mixer", "gla", "an L in model.layout", ["model.layout=N"]),
    ("model.mixer", "gla", "no model.mixers", ["model.mixers=['hgrn2', 'hgrn2']"]),
    ("model.layout", "LN", "without model.mixers", ["model.mixers=['hgrn2', 'hgrn2']"]),
    ("model.rope_factor", 7.0, "model.rope_scaling", []),
    ("model.rope_original_length", 77, "model.rope_scaling", []),
    ("model.rope_beta_slow", 0.5, "model.rope_scaling", []),
    ("model.rope_beta_fast", 99.0, "model.rope_scaling", []),
    ("model.rope_mscale", 0.7, "model.rope_scaling = 'yarn'", ["model.rope_scaling=llama3"]),
    ("model.embed_init_std", 0.5, "model.tie_embeddings = false", ["model.tie_embeddings=true"]),
    ("model.ffn_hidden_size", 64, "layers without experts", []),
    ("moe.top_k", 2, "moe.num_experts", ["moe.num_experts=0"]),
    ("moe.balance", "bias", "moe.num_experts", ["moe.num_experts=0"]),
    ("moe.top_k_groups", 2, "moe.num_groups", []),
    ("moe.balance_coefficient", 0.5, "moe.balance = 'loss'", ["moe.balance=bias"]),
    ("moe.balance_scope", "global", "moe.balance = 'loss'", ["moe.balance=none"]),
    ("moe.bias_rate", 0.5, "moe.balance = 'bias'", []),
    ("moe.drop_policy", "position", "moe.capacity_factor or moe.eval_capacity_factor", []),
    ("data.chat_template", "plain", "data.format = 'messages'", []),
    ("training.compile_backend", "eager", "training.compile = true", []),
    ("training.activation_checkpointing_every", 2, "training.activation_checkpointing", []),
    ("optimizer.decay_fraction", 0.5, "optimizer.schedule = 'wsd'", []),
    ("optimizer.min_lr", 1e-5, "another optimizer.schedule than 'constant'", ["optimizer.schedule=constant"]),
    ("parallel.context_attention", "heads", "parallel.context above 1", []),
    ("parallel.context_states", "bfloat16", "parallel.context above 1", []),
    ("parallel.pipeline_schedule", "interleaved", "parallel.pipeline above 1", []),
    ("parallel.pipeline_stages_per_rank", 2, "parallel.pipeline above 1", []),
    ("checkpoint.upcycle_noise", 0.1, "checkpoint.init_from", []),
]
"""(key, value, what it needs, what else is said)."""


def _tables(key: str, value: Any) -> dict[str, Any]:
    section, _, name = key.partition(".")
    tables: dict[str, Any] = {"training": {**STEPS}}
    tables.setdefault(section, {})[name] = value
    return tables


def _remarks(recipe: Recipe) -> list[str]:
    return list(remarks(with_tokens_per_step(recipe, 2048)))


@pytest.mark.parametrize(("key", "value", "needs", "beside"), VAIN, ids=str)
def test_a_key_that_is_not_read_is_refused_on_the_command_line(key: str, value: Any, needs: str, beside: list[str]):
    with pytest.raises(RecipeError) as caught:
        resolve({"training": STEPS}, parse_overrides([f"{key}={value}", *beside]))
    assert str(caught.value).startswith(f"{key} = {value!r}: not read; it needs ") and needs in str(caught.value)


@pytest.mark.parametrize(("key", "value", "needs", "beside"), VAIN, ids=str)
def test_a_key_of_a_file_that_is_not_read_is_told(key: str, value: Any, needs: str, beside: list[str]):
    told = [line for line in _remarks(resolve(_tables(key, value), parse_overrides(beside))) if line.startswith(key)]
    brought = key in ("model.ffn_hidden_size", "moe.top_k") or key.startswith("model.rope")
    assert len(told) == (not brought and key != "model.layout") and all(needs in line for line in told)


@pytest.mark.parametrize(
    "overrides",
    [
        ["model.mixer=gla", "model.layout=LN"],
        ["model.rope_scaling=yarn", "model.rope_factor=7.0", "model.rope_mscale=0.7"],
        ["model.embed_init_std=0.5", "model.tie_embeddings=false"],
        ["model.ffn_hidden_size=64", "moe.first_dense_layers=1"],
        ["moe.num_experts=0", "moe.top_k=0", "moe.hidden_size=0", "moe.shared_gate=false", "model.ffn_hidden_size=64"],
        ["moe.balance=bias", "moe.bias_rate=0.5"],
        ["moe.balance_coefficient=0.5", "moe.balance_scope=global"],
        ["moe.eval_capacity_factor=2.0", "moe.drop_policy=position"],
        ["data.format=messages", "data.chat_template=plain"],
        ["training.compile=true", "training.compile_backend=eager"],
        ["optimizer.schedule=wsd", "optimizer.decay_fraction=0.5", "optimizer.warmup_steps=10"],
        ["optimizer.schedule=constant", "optimizer.lr=1e-6"],
        ["parallel.context=2", "parallel.context_states=bfloat16"],
        ["parallel.pipeline=2", "parallel.pipeline_schedule=interleaved", "parallel.pipeline_stages_per_rank=2"],
        ["checkpoint.init_from=weights", "checkpoint.upcycle_noise=0.1"],
        ["mixer.hgrn2.conv=4"],
        ["model.mixer=mom_gla", "mixer.mom_gla.inner=gsa", "mixer.gsa.conv=4"],
    ],
    ids=str,
)
def test_what_is_read_is_taken_in_silence(overrides: list[str]):
    assert _remarks(resolve({"training": STEPS}, parse_overrides(overrides))) == []


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.toml")), ids=lambda path: path.stem)
def test_recipes_that_ship_say_nothing_in_vain(path: Path, tmp_path: Path):
    recipe = load_recipe(path)
    assert _remarks(recipe) == []
    written = tmp_path / "recipe.toml"
    written.write_text(dump(recipe))
    assert load_recipe(written) == recipe


def test_options_of_mixers_not_in_use_are_refused_on_the_command_line_alone():
    said = {"mixer": {"gla": {"conv": 4}}, "training": STEPS}
    assert _remarks(resolve(said)) == []
    with pytest.raises(RecipeError) as caught:
        resolve({"training": STEPS, "model": {"layout": "LN"}}, {"mixer": {"gla": {"conv": 4}}})
    assert str(caught.value) == "mixer.gla.conv = 4: no layer runs gla; in use: hgrn2, softmax_attention"


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["moe.top_k=1", "moe.renormalize=true"], "moe.renormalize = true: with moe.top_k = 1 every weight is 1"),
        (["moe.balance=bias", "moe.bias_rate=0"], "moe.bias_rate = 0: the selection bias never moves"),
        (["optimizer.lr=0", "optimizer.min_lr=0"], "optimizer.lr = 0: the weights stay as they are"),
        (
            ["optimizer.warmup_steps=40"],
            "optimizer.warmup_steps = 40: longer than the run, which ends at 25% of optimizer.lr = 0.0003",
        ),
        (
            ["optimizer.warmup_tokens=22000", "training.tokens=20000"],
            "optimizer.warmup_tokens = 22000: longer than the run, which ends at 91% of optimizer.lr = 0.0003",
        ),
    ],
    ids=str,
)
def test_values_that_leave_nothing_to_do_are_told(overrides: list[str], line: str):
    (told,) = _remarks(resolve({"training": STEPS}, parse_overrides(overrides)))
    assert told.startswith(line)
