"""Nemotron-H: Mamba-2, a few layers of softmax attention without positions, feed-forwards of squared ReLU between them.

Sizes: `4B` and `9B` are Nemotron-3-Nano-4B and Nemotron-Nano-9B-v2, which are dense, `A3B`, `A12B` and `A55B`
Nemotron 3 Nano (30B), Super (120B) and Ultra (550B) with DeepSeek-V3's router, the latter two with experts on latent
channels (arXiv 2504.03624, 2512.20848), and `debug`. Published layers are a mixer or a feed-forward each:

    MEM*E    entries M E M * E, here three layers: Mamba-2 with experts, Mamba-2 alone, attention with experts

The head that predicts further tokens (`mtp`) is left out, and of Nemotron 3 Nano Omni all but the text part.
"""

from __future__ import annotations

from typing import Any

from torchlinearmoe.errors import RecipeError
from torchlinearmoe.families.base import FAMILIES, Family, model_size, moe_size
from torchlinearmoe.families.huggingface import (
    FULL,
    MODEL_DEFAULTS,
    MODEL_KEYS,
    Architecture,
    Config,
    Name,
    Tables,
    period,
    renamed,
)
from torchlinearmoe.families.mamba_layers import MAMBA, check_time_steps, mamba
from torchlinearmoe.families.sigmoid_routing import BIAS, SIGMOID, SIGMOID_IMPLIED, read_experts

SOFTMAX = "softmax_attention"
WORDS = {"M": "linear_attention", "*": FULL, "E": "moe", "-": "mlp"}
"""Letters of `hybrid_override_pattern` to entries of `layers_block_type`."""
SHARED_KEY = "moe_shared_expert_intermediate_size"


def layers(pattern: str) -> dict[str, Any]:
    """The layers that `hybrid_override_pattern` means, in `[model]`."""
    mixers = pattern.replace("E", "").replace("-", "")
    kinds = pattern.replace("M", "*").replace("*E", "E").replace("*-", "-").replace("*", ".")
    layout = mixers.replace("M", "L").replace("*", "N")
    return {"num_layers": len(mixers), "layout": period(layout), "feed_forwards": period(kinds)}


def size(pattern: str, width: int, heads: int, kv_heads: int, ffn: int, **more: Any) -> dict[str, Any]:
    """`[model]` of a released size."""
    return model_size(width, 0, heads, kv_heads, ffn, 131072, head_dim=128) | layers(pattern) | more


def mamba_of(model: int, heads: int, width: int = 64, groups: int = 8, state: int = 128) -> dict[str, Any]:
    """The options of Mamba-2 layers; model: channels of the model."""
    return {"heads": heads, "head_dim": width, "state": state, "groups": groups, "expand": heads * width / model}


def experts_of(number: int, top_k: int, hidden: int, shared: int, scaling: float, latent: int = 0) -> dict[str, Any]:
    """`[moe]` of a size."""
    return moe_size(
        number, top_k, hidden, shared_hidden_size=shared, routed_scaling=scaling, latent_size=latent, **SIGMOID
    )


NANO = "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME"
SUPER = "MEMEMEM*EMEMEMEM*EMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEM*EMEMEMEME"
ULTRA = "MEMEMEM*EMEMEM*EMEMEMEM*EMEMEMEM*EMEMEM*EMEMEMEM*EMEMEMEM*EMEMEM*EMEMEMEM*EMEMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME"

PRESETS = {
    "debug": (
        model_size(64, 4, 4, 2, 96, 1024, head_dim=16, max_length=1024, layout="LLLN", feed_forwards="E-."),
        experts_of(4, 2, 32, 48, 2.5, 32),
        {},
        mamba_of(64, 8, 16, 2, 16),
    ),
    "4B": (
        size("M-M-M-MM-M-M*-M-M*-M-M-M*-M-M-MM*-MMM-M-M-", 3136, 40, 8, 12544),
        {},
        {},
        mamba_of(3136, 96, 80),
    ),
    "9B": (
        size("M-M-M-MM-M-M-M*-M-M-M*-M-M-M-M*-M-M-M-M*-M-MM-M-M-M-M-M-", 4480, 40, 8, 15680, max_length=131072),
        {},
        {},
        mamba_of(4480, 128, 80),
    ),
    "A3B": (size(NANO, 2688, 32, 2, 1856), experts_of(128, 6, 1856, 3712, 2.5), {}, mamba_of(2688, 64)),
    "A12B": (size(SUPER, 4096, 32, 2, 2688), experts_of(512, 22, 2688, 5376, 5.0, 1024), {}, mamba_of(4096, 128)),
    "A55B": (
        size(ULTRA, 8192, 64, 2, 5120, init_std=0.0099),
        experts_of(512, 22, 5120, 10240, 5.0, 2048),
        {},
        mamba_of(8192, 256),
    ),
}


