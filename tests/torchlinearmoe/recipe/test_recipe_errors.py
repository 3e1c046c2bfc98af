"""A recipe that cannot run is refused in one line that names the field, the value and the way out, and nothing else."""

from __future__ import annotations

import dataclasses
import math
import random
import re
import tomllib
import typing
from pathlib import Path
from typing import Any

import pytest

from torchlinearmoe import MIXERS, load_recipe
from torchlinearmoe.errors import RecipeError
from torchlinearmoe.recipe import dump, resolve
from torchlinearmoe.recipe.parse import NESTED, SECTIONS, parse_overrides

STEPS = {"training": {"steps": 10}}


def _refused(file: dict[str, Any], *fragments: str) -> str:
    merged = {**STEPS, **file} if "training" not in file else {**file, "training": {"steps": 10, **file["training"]}}
    with pytest.raises(RecipeError) as caught:
        resolve(merged)
    message = str(caught.value)
    assert "\n" not in message
    for fragment in fragments:
        assert fragment in message
    return message


def test_unknown_names_are_told_with_the_closest_legal_one():
    _refused({"modle": {}}, "[modle]", "did you mean 'model'?")
    _refused({"model": {"num_layer": 3}}, "model.num_layer: ", "did you mean 'num_layers'?")
    _refused({"model": {"moe": 3}}, "model.moe: unknown key")
    _refused({"model": {"mixer_options": {}}}, "model.mixer_options: unknown key")
    _refused({"mixer": {"hgrn": {}}}, "[mixer.hgrn]", "did you mean 'hgrn2'?")
    _refused({"mixer": {"hgrn2": {"convs": 1}}}, "mixer.hgrn2.convs: ", "did you mean 'conv'?")
    _refused({"mixer": {"lasp2": {}}}, "[mixer.lasp2]", "[mixer.linear_attention]")
    _refused({"model": {"family": "qwenn2"}}, "model.family = 'qwenn2'", "did you mean 'qwen2'?")
    _refused({"model": {"size": "A0.3"}}, "model.size = 'A0.3'", "did you mean 'A0.3B'?")
    _refused({"model": {"mixer": "hgrn3"}}, "model.mixer = 'hgrn3'", "did you mean 'hgrn2'?")
    _refused({"model": {"mixers": ["hgrn2", "nonsense"]}}, "model.mixers[1] = 'nonsense'", "legal: ")
    _refused({"optimizer": {"schedule": "cosin"}}, "optimizer.schedule = 'cosin'", "did you mean 'cosine'?")
    _refused({"optimizer": {"name": "zzz"}}, "optimizer.name = 'zzz'", "legal: adamw")
    _refused({"model": {"attention_backend": "flash"}}, "model.attention_backend = 'flash'", "legal: auto, cudnn, ")
    _refused({"model": {"attention_backend": "varlan"}}, "model.attention_backend = ", "did you mean 'varlen'?")
    _refused({"moe": {"backend": "zzz"}}, "moe.backend = 'zzz': not a legal value; legal: auto, grouped_mm, loop")
    _refused({"model": {"a\nb": 1}}, "model.a b: unknown key")


