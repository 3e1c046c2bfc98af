"""Qwen3.5 mixtures: the layers of Qwen3-Next, their projections apart, in a model that also sees pictures.

Sizes: `A3B` (35B, and Qwen3.6), `A10B` (122B), `A17B` (397B), and `debug`. The text part is read, of a `config.json` of
text alone or as `text_config`; the vision tower and the head that predicts further tokens are left out. Experts are
read one by one or stacked, as they were released. The rotary positions of pictures are ordinary ones for text.
"""

from __future__ import annotations

from torchlinearmoe.families.base import FAMILIES, Family, model_size
from torchlinearmoe.families.huggingface import (
    MODEL_FIXED,
    OUTER,
    Architecture,
    Name,
    of_mixer,
    renamed,
    stacked_experts,
)
from torchlinearmoe.families.qwen3_next import (
    ATTENTION_NAMES,
    COMMON,
    DEFAULTS,
    DELTA,
    DELTA_NAMES,
    EXPERT_NAMES,
    GATED_HEADS,
    IMPLIED,
    KEYS,
    OURS,
    SHARED_NAMES,
    SOFTMAX,
    THEIRS,
    delta,
    every_fourth,
    experts_of,
    joined,
    read_delta,
    write_delta,
)

ROTATED = {"rotary_dim": 64}
PRESETS = {
    "debug": (
        model_size(64, 4, 4, 2, 160, 1024, head_dim=16, max_length=1024, rope_theta=1e4),
        experts_of(4, 2, 32),
        {"rotary_dim": 4},
        delta(2, 4, 16),
    ),
    "A3B": (model_size(2048, 40, 16, 2, 512, 248320, head_dim=256), experts_of(256, 8, 512), ROTATED, delta(16, 32)),
    "A10B": (model_size(3072, 48, 32, 2, 1024, 248320, head_dim=256), experts_of(256, 8, 1024), ROTATED, delta(16, 64)),
    "A17B": (
        model_size(4096, 60, 32, 2, 1024, 248320, head_dim=256),
        experts_of(512, 10, 1024),
        ROTATED,
        delta(16, 64),
    ),
}

LAYER_NAMES = (
    *ATTENTION_NAMES,
    *DELTA_NAMES,
    *of_mixer(
        DELTA,
        (
            *(
                Name(f"{OURS}.{part}_proj.weight", f"{THEIRS}.in_proj_qkv.weight", rows=joined(index))
                for index, part in enumerate("qkv")
            ),
            Name(f"{OURS}.g_proj.weight", f"{THEIRS}.in_proj_z.weight"),
            Name(f"{OURS}.b_proj.weight", f"{THEIRS}.in_proj_b.weight"),
            Name(f"{OURS}.a_proj.weight", f"{THEIRS}.in_proj_a.weight"),
        ),
    ),
    *SHARED_NAMES,
)
NAMES = (*OUTER, *LAYER_NAMES, *EXPERT_NAMES)
STACKED = stacked_experts("mlp.experts", "gate_up_proj", "down_proj")

PUBLISHED = Architecture(
    name="Qwen3_5MoeForCausalLM",
    model_type="qwen3_5_moe_text",
    keys=KEYS,
    names=NAMES,
    defaults=DEFAULTS,
    fixed={**MODEL_FIXED, "attention_bias": False},
    implied={**IMPLIED, "moe.renormalize": True},
    read=read_delta,
    write=write_delta,
    aliases=("Qwen3_5MoeForConditionalGeneration",),
    nested=("text_config",),
    spellings=(
        STACKED,
        renamed(NAMES, "model.", "model.language_model."),
        renamed(STACKED, "model.", "model.language_model."),
    ),
    ignored=(r"mtp\..*", r"model\.visual\..*"),
    layers={"linear_attention": DELTA},
    layer_types=every_fourth,
    rotary=(f"mixer.{SOFTMAX}.rotary_dim", 0.25),
    rope_ignored=("mrope_section", "mrope_interleaved"),
)

FAMILIES.add(
    "qwen3_5_moe",
    Family(
        name="qwen3_5_moe",
        attention=SOFTMAX,
        common=COMMON,
        options=GATED_HEADS,
        presets=PRESETS,
        published=(PUBLISHED,),
    ),
)
