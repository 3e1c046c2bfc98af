"""Granite 4.0 H: nine layers of Mamba-2, one of softmax attention without positions, experts and a shared one.

Sizes: `350M`, `1B` and `3B` are the dense H-350M, H-1B and H-Micro, `A1B` is H-Tiny (7B), `A9B` H-Small (32B), and
`debug`. `A0.4B` and `A0.8B` are the mixtures of Granite 3.1 (1B and 3B), of softmax attention with positions alone.
Embeddings, scores, what is added to the residual stream and logits are scaled by constants. Experts come as two tensors
a layer, gates first. What routed models call the shared expert is the feed-forward of dense ones.
"""

from __future__ import annotations

from typing import Any

from torchlinearmoe.errors import RecipeError
from torchlinearmoe.families.base import FAMILIES, Family, model_size, moe_size
from torchlinearmoe.families.huggingface import (
    ATTENTION,
    FULL,
    MODEL_DEFAULTS,
    MODEL_FIXED,
    MODEL_KEYS,
    OUTER,
    Architecture,
    Config,
    Name,
    Rows,
    Tables,
    of_mixer,
    stacked_experts,
)
from torchlinearmoe.families.mamba_layers import MAMBA, check_time_steps, mamba, written_expansion
from torchlinearmoe.families.pooled_balance import read_pooled_balance, write_pooled_balance
from torchlinearmoe.recipe.schema import ModelRecipe

SOFTMAX = "softmax_attention"
SHARED_KEY = "shared_intermediate_size"


def size(width: int, layers: int, heads: int, kv_heads: int, ffn: int, divisor: float, **more: Any) -> dict[str, Any]:
    """`[model]` of a released size."""
    return model_size(width, layers, heads, kv_heads, ffn, 100352, logit_divisor=divisor, residual_scale=0.22) | more


def mamba_of(heads: int, width: int, state: int = 128) -> dict[str, Any]:
    """The options of the linear layers."""
    return {"heads": heads, "head_dim": width, "state": state}


def experts_of(number: int, top_k: int, hidden: int, shared: int) -> dict[str, Any]:
    """`[moe]` of a size."""
    return moe_size(number, top_k, hidden, shared_hidden_size=shared, renormalize=True)


GRANITE_3: dict[str, Any] = {
    "vocab_size": 49155,
    "layout": "N",
    "rope_theta": 1.5e6,
    "norm_eps": 1e-6,
    "init_std": 0.02,
}
PRESETS = {
    "debug": (
        model_size(64, 4, 4, 2, 160, 1024, max_length=1024, logit_divisor=4.0, residual_scale=0.5, layout="LLLN"),
        experts_of(4, 2, 32, 48),
        {"scale": 1 / 16},
        mamba_of(8, 16, 16),
    ),
    "350M": (
        size(768, 32, 12, 4, 2048, 3.0, residual_scale=0.246, max_length=32768, layout="LLLLLLLLLLNLLNLLLNLLLLLLLLLN"),
        {},
        {"scale": 1 / 64},
        mamba_of(48, 32),
    ),
    "1B": (size(1536, 40, 12, 4, 4096, 6.0), {}, {"scale": 1 / 128}, mamba_of(48, 64)),
    "3B": (size(2048, 40, 32, 8, 8192, 8.0), {}, {"scale": 1 / 64}, mamba_of(64, 64)),
    "A0.4B": (
        size(1024, 24, 16, 8, 512, 6.0, **GRANITE_3),
        experts_of(32, 8, 512, 0),
        {"scale": 1 / 64, "rope": True},
        {},
    ),
    "A0.8B": (
        size(1536, 32, 24, 8, 512, 6.0, **GRANITE_3),
        experts_of(40, 8, 512, 0),
        {"scale": 1 / 64, "rope": True},
        {},
    ),
    "A1B": (
        size(1536, 40, 12, 4, 1024, 6.0),
        experts_of(64, 6, 512, 1024),
        {"scale": 1 / 128},
        mamba_of(48, 64),
    ),
    "A9B": (
        size(4096, 40, 32, 8, 1536, 16.0),
        experts_of(72, 10, 768, 1536),
        {"scale": 1 / 128},
        mamba_of(128, 64),
    ),
}


def _half(index: int):
    """Gates, then what they gate."""

    def rows(model: ModelRecipe) -> Rows:
        width = model.moe.shared_hidden_size if model.moe.num_experts else model.ffn_hidden_size
        return Rows(1, (width, width), index)

    return rows


def shared(ours: str) -> tuple[Name, ...]:
    """A feed-forward whose first two matrices are one."""
    path, theirs = f"layers.{{layer}}.{ours}", "model.layers.{layer}.shared_mlp"
    return (
        Name(f"{path}.gate_proj.weight", f"{theirs}.input_linear.weight", rows=_half(0)),
        Name(f"{path}.up_proj.weight", f"{theirs}.input_linear.weight", rows=_half(1)),
        Name(f"{path}.down_proj.weight", f"{theirs}.output_linear.weight"),
    )


def _read(config: Config, tables: Tables) -> None:
    check_time_steps(config)
    moe, mixer, attention = tables["moe"], tables[f"mixer.{MAMBA}"], tables[f"mixer.{SOFTMAX}"]
    positions = config.get("position_embedding_type") or "nope"
    if positions not in ("rope", "nope"):
        raise RecipeError(f"position_embedding_type = {positions!r}: not supported; legal: 'rope', 'nope'")
    attention["rope"] = positions == "rope"
    _check_scale(tables)
    if mixer["head_dim"] == "auto":
        counts = mixer["expand"], tables["model"]["hidden_size"], mixer["heads"]
        whole = all(type(count) is int and count > 0 for count in counts)
        mixer["head_dim"] = counts[0] * counts[1] // counts[2] if whole else 0
    width = config.get(SHARED_KEY, 1024)
    if moe["num_experts"]:
        read_pooled_balance(config, tables)
        moe |= {"shared_hidden_size": width, "renormalize": True}
    else:
        tables["moe"] = dict.fromkeys(("num_experts", "top_k", "hidden_size", "shared_hidden_size"), 0)
        tables["model"]["ffn_hidden_size"] = width


