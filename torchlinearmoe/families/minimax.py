"""MiniMax-01: seven layers of lightning attention, one of softmax attention, 32 experts (arXiv 2501.08313).

Sizes: `A46B` is MiniMax-Text-01 (456B), and `debug`. A norm's output is itself the stream that a layer's output is
added to, and weighs 3.56 times as much. Softmax heads of 128 channels rotate 64.

There are two spellings. transformers' (`MiniMaxForCausalLM`) rotates whole heads and divides the slopes' depth by L - 1
+ 1e-5; a `rotary_dim` that stands in its `config.json` all the same is what the weights were trained with, and is
followed. The release's own code (`MiniMaxText01ForCausalLM`) has its own words for the same keys. Constants derived
from the slopes that lie among the weights are left out.
"""

from __future__ import annotations

from typing import Any

from torchlinearmoe.errors import RecipeError
from torchlinearmoe.families.base import FAMILIES, Family, model_size, moe_size
from torchlinearmoe.families.huggingface import (
    ATTENTION,
    MODEL_DEFAULTS,
    MODEL_FIXED,
    MODEL_KEYS,
    OUTER,
    Architecture,
    Config,
    Name,
    Rows,
    Tables,
    experts,
    of_mixer,
)
from torchlinearmoe.families.pooled_balance import read_pooled_balance, write_pooled_balance
from torchlinearmoe.recipe.schema import ModelRecipe

LINEAR, SOFTMAX = "lightning_attention", "softmax_attention"
EPS, DEPTH_EPS = 1e-6, 1e-5
"""Of the norm of all heads, whatever the model's own, and of the slopes in transformers."""
ALPHA = 3.5565588200778455
FACTORS = {"linear_scales": "linear_attn", "attention_scales": "full_attn", "ffn_scales": "mlp"}
"""Keys of `[model]`, two numbers each, and how `config.json` begins the names of the two."""
RELEASED = {"linear_attn": "linear_attention", "full_attn": "full_attention", "mlp": "mlp"}
SCALES = dict.fromkeys(FACTORS, (ALPHA, 1.0))


def heads_of(heads: int, width: int, depth_eps: float = 0.0) -> dict[str, Any]:
    """The options of the linear layers; our norm sees reads over the root of the width, theirs the reads."""
    return {"heads": heads, "head_dim": width, "norm_eps": EPS / width, "depth_eps": depth_eps}


PRESETS = {
    "debug": (
        model_size(64, 4, 4, 2, 160, 1024, layout="LLLN", max_length=1024, rope_theta=1e4, **SCALES),
        moe_size(4, 2, 64, renormalize=True),
        {},
        heads_of(4, 16, DEPTH_EPS),
    ),
    "A46B": (
        model_size(6144, 80, 64, 8, 9216, 200064, head_dim=128, **SCALES),
        moe_size(32, 2, 9216, renormalize=True),
        {"rotary_dim": 64},
        heads_of(64, 128),
    ),
}


def by_head(index: int):
    """Part `index` of each head's queries, keys and values."""

    def rows(model: ModelRecipe) -> Rows:
        options = model.mixer_options[LINEAR]
        return Rows(options.heads, (options.head_dim,) * 3, index)

    return rows


OURS, THEIRS = "layers.{layer}.mixer", "model.layers.{layer}.self_attn"
NAMES = (
    *OUTER,
    *of_mixer(SOFTMAX, tuple(name for name in ATTENTION if not name.theirs.endswith(".bias"))),
    *of_mixer(
        LINEAR,
        (
            *(
                Name(f"{OURS}.{part}_proj.weight", f"{THEIRS}.qkv_proj.weight", rows=by_head(index))
                for index, part in enumerate("qkv")
            ),
            Name(f"{OURS}.g_proj.weight", f"{THEIRS}.output_gate.weight"),
            Name(f"{OURS}.norm.weight", f"{THEIRS}.norm.weight"),
            Name(f"{OURS}.o_proj.weight", f"{THEIRS}.out_proj.weight"),
        ),
    ),
    Name("layers.{layer}.ffn.router.weight", "model.layers.{layer}.block_sparse_moe.gate.weight"),
    *experts("block_sparse_moe.experts", "w1", "w3", "w2"),
)


def _read_factors(config: Config, tables: Tables, spelled: str) -> None:
    """`spelled` is a factor's key, with `{part}` for the layers it is for and `{name}` for alpha or beta."""
    for key, part in FACTORS.items():
        names = [spelled.format(part=part, released=RELEASED[part], name=name) for name in ("alpha", "beta")]
        tables["model"][key] = tuple(1.0 if config.get(name) is None else config[name] for name in names)


def _write_factors(tables: Tables, config: Config, spelled: str) -> None:
    for key, part in FACTORS.items():
        for name, value in zip(("alpha", "beta"), tables["model"][key], strict=True):
            config[spelled.format(part=part, released=RELEASED[part], name=name)] = value