def _words(config: Config) -> list[str]:
    """`layers_block_type` of a directory that has a pattern instead."""
    pattern = config.get("hybrid_override_pattern")
    if not isinstance(pattern, str) or {*pattern} - {*WORDS}:
        raise RecipeError(f"hybrid_override_pattern = {pattern!r}: must be a string over {', '.join(WORDS)}")
    return [WORDS[letter] for letter in pattern]


def _read(config: Config, tables: Tables) -> None:
    check_time_steps(config)
    model, mixer = tables["model"], tables[f"mixer.{MAMBA}"]
    if "E" in model["feed_forwards"]:
        read_experts(config, tables, "n_group", "n_shared_experts", 1, 1, 1)
        tables["moe"]["shared_hidden_size"] = config.get(SHARED_KEY, 7688)
        if not tables["moe"]["shared_hidden_size"]:
            raise RecipeError(f"{SHARED_KEY} = 0: every layer of experts has a shared one")
    else:
        tables["moe"] = dict.fromkeys(("num_experts", "top_k", "hidden_size", "latent_size", "shared_hidden_size"), 0)
    counts = mixer["heads"], mixer["head_dim"], model["hidden_size"]
    if all(type(count) is int and count > 0 for count in counts):
        mixer["expand"] = counts[0] * counts[1] / counts[2]


def _write(tables: Tables, config: Config) -> None:
    moe = tables["moe"]
    if not tables[f"mixer.{MAMBA}"]["conv"]:
        raise RecipeError(f"mixer.{MAMBA}.conv = 0: every layer has convolutions")
    if not moe["num_experts"]:
        for key, target in PUBLISHED.keys.items():
            if target.startswith("moe."):
                del config[key]
    else:
        config |= {"n_group": moe["num_groups"] or 1, "topk_group": moe["top_k_groups"] or 1, "n_shared_experts": 1}
        config |= {"moe_latent_size": moe["latent_size"] or None, SHARED_KEY: moe["shared_hidden_size"]}
    entries = config.pop("layer_types")
    letters = {word: letter for letter, word in WORDS.items()}
    config |= {
        "layers_block_type": entries,
        "hybrid_override_pattern": "".join(letters[entry] for entry in entries),
        "num_hidden_layers": len(entries),
        "num_nextn_predict_layers": 0,
        "expand": 2,
    }


ENTRY, MIXER, FFN = "backbone.layers", "backbone.layers.{mixer}.mixer", "backbone.layers.{ffn}.mixer"
EXPERTS = "layers.{layer}.ffn"

NAMES = (
    Name("embed.weight", "backbone.embeddings.weight"),
    Name("norm.weight", "backbone.norm_f.weight"),
    Name("head.weight", "lm_head.weight"),
    Name("layers.{layer}.mixer_norm.weight", f"{ENTRY}.{{mixer}}.norm.weight"),
    Name("layers.{layer}.ffn_norm.weight", f"{ENTRY}.{{ffn}}.norm.weight"),
    *(Name(f"layers.{{layer}}.mixer.{x}_proj.weight", f"{MIXER}.{x}_proj.weight", mixer=SOFTMAX) for x in "qkvo"),
    *mamba(MIXER),
    Name(f"{EXPERTS}.up_proj.weight", f"{FFN}.up_proj.weight"),
    Name(f"{EXPERTS}.down_proj.weight", f"{FFN}.down_proj.weight"),
    Name(f"{EXPERTS}.router.weight", f"{FFN}.gate.weight"),
    Name(BIAS, f"{FFN}.gate.e_score_correction_bias"),
    Name(f"{EXPERTS}.latent_down.weight", f"{FFN}.fc1_latent_proj.weight"),
    Name(f"{EXPERTS}.latent_up.weight", f"{FFN}.fc2_latent_proj.weight"),
    Name(f"{EXPERTS}.experts.up", f"{FFN}.experts.{{expert}}.up_proj.weight"),
    Name(f"{EXPERTS}.experts.down", f"{FFN}.experts.{{expert}}.down_proj.weight"),
    Name(f"{EXPERTS}.shared.up_proj.weight", f"{FFN}.shared_experts.up_proj.weight"),
    Name(f"{EXPERTS}.shared.down_proj.weight", f"{FFN}.shared_experts.down_proj.weight"),
)