def _check_scale(tables: Tables) -> None:
    """Zero would mean another scale here."""
    if not tables[f"mixer.{SOFTMAX}"]["scale"]:
        raise RecipeError("attention_multiplier = 0: must be positive")


def _write(tables: Tables, config: Config) -> None:
    moe = tables["moe"]
    width = moe["shared_hidden_size"] if moe["num_experts"] else tables["model"]["ffn_hidden_size"]
    if not width:
        raise RecipeError("moe.shared_hidden_size: every layer has a shared expert")
    if moe["num_experts"]:
        write_pooled_balance(tables, config)
    else:
        config |= {"intermediate_size": width, "num_experts_per_tok": 0, "router_aux_loss_coef": 0.0}
    config |= {
        SHARED_KEY: width,
        "position_embedding_type": "rope" if tables[f"mixer.{SOFTMAX}"]["rope"] else "nope",
        "mamba_expand": written_expansion(tables),
    }
    if not config["mamba_n_heads"]:  # no layer has them, and transformers divides by them
        config |= {"mamba_n_heads": 1, "mamba_d_head": config["mamba_expand"] * config["hidden_size"]}


MIXTURE_NAMES = (
    *OUTER,
    *of_mixer(SOFTMAX, ATTENTION),
    Name("layers.{layer}.ffn.router.weight", "model.layers.{layer}.block_sparse_moe.router.layer.weight"),
    *stacked_experts("block_sparse_moe", "input_linear.weight", "output_linear.weight"),
    *shared("ffn.shared"),
)
PUBLISHED = Architecture(
    name="GraniteMoeHybridForCausalLM",
    model_type="granitemoehybrid",
    keys={
        **MODEL_KEYS,
        "embedding_multiplier": "model.embed_scale",
        "residual_multiplier": "model.residual_scale",
        "logits_scaling": "model.logit_divisor",
        "attention_multiplier": f"mixer.{SOFTMAX}.scale",
        "num_local_experts": "moe.num_experts",
        "num_experts_per_tok": "moe.top_k",
        "intermediate_size": "moe.hidden_size",
        "router_aux_loss_coef": "moe.balance_coefficient",
        "mamba_n_heads": f"mixer.{MAMBA}.heads",
        "mamba_d_head": f"mixer.{MAMBA}.head_dim",
        "mamba_d_state": f"mixer.{MAMBA}.state",
        "mamba_n_groups": f"mixer.{MAMBA}.groups",
        "mamba_d_conv": f"mixer.{MAMBA}.conv",
        "mamba_expand": f"mixer.{MAMBA}.expand",
    },
    names=(
        *MIXTURE_NAMES,
        *mamba("model.layers.{layer}.mamba"),
        *shared("ffn"),
    ),
    defaults={
        **MODEL_DEFAULTS,
        "embedding_multiplier": 1.0,
        "residual_multiplier": 1.0,
        "logits_scaling": 1.0,
        "attention_multiplier": 1.0,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "router_aux_loss_coef": 0.001,
        "mamba_n_heads": 128,
        "mamba_d_head": "auto",
        "mamba_d_state": 256,
        "mamba_n_groups": 1,
        "mamba_d_conv": 4,
        "mamba_expand": 2,
    },
    fixed={**MODEL_FIXED, "attention_bias": False, "mamba_conv_bias": True, "mamba_proj_bias": False},
    implied={"moe.shared_gate": False},
    read=_read,
    write=_write,
    synonyms={"layers_block_type": "layer_types"},
    dense=True,
    layers={"linear_attention": MAMBA, "mamba": MAMBA, "attention": FULL},
    layer_types=lambda config: ["mamba"],
)


def _mixture(name: str, model_type: str, keys: dict[str, str]) -> Architecture:
    """Granite 3: the same without Mamba-2, and with a shared expert where `keys` tell its width."""

    def read(config: Config, tables: Tables) -> None:
        _check_scale(tables)
        read_pooled_balance(config, tables)
        tables["moe"].setdefault("shared_hidden_size", 0)

    return Architecture(
        name=name,
        model_type=model_type,
        keys={**{key: target for key, target in PUBLISHED.keys.items() if not key.startswith("mamba_")}, **keys},
        names=MIXTURE_NAMES,
        defaults={**PUBLISHED.defaults, SHARED_KEY: 0},
        fixed={**MODEL_FIXED, "attention_bias": False},
        implied={"moe.shared_gate": False, "moe.renormalize": True, f"mixer.{SOFTMAX}.rope": True},
        read=read,
        write=write_pooled_balance,
    )


MIXTURES = (
    _mixture("GraniteMoeForCausalLM", "granitemoe", {}),
    _mixture("GraniteMoeSharedForCausalLM", "granitemoeshared", {SHARED_KEY: "moe.shared_hidden_size"}),
)

FAMILIES.add(
    "granitemoehybrid",
    Family(
        name="granitemoehybrid",
        attention=SOFTMAX,
        common={
            "mixer": MAMBA,
            "layout": "LLLLLNLLLL",
            "max_length": 131072,
            "rope_theta": 1e4,
            "norm_eps": 1e-5,
            "embed_scale": 12.0,
            "tie_embeddings": True,
            "init_std": 0.1,
        },
        options={"rope": False},
        presets=PRESETS,
        published=(*MIXTURES, PUBLISHED),
    ),
)