@pytest.mark.parametrize(
    ("section", "key", "value", "wanted"),
    [
        ("training", "sequence_length", "many", "a whole number"),
        ("training", "sequence_length", 2.0, "a whole number"),
        ("training", "sequence_length", True, "a whole number"),
        ("training", "sequence_length", 2**63, "must fit in 64"),
        ("optimizer", "lr", "fast", "a number"),
        ("optimizer", "lr", False, "a number"),
        ("optimizer", "lr", math.nan, "finite"),
        ("optimizer", "lr", math.inf, "finite"),
        ("optimizer", "lr", 10**400, "must fit in 64"),
        ("optimizer", "betas", 0.9, "a list"),
        ("optimizer", "betas", [0.9], "2 entries"),
        ("optimizer", "betas", [0.9, "b"], "a number"),
        ("metrics", "tensorboard", 1, "true or false"),
        ("training", "output_dir", 5, "a string"),
        ("data", "paths", "a", "a list"),
        ("data", "paths", [1], "a string"),
        ("model", "mixer", ["hgrn2"], "a string"),
        ("moe", "capacity_factor", "big", "a number"),
        ("training", "tokens_per_step", {}, "a whole number"),
    ],
)
def test_a_value_of_the_wrong_kind_is_named(section: str, key: str, value: Any, wanted: str):
    message = _refused({section: {key: value}}, wanted)
    assert message.startswith(f"{section}.{key}")


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        *[("model", key, 0) for key in ("hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim")],
        *[
            ("model", key, 0)
            for key in ("vocab_size", "max_length", "rope_theta", "norm_eps", "init_std", "embed_init_std")
        ],
        ("model", "num_kv_heads", 3),
        ("model", "head_dim", -2),
        ("model", "layout", ""),
        ("model", "layout", "LLX"),
        ("moe", "top_k", 0),
        ("moe", "top_k", 5),
        ("moe", "num_experts", -1),
        ("moe", "hidden_size", 0),
        ("moe", "hidden_size", -1),
        ("moe", "shared_hidden_size", -1),
        ("moe", "shared_gate", True),
        ("moe", "routed_scaling", 0.0),
        ("moe", "num_groups", 3),
        ("moe", "num_groups", -1),
        ("moe", "top_k_groups", -1),
        ("moe", "first_dense_layers", 4),
        ("moe", "first_dense_layers", -1),
        ("model", "rope_beta_slow", 0),
        ("model", "rope_mscale", -1),
        ("moe", "capacity_factor", 0.0),
        ("moe", "eval_capacity_factor", -1),
        ("moe", "balance_coefficient", -0.1),
        ("data", "validation_fraction", -0.1),
        ("data", "validation_fraction", 1.0),
        ("data", "workers", -1),
        ("data", "paths", [""]),
        ("data", "paths", ["text", ""]),
        ("training", "steps", 0),
        ("training", "tokens_per_step", 0),
        ("training", "sequence_length", 0),
        ("training", "micro_batch_size", 0),
        ("training", "seed", -1),
        ("training", "output_dir", ""),
        ("optimizer", "lr", -1.0),
        ("optimizer", "min_lr", 1.0),
        ("optimizer", "eps", 0.0),
        ("optimizer", "betas", [0.9, 1.0]),
        ("optimizer", "warmup_steps", -1),
        ("optimizer", "decay_fraction", 0.0),
        ("parallel", "data_replicate", 0),
        ("parallel", "data_shard", 0),
        ("parallel", "data_shard", -2),
        ("parallel", "pipeline_stages_per_rank", -1),
        ("checkpoint", "keep", 0),
        ("checkpoint", "interval", -1),
        ("metrics", "interval", 0),
        ("metrics", "profile_steps", [1]),
        ("metrics", "profile_steps", [3, 2]),
        ("metrics", "profile_steps", [0, 2]),
        ("metrics", "peak_tflops", 0),
        ("metrics", "memory_snapshot_step", 0),
    ],
)
def test_a_value_out_of_range_is_named(section: str, key: str, value: Any):
    message = _refused({section: {key: value}})
    assert message.startswith(f"{section}.{key}") or f"{section}.{key}" in message


@pytest.mark.parametrize(
    ("key", "value"), [("rope_factor", 0.5), ("rope_original_length", 0), ("rope_beta_slow", 32.0), ("rope_theta", 1.0)]
)
def test_a_rope_scaling_that_cannot_be_is_named(key: str, value: Any):
    for kind in ("yarn", "llama3"):
        assert _refused({"model": {"rope_scaling": kind, key: value}}).startswith(f"model.{key} = {value}: ")
    assert resolve({"model": {key: value}, **STEPS}).model.rope_scaling == "none"


