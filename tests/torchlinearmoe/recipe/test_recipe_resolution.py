"""Which value wins: preset, file, command line; what replaces what; what comes with a family and size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from torchlinearmoe import FAMILIES, MIXERS, load_recipe
from torchlinearmoe.errors import RecipeError
from torchlinearmoe.families.base import DIMENSIONS
from torchlinearmoe.models.layer_mixers import layer_mixers, used_mixers
from torchlinearmoe.recipe import dump, resolve

ROOT = Path(__file__).parents[3]
SIZES = [(family, size) for family in FAMILIES for size in FAMILIES[family].presets]
STEPS = {"training": {"steps": 10}}


def _load(tmp_path: Path, text: str, *overrides: str):
    path = tmp_path / "recipe.toml"
    path.write_text(text, encoding="utf-8")
    return load_recipe(path, overrides)


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.toml")), ids=lambda path: path.name)
def test_every_shipped_recipe_loads_and_comes_back_from_its_dump(path: Path, tmp_path: Path):
    recipe = load_recipe(path)
    assert _load(tmp_path, dump(recipe)) == recipe


@pytest.mark.parametrize(("family", "size"), SIZES)
def test_every_preset_comes_back_from_its_dump(family: str, size: str, tmp_path: Path):
    recipe = resolve({"model": {"family": family, "size": size}, **STEPS})
    brought = FAMILIES[family].preset(size)
    for key, value in brought["model"].items():
        assert getattr(recipe.model, key) == value
    for key, value in brought["moe"].items():
        assert getattr(recipe.model.moe, key) == value
    assert _load(tmp_path, dump(recipe)) == recipe
    assert "mixer_options" not in dump(recipe)


def test_a_dump_keeps_strings_numbers_lists_and_mixer_options(tmp_path: Path):
    text = {
        "model": {"mixers": ["lasp2", "softmax_attention", "hgrn2"], "layout": "LN", "rope_theta": 1e16},
        "mixer": {"linear_attention": {"normalize": True}, "hgrn2": {"conv": 4}, "gated_delta_net": {"conv": 2}},
        "data": {"paths": ['a "b"\\c\n\x7f\x01é', " "], "validation_fraction": 1e-7},
        "optimizer": {"betas": [0.5, 0.25], "lr": 1, "min_lr": 0},
        "metrics": {"profile_steps": [2, 3]},
        **STEPS,
    }
    recipe = resolve(text)
    again = _load(tmp_path, dump(recipe))
    assert again == recipe
    assert again.data.paths == ('a "b"\\c\n\x7f\x01é', " ")
    assert again.model.mixer_options["linear_attention"].normalize and again.optimizer.lr == 1.0
    assert dump(again) == dump(recipe)


def test_the_command_line_wins_over_the_file_and_the_file_over_the_preset(tmp_path: Path):
    text = '[model]\nsize = "debug"\nnum_layers = 6\nhidden_size = 128\n[training]\nsteps = 5\n'
    preset = FAMILIES["qwen2"].preset("debug")["model"]
    recipe = _load(tmp_path, text, "--model.num_layers=7", "training.steps=9", "--mixer.hgrn2.conv=3")
    assert recipe.model.num_layers == 7 and recipe.training.steps == 9
    assert recipe.model.hidden_size == 128 != preset["hidden_size"]
    assert recipe.model.vocab_size == preset["vocab_size"]
    assert recipe.model.mixer_options["hgrn2"].conv == 3
    assert recipe.training.sequence_length == 2048


@pytest.mark.parametrize("override", ["--model.family=qwen2", "--model.size=A0.3B"])
def test_a_family_or_size_on_the_command_line_drops_the_files_dimensions_only(tmp_path: Path, override: str):
    text = (
        '[model]\nfamily = "qwen2"\nsize = "debug"\nhidden_size = 96\nnum_heads = 6\nnum_layers = 2\n'
        'mixer = "gated_delta_net"\n'
        'attention_backend = "sdpa"\n[moe]\nnum_experts = 2\nbalance = "none"\n[mixer.gated_delta_net]\nconv = 0\n'
        "[training]\nsteps = 5\n"
    )
    assert _load(tmp_path, text).model.hidden_size == 96
    recipe = _load(tmp_path, text, override, "--model.vocab_size=2048")
    preset = FAMILIES["qwen2"].preset(recipe.model.size)
    assert (recipe.model.size == "A0.3B") == ("size" in override)
    for key, value in (preset["model"] | {"vocab_size": 2048}).items():
        assert getattr(recipe.model, key) == value, key
    assert recipe.model.moe.num_experts == preset["moe"]["num_experts"]
    assert recipe.model.mixer == "gated_delta_net" and recipe.model.attention_backend == "sdpa"
    assert recipe.model.moe.balance == "none" and recipe.model.mixer_options["gated_delta_net"].conv == 0


def test_every_family_brings_exactly_the_declared_dimensions():
    declared = {section: set(keys) for section, keys in DIMENSIONS.items()}
    for family, size in SIZES:
        brought = FAMILIES[family].preset(size)
        assert set(brought["model"]) - {"mixer", "layout"} | {"head_dim"} == declared["model"]  # of published hybrids
        assert set(brought["moe"]) == declared["moe"]


def test_softmax_attention_means_the_familys_own_everywhere(tmp_path: Path):
    def layers(**model: Any) -> list[str]:
        return layer_mixers(resolve({"model": {"family": "deepseek_v2", **model}, **STEPS}).model)

    assert layers(layout="LN", num_layers=3, mixer="gla") == ["gla", "mla", "gla"]
    assert layers(mixer="softmax_attention", num_layers=2) == layers(mixer="mla", num_layers=2) == ["mla"] * 2
    assert layers(mixers=["softmax_attention", "hgrn2"]) == ["mla", "hgrn2"]
    assert layer_mixers(resolve({"model": {"mixers": ["mla", "softmax_attention"]}, **STEPS}).model) == [
        "mla",
        "softmax_attention",
    ]


def test_a_size_brings_the_dimensions_of_the_familys_attention(tmp_path: Path):
    text = (
        '[model]\nfamily = "deepseek_v2"\nsize = "A21B"\nlayout = "N"\n'
        "[mixer.mla]\nkv_lora_rank = 256\n[training]\nsteps = 1\n"
    )

    def ranks(*overrides: str, text: str = text) -> tuple[int, int]:
        recipe = _load(tmp_path, text, *overrides)
        assert _load(tmp_path, dump(recipe)) == recipe
        options = recipe.model.mixer_options["mla"]
        return options.kv_lora_rank, options.q_lora_rank

    assert ranks() == (256, 1536)
    assert ranks("--mixer.mla.q_lora_rank=0") == (256, 0)
    assert ranks("--model.size=A2.4B") == (512, 0)
    assert ranks("--model.size=debug", "--mixer.mla.q_lora_rank=0") == (32, 0)
    assert ranks("--model.family=qwen2", "--model.size=debug", "--model.mixer=mla", "--model.layout=L") == (512, 0)


@pytest.mark.parametrize(
    ("section", "mine", "other"),
    [
        ("training", "steps", "tokens"),
        ("training", "tokens", "steps"),
        ("optimizer", "warmup_steps", "warmup_tokens"),
        ("optimizer", "warmup_tokens", "warmup_steps"),
    ],
)
def test_two_ways_to_say_one_thing(tmp_path: Path, section: str, mine: str, other: str):
    base: dict[str, Any] = {} if section == "training" else STEPS
    recipe = resolve({**base, section: {other: 100}}, {section: {mine: 7}})
    assert getattr(getattr(recipe, section), mine) == 7 and getattr(getattr(recipe, section), other) is None
    for file, command_line in (({mine: 1, other: 2}, {}), ({}, {mine: 1, other: 2}), ({mine: 1}, {mine: 1, other: 2})):
        with pytest.raises(RecipeError, match=f"{section}.*exclude each other"):
            resolve({**base, section: file}, {section: command_line})


def test_neither_steps_nor_tokens_is_an_error():
    with pytest.raises(RecipeError, match="^training.steps or training.tokens: give exactly one$"):
        resolve({})


def test_a_layout_is_repeated_and_cut():
    def layers(**model: Any) -> list[str]:
        return layer_mixers(resolve({"model": model, **STEPS}).model)

    attention = "softmax_attention"
    assert layers(layout="LLLN", num_layers=6) == ["hgrn2"] * 3 + [attention] + ["hgrn2"] * 2
    assert layers(layout="NL", num_layers=3, mixer="lasp2") == [attention, "linear_attention", attention]
    assert layers(layout="LN", num_layers=1) == ["hgrn2"]
    assert layers(layout="MMM*", num_layers=8) == (["mamba2"] * 3 + [attention]) * 2
    assert layers(layout="LM*N", num_layers=4, mixer="gla") == ["gla", "mamba2", attention, attention]
    assert layers(layout="L", num_layers=2, mixer=attention) == [attention] * 2
    assert layers(mixers=["lasp2", attention]) == ["linear_attention", attention]
    model = resolve({"model": {"layout": "LN", "num_layers": 1, "mixer": "gated_delta_net"}, **STEPS}).model
    assert used_mixers(model) == ["gated_delta_net"]


def test_a_list_of_mixers_takes_the_place_of_the_layout_and_sets_the_depth(tmp_path: Path):
    text = '[model]\nlayout = "LN"\nmixers = ["hgrn2", "softmax_attention", "hgrn2"]\n[training]\nsteps = 1\n'
    recipe = _load(tmp_path, text)
    assert recipe.model.num_layers == 3 and layer_mixers(recipe.model)[1] == "softmax_attention"
    with pytest.raises(RecipeError, match="^model.num_layers = 5: model.mixers names 3 layers"):
        _load(tmp_path, text, "model.num_layers=5")
    shallow = _load(tmp_path, text, "model.layout=LLN", "model.num_layers=5")
    assert layer_mixers(shallow.model) == ["hgrn2", "hgrn2", "softmax_attention", "hgrn2", "hgrn2"]
    empty = _load(tmp_path, '[model]\nmixers = []\nlayout = "N"\n[training]\nsteps = 1\n')
    assert set(layer_mixers(empty.model)) == {"softmax_attention"} and empty.model.num_layers > 0


def test_tables_of_mixers_not_in_use_are_checked_and_otherwise_ignored():
    plain = resolve({"model": {"mixer": "hgrn2"}, **STEPS})
    beside = {"mixer": {"gated_delta_net": {"conv": 2, "heads": 77}}}
    assert resolve({"model": {"mixer": "hgrn2"}, **STEPS, **beside}) == plain
    with pytest.raises(RecipeError, match="^mixer.gated_delta_net.con: unknown key; did you mean 'conv'"):
        resolve({**STEPS, "mixer": {"gated_delta_net": {"con": 2}}})
    with pytest.raises(RecipeError, match="^mixer.gated_delta_net.heads"):
        resolve({"model": {"mixer": "gated_delta_net"}, **STEPS, **beside})


def test_the_recipe_carries_the_options_of_every_mixer():
    model = resolve(STEPS).model
    assert list(model.mixer_options) == MIXERS.names()
    assert all(isinstance(model.mixer_options[name], MIXERS[name].Options) for name in MIXERS.names())


def test_the_softmax_head_width_follows_the_models_unless_given():
    def width(**model: Any) -> int:
        return resolve({"model": model, **STEPS}).model.head_dim

    assert width(hidden_size=128, num_heads=4) == 32
    assert width(hidden_size=128, num_heads=4, head_dim=64) == 64


def test_overrides_are_toml_else_bare_strings(tmp_path: Path):
    text = "[training]\nsteps = 1\n"
    recipe = _load(
        tmp_path,
        text,
        "--data.paths=['a', 'b']",
        "--training.output_dir=runs/a=b#c",
        "training.tokens=1_000",
        "--optimizer.betas=[0.1,0.2]",
        "--metrics.tensorboard=false",
        "--model.layout='LN'",
        "--data.tokenizer=",
    )
    assert recipe.data.paths == ("a", "b") and recipe.training.output_dir == "runs/a=b#c"
    assert recipe.training.tokens == 1000 and recipe.training.steps is None
    assert recipe.optimizer.betas == (0.1, 0.2) and not recipe.metrics.tensorboard and recipe.model.layout == "LN"
    assert recipe.data.tokenizer == ""


def test_a_key_that_moved_is_read_where_it_was():
    def resolved(file, line=None):
        return resolve({"training": {"steps": 1}, **file}, line).model

    def bias(file, line=None):
        return resolved(file, line).mixer_options["softmax_attention"].qkv_bias

    softmax = {"layout": "N"}
    assert bias({"model": softmax}) and not bias({"model": {"family": "mixtral", **softmax}})
    file = {"model": {**softmax, "qkv_bias": False}}
    assert not bias(file) and file["model"]["qkv_bias"] is False
    assert bias(file, {"model": {"qkv_bias": True}}) and bias(file, {"model": {"size": "0.5B"}})
    assert not bias({"model": softmax}, {"model": {"qkv_bias": False}})
    assert resolved({"model": {"qkv_bias": False}}) == resolved({})  # no layer has them
    now = {"mixer": {"softmax_attention": {"qkv_bias": True}}}
    with pytest.raises(RecipeError, match=r"^model\.qkv_bias: is called mixer\.softmax_attention\.qkv_bias now, "):
        bias({**file, **now})
    with pytest.raises(RecipeError, match=r"^\[mixer\.softmax_attention\]|^mixer\.softmax_attention: must be"):
        bias({**file, "mixer": {"softmax_attention": 3}})
