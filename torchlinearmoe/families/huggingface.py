"""How a family's published models are spelled: `config.json` keys and tensor names of a Hugging Face directory.

Data that is read in both directions: import and export follow the same lines. The engine that does is
`torchlinearmoe/checkpoint/huggingface/`. Several names may say that parts of one tensor of theirs are tensors of ours:

    q_proj [2 H d, D], by head d rows of queries and d of gates    rows(H, (d, d), 0) of it are our q_proj,
                                                                   rows(H, (d, d), 1) our g_proj
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from torchlinearmoe.recipe.schema import ModelRecipe

Config = dict[str, Any]
"""A parsed `config.json`."""
Tables = dict[str, dict[str, Any]]
"""A recipe as tables by section: `{"model": {...}, "moe": {...}, "mixer.mla": {...}}`."""
FULL = "full_attention"
"""Softmax attention, in `layer_types`."""


class Rows(NamedTuple):
    """Blocks of rows of a fused tensor: `groups` times as many rows as all `widths`, of which part `index` is meant."""

    groups: int
    widths: tuple[int, ...]
    index: int


@dataclass(frozen=True)
class Name:
    """A tensor of ours and the tensor of theirs that holds it, or a part of it.

    `{layer}` stands for the layer and `{expert}` for the expert; a name with `{expert}` is one matrix [out, in] of an
    expert, whose transpose is the slice of our stack [E, in, out]. Where mixers and feed-forwards are layers of their
    own, `{mixer}` and `{ffn}` stand for the numbers of these two of a layer of ours.
    """

    ours: str
    theirs: str
    part: Literal["whole", "gate", "up"] = "whole"
    """Which half of the last dim of `experts.gate_up` it is."""
    rows: Callable[[ModelRecipe], Rows] | None = None
    """Which rows of theirs are ours, where not all are."""
    axes: tuple[int | None, ...] | None = None
    """For each dim of theirs the dim of ours that it is, None for a dim of one, where they are not the same."""
    mixer: str = ""
    """The mixer of the layers that it is for; empty for any."""
    joined: tuple[tuple[str, str], ...] = ()
    """Tensors of ours and of theirs, this one among them, whose rows lie one behind the other: a directory may cut them
    elsewhere than we do."""


@dataclass(frozen=True)
class Architecture:
    """One value of `architectures` in `config.json`, as data."""

    name: str
    """What is written."""
    model_type: str
    keys: Mapping[str, str]
    """`config.json` key to recipe key `section.key` (`mixer.NAME.key` for the options of a mixer)."""
    names: tuple[Name, ...]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """What a `config.json` means that leaves a key of `keys` out."""
    fixed: Mapping[str, Any] = field(default_factory=dict)
    """`config.json` keys that change the model and of which one value is known here; left out, they have it."""
    implied: Mapping[str, Any] = field(default_factory=dict)
    """Recipe keys that every model of the architecture has in common."""
    read: Callable[[Config, Tables], None] | None = None
    """Adds to the recipe's tables what no single key tells. Raises RecipeError."""
    write: Callable[[Tables, Config], None] | None = None
    """The same the other way. Raises RecipeError for what the architecture does not have."""
    synonyms: Mapping[str, str] = field(default_factory=dict)
    """Other names of keys, as transformers saves them again or as remote code has them, to those that are used here."""
    own_code: bool = False
    """Whether it is the release's own code that knows it, and transformers does not."""
    aliases: tuple[str, ...] = ()
    """Other values of `architectures` that are read: a multimodal model whose text part it is, an older name."""
    nested: tuple[str, ...] = ()
    """Keys of a multimodal `config.json` under one of which the text part is described."""
    spellings: tuple[tuple[Name, ...], ...] = ()
    """Other names that directories have in the place of some of `names`; read where all parts of a tensor are there."""
    ignored: tuple[str, ...] = ()
    """Tensors that are left out, as regular expressions; `{beyond}` is a layer's number behind the last one."""
    layers: Mapping[str, str] = field(default_factory=dict)
    """Entries of `layer_types` to linear mixers, or another word to `full_attention`, the family's attention. The last
    word for each is written."""
    feed_forwards: Mapping[str, str] = field(default_factory=dict)
    """Entries of `layer_types` that are feed-forwards by themselves, to the letters of `model.feed_forwards`: a mixer
    and the feed-forward after it are one layer here. Empty: an entry is a layer."""
    layer_types: Callable[[Config], list[str]] | None = None
    """What `layer_types` are where `config.json` has none; without it, softmax attention in every layer."""
    rotary: tuple[str, float] | None = None
    """The recipe key, a number of channels, that `partial_rotary_factor` tells, and the factor that a left-out one
    means; None: all channels are rotated."""
    rope_switch: str = ""
    """The recipe key, true or false, by which a rotary base of null turns rotation off."""
    rope_ignored: tuple[str, ...] = ()
    """Rotary parameters that change nothing for text."""
    float32: tuple[str, ...] = ()
    """Tensors, by our names, that an export into another type leaves as they are."""

    dense: bool = False
    """Whether it is also that of models without experts."""

    @property
    def sparse(self) -> bool:
        """Whether its models have experts."""
        return "moe.num_experts" in self.keys.values()