@pytest.mark.parametrize(
    ("moe", "field"),
    [
        ({"num_groups": 2, "top_k_groups": 0}, "moe.top_k_groups = 0: "),
        ({"num_groups": 2, "top_k_groups": 3}, "moe.top_k_groups = 3: "),
        ({"num_groups": 4, "top_k_groups": 1}, "moe.top_k = 2: the 1 groups of a token have 1 experts"),
        ({"num_groups": 8, "top_k_groups": 1}, "moe.num_groups = 8: must divide moe.num_experts = 4"),
    ],
    ids=str,
)
def test_groups_of_experts_that_cannot_be_are_named(moe: dict[str, Any], field: str):
    assert _refused({"moe": moe}).startswith(field)


@pytest.mark.parametrize(
    ("tables", "field"),
    [
        ({"model": {"feed_forwards": ""}}, "model.feed_forwards = '': must be a non-empty string over E, -, ."),
        ({"model": {"feed_forwards": "EX"}}, "model.feed_forwards = 'EX': must be a non-empty string over E, -, ."),
        ({"model": {"feed_forwards": ".-"}}, "model.feed_forwards = '.-': leaves no layer to the experts"),
        (
            {"model": {"feed_forwards": "E..."}, "moe": {"first_dense_layers": 1}},
            "model.feed_forwards = 'E...': leaves no layer to the experts",
        ),
        ({"model": {"feed_forwards": "E" * 5000}}, "model.feed_forwards: names 5000 layers; at most 4096"),
        ({"model": {"feed_forwards": "E-", "ffn_hidden_size": 0}}, "model.ffn_hidden_size = 0: must be at least 1"),
        ({"moe": {"latent_size": -1}}, "moe.latent_size = -1: must not be negative"),
        ({"model": {"activation": "gelu"}}, "model.activation = 'gelu'"),
        ({"model": {"logit_divisor": 0.0}}, "model.logit_divisor = 0.0: must be positive"),
        ({"mixer": {"softmax_attention": {"scale": -0.5}}}, "mixer.softmax_attention.scale = -0.5: must not be"),
    ],
    ids=str,
)
def test_parts_of_layers_that_cannot_be_are_named(tables: dict[str, Any], field: str):
    layout = {"model": {"layout": "N"}} if "mixer" in tables else {}
    assert _refused({**layout, **tables}).startswith(field)


def test_dense_layers_need_a_width():
    message = _refused({"model": {"ffn_hidden_size": 0}, "moe": {"first_dense_layers": 1}})
    assert message == "model.ffn_hidden_size = 0: must be at least 1 in dense layers"
    assert resolve({"model": {"ffn_hidden_size": 0}, **STEPS}).model.moe.num_experts


@pytest.mark.parametrize(
    ("mixer", "options", "field"),
    [
        ("hgrn2", {"conv": -1}, "mixer.hgrn2.conv = -1"),
        ("hgrn2", {"heads": 3}, "mixer.hgrn2.heads"),
        ("gated_delta_net", {"value_heads": 3}, "mixer.gated_delta_net.value_heads = 3"),
        ("gated_delta_net", {"value_heads": -4}, "mixer.gated_delta_net.value_heads = -4"),
        ("gated_delta_net", {"expand_v": 0.0}, "mixer.gated_delta_net.expand_v = 0.0"),
        ("gated_delta_net", {"expand_v": 1e308}, "mixer.gated_delta_net.expand_v = 1e+308"),
        ("linear_attention", {"expand_v": 0.3}, "mixer.linear_attention.expand_v = 0.3"),
        ("linear_attention", {"normalize": True, "feature_map": "silu"}, "mixer.linear_attention.normalize = true"),
        ("linear_attention", {"feature_map": "el"}, "mixer.linear_attention.feature_map = 'el'"),
        ("softmax_attention", {"kv_heads": 3}, "mixer.softmax_attention.kv_heads = 3"),
        ("softmax_attention", {"heads": -4}, "mixer.softmax_attention.heads = -4"),
        ("softmax_attention", {"head_dim": 7}, "mixer.softmax_attention.head_dim = 7"),
        ("mla", {"qk_rope_head_dim": 7}, "mixer.mla.qk_rope_head_dim = 7: must be even"),
        ("mla", {"kv_lora_rank": 0}, "mixer.mla.kv_lora_rank = 0"),
        ("mla", {"q_lora_rank": -1}, "mixer.mla.q_lora_rank = -1"),
    ],
)
def test_mixer_options_that_cannot_be_built_are_named(mixer: str, options: dict[str, Any], field: str):
    message = _refused({"model": {"mixer": mixer}, "mixer": {mixer: options}})
    assert message.startswith(field)