PUBLISHED = Architecture(
    name="NemotronHForCausalLM",
    model_type="nemotron_h",
    keys={
        **{key: ours for key, ours in MODEL_KEYS.items() if key not in ("num_hidden_layers", "rms_norm_eps")},
        "layer_norm_epsilon": "model.norm_eps",
        "intermediate_size": "model.ffn_hidden_size",
        "n_routed_experts": "moe.num_experts",
        "num_experts_per_tok": "moe.top_k",
        "moe_intermediate_size": "moe.hidden_size",
        "moe_latent_size": "moe.latent_size",
        "routed_scaling_factor": "moe.routed_scaling",
        "norm_topk_prob": "moe.renormalize",
        "mamba_num_heads": f"mixer.{MAMBA}.heads",
        "mamba_head_dim": f"mixer.{MAMBA}.head_dim",
        "ssm_state_size": f"mixer.{MAMBA}.state",
        "n_groups": f"mixer.{MAMBA}.groups",
        "conv_kernel": f"mixer.{MAMBA}.conv",
    },
    names=NAMES,
    defaults={
        **MODEL_DEFAULTS,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": 21504,
        "layer_norm_epsilon": 1e-5,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 7688,
        "moe_latent_size": 0,
        "routed_scaling_factor": 1.0,
        "norm_topk_prob": True,
        "mamba_num_heads": 128,
        "mamba_head_dim": 64,
        "ssm_state_size": 128,
        "n_groups": 8,
        "conv_kernel": 4,
    },
    fixed={
        "mlp_hidden_act": "relu2",
        "mamba_hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "use_bias": False,
        "mamba_proj_bias": False,
        "use_conv_bias": True,
        "residual_in_fp32": False,
        "sliding_window": None,
    },
    implied={"model.activation": "relu2", f"mixer.{SOFTMAX}.rope": False, **SIGMOID_IMPLIED},
    read=_read,
    write=_write,
    synonyms={
        "layers_block_type": "layer_types",
        "norm_eps": "layer_norm_epsilon",
        "rms_norm_eps": "layer_norm_epsilon",
        "mamba_n_groups": "n_groups",
        "mamba_num_groups": "n_groups",
        "mamba_state_dim": "ssm_state_size",
        "mamba_d_conv": "conv_kernel",
        "mamba_conv_bias": "use_conv_bias",
        "mamba_dt_limit": "time_step_limit",
    },
    aliases=("NemotronH_Nano_Omni_Reasoning_V3", "NemotronH_Omni_Reasoning_V3"),
    nested=("llm_config", "text_config"),
    spellings=(renamed(NAMES, "", "language_model."),),
    dense=True,
    ignored=(r"mtp\..*", r"(vision_model|vision_projector|mlp1|sound_encoder|sound_projection)\..*"),
    layers={"mamba": MAMBA, "linear_attention": MAMBA, "attention": FULL, FULL: FULL},
    feed_forwards={"mlp": "-", "moe": "E"},
    layer_types=_words,
    float32=(BIAS, f"{EXPERTS}.router.weight"),
)

FAMILIES.add(
    "nemotron_h",
    Family(
        name="nemotron_h",
        attention=SOFTMAX,
        common={
            "mixer": MAMBA,
            "layout": "L",
            "activation": "relu2",
            "max_length": 262144,
            "rope_theta": 1e4,
            "norm_eps": 1e-5,
            "tie_embeddings": False,
            "init_std": 0.02,
        },
        options={"rope": False},
        presets=PRESETS,
        published=(PUBLISHED,),
    ),
)