MODEL_KEYS = {
    "vocab_size": "model.vocab_size",
    "hidden_size": "model.hidden_size",
    "num_hidden_layers": "model.num_layers",
    "num_attention_heads": "model.num_heads",
    "num_key_value_heads": "model.num_kv_heads",
    "head_dim": "model.head_dim",
    "max_position_embeddings": "model.max_length",
    "rms_norm_eps": "model.norm_eps",
    "tie_word_embeddings": "model.tie_embeddings",
    "initializer_range": "model.init_std",
}
MODEL_DEFAULTS = {"rms_norm_eps": 1e-6, "tie_word_embeddings": False, "initializer_range": 0.02}
MODEL_FIXED = {"hidden_act": "silu"}

OUTER = (
    Name("embed.weight", "model.embed_tokens.weight"),
    Name("norm.weight", "model.norm.weight"),
    Name("head.weight", "lm_head.weight"),
    Name("layers.{layer}.mixer_norm.weight", "model.layers.{layer}.input_layernorm.weight"),
    Name("layers.{layer}.ffn_norm.weight", "model.layers.{layer}.post_attention_layernorm.weight"),
)
"""Everything around mixers and feed-forwards."""
ATTENTION = tuple(
    Name(f"layers.{{layer}}.mixer.{name}", f"model.layers.{{layer}}.self_attn.{name}")
    for name in (
        *("q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight"),
        *("q_proj.bias", "k_proj.bias", "v_proj.bias"),
    )
)
"""GQA, with biases where the model has them."""


LATENT = tuple(
    Name(f"layers.{{layer}}.mixer.{ours}.weight", f"model.layers.{{layer}}.self_attn.{theirs}.weight")
    for ours, theirs in (
        ("q_proj", "q_proj"),
        ("q_a_proj", "q_a_proj"),
        ("q_a_norm", "q_a_layernorm"),
        ("q_b_proj", "q_b_proj"),
        ("kv_a_proj", "kv_a_proj_with_mqa"),
        ("kv_a_norm", "kv_a_layernorm"),
        ("kv_b_proj", "kv_b_proj"),
        ("o_proj", "o_proj"),
    )
)
"""MLA, queries compressed or not."""
LATENT_KEYS = {
    "qk_nope_head_dim": "mixer.mla.head_dim",
    "qk_rope_head_dim": "mixer.mla.qk_rope_head_dim",
    "v_head_dim": "mixer.mla.v_head_dim",
    "kv_lora_rank": "mixer.mla.kv_lora_rank",
    "q_lora_rank": "mixer.mla.q_lora_rank",
}
HEAD_NORMS = tuple(
    Name(f"layers.{{layer}}.mixer.{name}.weight", f"model.layers.{{layer}}.self_attn.{name}.weight")
    for name in ("q_norm", "k_norm")
)
"""Norms of each head's queries and keys."""


def period(letters: str) -> str:
    """The shortest string that makes `letters` when it is repeated and cut."""
    length = len(letters)
    return next(letters[:n] for n in range(1, length + 1) if (letters[:n] * (length // n + 1)).startswith(letters))


def swiglu(ours: str, theirs: str) -> tuple[Name, ...]:
    """The three matrices of a dense SwiGLU."""
    return tuple(
        Name(f"layers.{{layer}}.{ours}.{name}.weight", f"model.layers.{{layer}}.{theirs}.{name}.weight")
        for name in ("gate_proj", "up_proj", "down_proj")
    )


def experts(theirs: str, gate: str, up: str, down: str) -> tuple[Name, ...]:
    """The routed experts, `theirs` being where they live: `mlp.experts`."""
    stack, path = "layers.{layer}.ffn.experts", f"model.layers.{{layer}}.{theirs}.{{expert}}"
    return (
        Name(f"{stack}.gate_up", f"{path}.{gate}.weight", "gate"),
        Name(f"{stack}.gate_up", f"{path}.{up}.weight", "up"),
        Name(f"{stack}.down", f"{path}.{down}.weight"),
    )


def stacked_experts(theirs: str, gate_up: str, down: str) -> tuple[Name, ...]:
    """The routed experts as two tensors [E, 2 F, D], gates first, and [E, D, F]; `theirs` as above."""
    stack, path = "layers.{layer}.ffn.experts", f"model.layers.{{layer}}.{theirs}"
    return (
        Name(f"{stack}.gate_up", f"{path}.{gate_up}", axes=(0, 2, 1)),
        Name(f"{stack}.down", f"{path}.{down}", axes=(0, 2, 1)),
    )


def of_mixer(mixer: str, names: tuple[Name, ...]) -> tuple[Name, ...]:
    """The same names in layers of `mixer` alone."""
    return tuple(dataclasses.replace(name, mixer=mixer) for name in names)


def renamed(names: tuple[Name, ...], old: str, new: str) -> tuple[Name, ...]:
    """The same names where theirs begin with `new` instead of `old`."""
    return tuple(
        dataclasses.replace(name, theirs=new + name.theirs.removeprefix(old))
        for name in names
        if name.theirs.startswith(old)
    )