@pytest.mark.parametrize(
    "override", ["model", "--model", "model=1", "--=1", "model.=1", ".a=1", "model..a=1", "--model.a", "="]
)
def test_an_override_that_is_none_is_quoted(override: str):
    with pytest.raises(RecipeError, match=f"^'{re.escape(override)}'"):
        parse_overrides([override])


def test_an_override_inside_another_is_refused():
    with pytest.raises(RecipeError, match="is given a value elsewhere"):
        parse_overrides(["mixer.hgrn2=1", "mixer.hgrn2.conv=4"])
    with pytest.raises(RecipeError, match=r"^mixer.hgrn2: must be a section"):
        resolve(STEPS, parse_overrides(["mixer.hgrn2.conv=4", "mixer.hgrn2=1"]))


def test_a_value_with_a_second_line_is_one_string():
    assert parse_overrides(["a.b=1\nc = 2"]) == {"a": {"b": "1\nc = 2"}}


def test_files_that_are_no_recipe_are_named(tmp_path: Path):
    with pytest.raises(RecipeError, match="missing.toml: cannot be read"):
        load_recipe(tmp_path / "missing.toml")
    with pytest.raises(RecipeError, match="cannot be read"):
        load_recipe(tmp_path)
    path = tmp_path / "bad.toml"
    for content, wanted in ((b"[model\n", "not valid TOML"), (b"a = '\xff\xfe'", "not UTF-8"), (b"steps = 1", "steps")):
        path.write_bytes(content)
        with pytest.raises(RecipeError, match=wanted):
            load_recipe(path)


def test_text_beyond_ascii_is_read_whatever_the_locale(tmp_path: Path):
    path = tmp_path / "r.toml"
    path.write_bytes('[training]\nsteps = 1\noutput_dir = "läufe/日本"\n'.encode())
    assert load_recipe(path).training.output_dir == "läufe/日本"


@pytest.mark.parametrize("seed", range(8))
def test_random_tables_give_a_recipe_or_a_recipe_error(seed: int, tmp_path: Path):
    """Every section and key, legal and not, with values of every TOML type: nothing else ever comes out."""
    chance = random.Random(seed)
    accepted = 0
    for _ in range(200):
        file, command_line = _random_tree(chance, chance.choice((1, 2, 6))), _random_tree(chance, chance.choice((0, 1)))
        file.setdefault("training", {"steps": 3})
        try:
            recipe = resolve(file, command_line)
        except RecipeError as error:
            assert "\n" not in str(error) and str(error)
            continue
        accepted += 1
        path = tmp_path / "recipe.toml"
        path.write_text(dump(recipe), encoding="utf-8")
        assert load_recipe(path) == recipe
    assert accepted > 10


def _keys(section: str) -> list[tuple[str, Any]]:
    """(key, annotation) of a section."""
    cls = MIXERS[section.split(".")[1]].Options if section.startswith("mixer.") else SECTIONS[section]
    hints = typing.get_type_hints(cls)
    return [(field.name, hints[field.name]) for field in dataclasses.fields(cls) if field.name not in NESTED]


def _random_tree(chance: random.Random, entries: int) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for _ in range(entries):
        section = chance.choice([*SECTIONS, *(f"mixer.{name}" for name in MIXERS.names())])
        key, hint = chance.choice(_keys(section))
        if chance.random() < 0.05:
            key = chance.choice(["", "x\ny", "steps", "é", "heads", "moe"])
        node = tree
        for part in section.split("."):
            node = node.setdefault(part, {})
            if not isinstance(node, dict):
                break
        else:
            node[key] = _random_value(chance, hint)
        if chance.random() < 0.02:
            tree[chance.choice([*SECTIONS, "mixer", "zz"])] = _random_value(chance, int)
    return tree


