"""OLMo Hybrid: three layers of Gated DeltaNet, one of softmax attention without positions, dense feed-forwards.

Sizes: `7B` is Olmo-Hybrid-7B, and `debug`. As in OLMo 2 the norms of softmax layers stand behind what they norm, and
queries and keys are normed over all heads together; linear layers have theirs in front, and transitions that can flip a
direction. A rotary base of null means no positions. transformers saves the short convolutions of queries, keys and
values cut into equal thirds, whatever their widths: both ways are read.
"""

from __future__ import annotations

from typing import Any

from torchlinearmoe.errors import RecipeError
from torchlinearmoe.families.base import FAMILIES, Family, model_size, plain
from torchlinearmoe.families.huggingface import (
    ATTENTION,
    HEAD_NORMS,
    MODEL_DEFAULTS,
    MODEL_FIXED,
    MODEL_KEYS,
    OUTER,
    Architecture,
    Config,
    Name,
    Tables,
    of_mixer,
    swiglu,
)
from torchlinearmoe.families.qwen3_next import every_fourth

DELTA, SOFTMAX = "gated_delta_net", "softmax_attention"
EPS = 1e-5
"""Of the norm behind the linear layers' reads, whatever the model's own."""


def delta(heads: int, width: int) -> dict[str, Any]:
    """The options of the linear layers, whose values are twice as wide as keys."""
    return {"heads": heads, "head_dim": width, "expand_v": 2.0, "negative_eigenvalues": True, "norm_eps": EPS}


PRESETS = {
    "debug": (model_size(64, 4, 4, 4, 160, 1024, max_length=1024), {}, {}, delta(4, 12)),
    "7B": (model_size(3840, 32, 30, 30, 11008, 100352), {}, {}, delta(30, 96)),
}

LAYER = "model.layers.{layer}"
OURS, THEIRS = "layers.{layer}.mixer", f"{LAYER}.linear_attn"


def norms(mixer: str, before: str, after: str) -> tuple[Name, ...]:
    """The norms of the mixer and of the feed-forward in layers of `mixer`."""
    return of_mixer(
        mixer,
        (
            Name("layers.{layer}.mixer_norm.weight", f"{LAYER}.{before}.weight"),
            Name("layers.{layer}.ffn_norm.weight", f"{LAYER}.{after}.weight"),
        ),
    )


CONVOLUTIONS = tuple((f"{OURS}.convs.{part}.weight", f"{THEIRS}.{part}_conv1d.weight") for part in "qkv")
NAMES = (
    *(name for name in OUTER if "{layer}" not in name.ours),
    *norms(SOFTMAX, "post_attention_layernorm", "post_feedforward_layernorm"),
    *norms(DELTA, "attention_layer_norm", "feedforward_layer_norm"),
    *of_mixer(SOFTMAX, (*(name for name in ATTENTION if not name.theirs.endswith(".bias")), *HEAD_NORMS)),
    *of_mixer(
        DELTA,
        (
            *(Name(f"{OURS}.{part}_proj.weight", f"{THEIRS}.{part}_proj.weight") for part in "qkvabgo"),
            *(Name(ours, theirs, axes=(0, None, 1), joined=CONVOLUTIONS) for ours, theirs in CONVOLUTIONS),
            Name(f"{OURS}.decay.A_log", f"{THEIRS}.A_log"),
            Name(f"{OURS}.decay.dt_bias", f"{THEIRS}.dt_bias"),
            Name(f"{OURS}.norm.weight", f"{THEIRS}.o_norm.weight"),
        ),
    ),
    *swiglu("ffn", "mlp"),
)


def _read(config: Config, tables: Tables) -> None:
    """The widths of the linear layers, which follow from the model's where they are not given."""
    model, options = tables["model"], tables[f"mixer.{DELTA}"]
    width, heads = model["hidden_size"], model["num_heads"]
    for key, value in (("hidden_size", width), ("num_attention_heads", heads)):
        _whole(key, value)
    model["head_dim"] = width // heads
    keys = _whole("linear_num_key_heads", config.get("linear_num_key_heads") or heads)
    values = _whole("linear_num_value_heads", config.get("linear_num_value_heads") or heads)
    key_width = _whole("linear_key_head_dim", config.get("linear_key_head_dim") or int(0.75 * width / keys))
    value_width = _whole("linear_value_head_dim", config.get("linear_value_head_dim") or 2 * key_width)
    options |= {"heads": keys, "head_dim": key_width, "value_heads": 0 if values == keys else values}
    options["expand_v"] = value_width / key_width


def _whole(key: str, value: Any) -> int:
    if type(value) is not int or value < 1:
        raise RecipeError(f"{key} = {value!r}: must be a whole number above 0")
    return value


def _layer_types(config: Config) -> list[str]:
    """Every fourth layer, and one at least, has softmax attention."""
    found = every_fourth(config)
    return found if "full_attention" in found else [*found[:-1], "full_attention"]


def _write(tables: Tables, config: Config) -> None:
    """The same the other way."""
    model, options = tables["model"], tables[f"mixer.{DELTA}"]
    if model["head_dim"] * model["num_heads"] != model["hidden_size"]:
        raise RecipeError("model.head_dim: heads that are together as wide as the model")
    config |= {
        "linear_num_key_heads": options["heads"],
        "linear_num_value_heads": options["value_heads"] or options["heads"],
        "linear_key_head_dim": options["head_dim"],
        "linear_value_head_dim": round(options["head_dim"] * options["expand_v"]),
    }


PUBLISHED = Architecture(
    name="OlmoHybridForCausalLM",
    model_type="olmo_hybrid",
    keys={
        **{key: target for key, target in MODEL_KEYS.items() if key != "head_dim"},
        "intermediate_size": "model.ffn_hidden_size",
        "linear_conv_kernel_dim": f"mixer.{DELTA}.conv",
        "linear_allow_neg_eigval": f"mixer.{DELTA}.negative_eigenvalues",
    },
    names=NAMES,
    defaults={**MODEL_DEFAULTS, "linear_conv_kernel_dim": 4, "linear_allow_neg_eigval": True},
    fixed={**MODEL_FIXED, "attention_bias": False},
    implied={
        "model.norm_placement": "pre",
        "model.attention_norm_placement": "post",
        f"mixer.{SOFTMAX}.qk_norm": "full",
        f"mixer.{DELTA}.norm_eps": EPS,
        **{f"moe.{key}": value for key, value in plain("moe").items()},
    },
    read=_read,
    write=_write,
    spellings=(
        norms(SOFTMAX, "feedforward_layer_norm", "post_feedforward_layernorm"),
        norms(DELTA, "input_layernorm", "post_attention_layernorm"),
    ),
    layers={"linear_attention": DELTA},
    layer_types=_layer_types,
    rope_switch=f"mixer.{SOFTMAX}.rope",
)

FAMILIES.add(
    "olmo_hybrid",
    Family(
        name="olmo_hybrid",
        attention=SOFTMAX,
        common={
            "mixer": DELTA,
            "layout": "LLLN",
            "max_length": 65536,
            "rope_theta": 1e4,
            "norm_eps": 1e-6,
            "attention_norm_placement": "post",
            "tie_embeddings": False,
            "init_std": 0.02,
        },
        options={"qk_norm": "full", "rope": False},
        presets=PRESETS,
        published=(PUBLISHED,),
    ),
)