def _read_linear(config: Config, tables: Tables) -> None:
    read_pooled_balance(config, tables)
    model = tables["model"]
    heads, width = model["num_heads"], model.get("head_dim")
    if type(heads) is not int or type(width) is not int or heads < 1 or width < 1:
        raise RecipeError(f"num_attention_heads = {heads!r}, head_dim = {width!r}: must be whole numbers above 0")
    tables[f"mixer.{LINEAR}"] = heads_of(heads, width)
    rotated = config.get("rotary_dim") or 0
    tables.setdefault(f"mixer.{SOFTMAX}", {})["rotary_dim"] = 0 if rotated == width else rotated


TRANSFORMERS, RELEASE = "{part}_{name}_factor", "layernorm_{released}_{name}"


def _read(config: Config, tables: Tables) -> None:
    _read_linear(config, tables)
    _read_factors(config, tables, TRANSFORMERS)
    heads = tables["model"]["num_heads"]
    if heads & (heads - 1):
        raise RecipeError(f"num_attention_heads = {heads}: transformers' slopes are known here for powers of two alone")
    tables[f"mixer.{LINEAR}"]["depth_eps"] = DEPTH_EPS


def _write(tables: Tables, config: Config) -> None:
    write_pooled_balance(tables, config)
    _write_factors(tables, config, TRANSFORMERS)
    if tables[f"mixer.{SOFTMAX}"]["rotary_dim"]:
        raise RecipeError(f"mixer.{SOFTMAX}.rotary_dim: transformers' MiniMax rotates whole heads")


def _read_release(config: Config, tables: Tables) -> None:
    _read_linear(config, tables)
    _read_factors(config, tables, RELEASE)


def _write_release(tables: Tables, config: Config) -> None:
    write_pooled_balance(tables, config)
    _write_factors(tables, config, RELEASE)
    config["rotary_dim"] = tables[f"mixer.{SOFTMAX}"]["rotary_dim"] or tables["model"]["head_dim"]
    config["attn_type_list"] = [int(kind == "full_attention") for kind in config.pop("layer_types")]


def _every_second(config: Config) -> list[str]:
    """`layer_types` that transformers takes where none are listed."""
    return _kinds(config, [1, 0] * (2**12))


def _listed(config: Config) -> list[str]:
    """The release's list: 1 for softmax attention, 0 for lightning attention."""
    found = config.get("attn_type_list")
    if not isinstance(found, list) or any(kind not in (0, 1) for kind in found):
        raise RecipeError(f"attn_type_list = {found!r}: must be a list of 0 and 1, one a layer")
    return _kinds(config, found)


def _kinds(config: Config, found: list[Any]) -> list[str]:
    layers = config.get("num_hidden_layers")
    if type(layers) is not int or layers < 1:
        raise RecipeError(f"num_hidden_layers = {layers!r}: must be a whole number above 0")
    return ["full_attention" if kind else "linear_attention" for kind in found[: min(layers, 2**12)]]


KEYS = {
    **MODEL_KEYS,
    "intermediate_size": "moe.hidden_size",
    "num_local_experts": "moe.num_experts",
    "num_experts_per_tok": "moe.top_k",
    "router_aux_loss_coef": "moe.balance_coefficient",
}
DEFAULTS = {**MODEL_DEFAULTS, "rms_norm_eps": 1e-5, "router_aux_loss_coef": 0.001}
FIXED = {**MODEL_FIXED, "sliding_window": None}
IMPLIED = {
    "model.norm_placement": "stream",
    "moe.renormalize": True,
    "moe.shared_hidden_size": 0,
    "moe.shared_gate": False,
}
DERIVED = (r"model\.layers\.[0-9]+\.self_attn\.(slope_rate|.*_decay)",)

PUBLISHED = Architecture(
    name="MiniMaxForCausalLM",
    model_type="minimax",
    keys=KEYS,
    names=NAMES,
    defaults=DEFAULTS,
    fixed=FIXED,
    implied=IMPLIED,
    read=_read,
    write=_write,
    ignored=DERIVED,
    layers={"linear_attention": LINEAR},
    layer_types=_every_second,
)
AS_RELEASED = Architecture(
    name="MiniMaxText01ForCausalLM",
    model_type="minimax_text_01",
    own_code=True,
    keys=KEYS,
    names=NAMES,
    defaults=DEFAULTS,
    fixed={**FIXED, "postnorm": True, "shared_intermediate_size": 0},
    implied=IMPLIED,
    read=_read_release,
    write=_write_release,
    ignored=DERIVED,
    layers={"linear_attention": LINEAR},
    layer_types=_listed,
)

FAMILIES.add(
    "minimax",
    Family(
        name="minimax",
        attention=SOFTMAX,
        common={
            "mixer": LINEAR,
            "layout": "LLLLLLLN",
            "max_length": 10240000,
            "rope_theta": 1e7,
            "norm_eps": 1e-5,
            "norm_placement": "stream",
            "tie_embeddings": False,
            "init_std": 0.02,
        },
        presets=PRESETS,
        published=(PUBLISHED, AS_RELEASED),
    ),
)