def _random_value(chance: random.Random, hint: Any) -> Any:
    if typing.get_origin(hint) is typing.Literal and chance.random() < 0.8:
        return chance.choice(typing.get_args(hint))
    whole = [-(2**63), -1, 0, 1, 2, 3, 4, 8, 64, 2**31, 2**63 - 1, 10**30]
    number = [-1.5, -0.0, 0.5, 1.0, 1e-300, 1e308, math.inf, math.nan]
    text = ["", "L", "LLN", "hgrn2", "lasp2", "auto", "debug", "qwen2", "a\nb", "\x00\x7f", "é🙂", "x" * 300]
    if chance.random() < 0.6:
        pools = {int: whole, float: number + whole, bool: [True, False], str: text}
        for kind, pool in pools.items():
            if hint is kind or kind in typing.get_args(hint):
                return chance.choice(pool)
    return chance.choice([*whole, *number, *text, True, [], [0.5, 0.5], ["hgrn2"] * 4, [[1]], {}, {"a": 1}])


def test_spans_must_be_equal_and_heads_come_out_even_where_they_are_traded():
    length = {"training": {"steps": 1, "sequence_length": 48}}
    message = _refused({"parallel": {"context": 5}, **length})
    assert message.startswith("parallel.context = 5: must divide training.sequence_length = 48; legal: 1, 2, 3, 4, 6")
    softmax = {"model": {"layout": "LN", "num_layers": 2, "num_kv_heads": 2}, **length}
    message = _refused({"parallel": {"context": 4, "context_attention": "heads"}, **softmax})
    assert message == (
        "parallel.context_attention = 'heads': context x tensor = 4 x 1 must divide kv_heads of softmax_attention = 2; "
        "use 'gather', or legal: 1, 2"
    )
    message = _refused({"parallel": {"context_attention": "ring"}, **softmax})
    assert message.startswith("parallel.context_attention")
    linear = {"model": {"layout": "L", "num_layers": 2, "num_kv_heads": 2}, **length}
    for tables in ({"parallel": {"context": 4, "context_attention": "heads"}, **linear}, softmax):
        resolve(tables)


@pytest.mark.parametrize("mixer", MIXERS.names())
def test_heads_that_do_not_come_out_even_name_the_mixer_and_the_legal_degrees(mixer: str):
    tables = {"model": {"mixer": mixer, "layout": "L", "vocab_size": 1024, "num_kv_heads": 4}}
    message = _refused({"parallel": {"tensor": 16}, **tables}, "parallel.tensor = 16: must divide ", f" of {mixer} = ")
    for degree in message.partition("legal: ")[2].split(", "):
        resolve({**STEPS, "parallel": {"tensor": int(degree)}, **tables})


def test_legal_degrees_are_those_that_everything_allows():
    tables = {"model": {"vocab_size": 1020}, "training": {"sequence_length": 96}}
    message = _refused({"parallel": {"tensor": 3}, **tables}, "must divide heads of hgrn2 = 4")
    assert message.endswith("legal: 1, 2, 4")
    message = _refused({"parallel": {"tensor": 4}, **tables, "moe": {"shared_hidden_size": 34}})
    assert message == "parallel.tensor = 4: must divide moe.shared_hidden_size = 34; legal: 1, 2"


@pytest.mark.parametrize(
    ("parallel", "told"),
    [
        ({"expert": 3}, "parallel.expert = 3: must divide moe.num_experts = 4; legal: 1, 2, 4"),
        ({"pipeline": 5}, "parallel.pipeline = 5: 1 stages a rank need at least 5 layers, model.num_layers = 4; legal"),
        (
            {"pipeline": 3, "pipeline_schedule": "interleaved"},
            "parallel.pipeline = 3: 2 stages a rank need at least 6 layers, model.num_layers = 4; legal: 1 to 2",
        ),
        (
            {"pipeline": 2, "pipeline_stages_per_rank": 2},
            "parallel.pipeline_stages_per_rank = 2: pipeline_schedule = '1f1b' needs 1",
        ),
        (
            {"pipeline": 2, "pipeline_schedule": "zero_bubble"},
            "parallel.pipeline_schedule = 'zero_bubble': the weights must stay gathered",
        ),
        ({"context": 3}, "parallel.context = 3: must divide training.sequence_length = 2048; legal: 1, 2, 4"),
        ({"tensor": 0}, "parallel.tensor = 0: must be at least 1"),
    ],
)
def test_degrees_that_cannot_be_are_named_with_the_legal_ones(parallel: dict[str, Any], told: str):
    assert _refused({"parallel": parallel}).startswith(told)


@pytest.mark.parametrize("family", ["llama3", "qwen2"])
def test_a_dense_model_has_no_experts_to_spread(family: str):
    moe = {"num_experts": 0, "top_k": 0} if family == "qwen2" else {}
    message = _refused({"model": {"family": family}, "moe": moe, "parallel": {"expert": 2}})
    assert message == "parallel.expert = 2: there are no experts (moe.num_experts = 0); legal: 1"


def test_a_backend_for_experts_of_one_rank_does_not_go_with_those_of_several():
    told = (
        "moe.backend = 'triton': computes experts that lie on one rank, parallel.expert = 2 spreads them; use 'auto' or"
    )
    assert _refused({"moe": {"backend": "triton"}, "parallel": {"expert": 2}}).startswith(told)


def test_a_backend_of_gated_experts_alone_is_refused_where_there_are_no_gates():
    told = (
        "moe.backend = 'triton': computes gated experts alone, model.activation = 'relu2' has no gates; use 'auto' or"
    )
    assert _refused({"model": {"activation": "relu2"}, "moe": {"backend": "triton"}}).startswith(told)


def test_sources_that_cannot_be_mixed_are_named():
    a = {"path": "a"}
    _refused({"data": {"sources": ["a"]}}, "data.sources = 'a': must be a table of path, weight, split")
    _refused({"data": {"sources": [{"weight": 1}]}}, "data.sources = {'weight': 1}: names no path")
    _refused({"data": {"sources": [{**a, "wieght": 1}]}}, "data.sources.wieght: unknown key; did you mean 'weight'?")
    _refused({"data": {"sources": [{**a, "weight": 0}]}}, "data.sources: weight = 0.0 of 'a': must be positive")
    _refused({"data": {"sources": [{**a, "split": "val"}]}}, "data.sources.split = 'val': not a legal value")
    _refused({"data": {"sources": [{**a, "split": "validation"}]}}, "every split = 'validation'; leave one to train")
    _refused({"data": {"sources": [a], "paths": ["b"]}}, "data.paths and data.sources exclude each other")
    _refused({"data": {"sources": [a], "format": "messages"}}, "mixtures are of text; name messages in data.paths")
    _refused({"data": {"sources": [a], "validation_split": "tokens"}}, "sources hold out whole documents")
    _refused({"data": {"sources": [{"path": ""}]}}, "data.sources: a path is empty")
    _refused({"data": {"validation_paths": [""]}}, "data.validation_paths: a path is empty")
    _refused({"data": {"text_key": ""}}, "data.text_key = '': name the key")


def test_paths_of_the_command_line_take_the_place_of_sources():
    file = {"data": {"sources": [{"path": "a", "weight": 2}]}, **STEPS}
    recipe = resolve(file, {"data": {"paths": ["b"]}})
    assert recipe.data.paths == ("b",) and recipe.data.sources == ()
    kept = resolve(tomllib.loads(dump(resolve(file))))
    assert kept.data.sources == resolve(file).data.sources and kept.data.sources[0].weight == 2.0
