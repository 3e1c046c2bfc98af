"""Parameters of one layer in closed form, by mixer, from its options and the model's dimensions alone.

Shared modules are not counted; a mixer whose first layer does without some says so in NOT_IN_FIRST.

Letters: D model width, H heads (of queries), G heads of keys and values, K and V key and value width of a head, W taps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torchlinearmoe.mixers import MIXERS
from torchlinearmoe.mixers.base import expanded, geometry

Formula = Callable[[Any, Any], int]
"""(options, model) to a number of parameters."""


def _grouped(options: Any, model: Any) -> tuple[int, int, int, int, int]:
    """(D, H, G, K, V) of a mixer with key-value heads."""
    heads, width = geometry(options, model)
    key_dim, value_dim = expanded(width, options.expand_k), expanded(width, options.expand_v)
    return model.hidden_size, heads, options.kv_heads or heads, key_dim, value_dim


def _delta(options: Any, model: Any) -> tuple[int, int, int, int, int]:
    """(D, heads of keys, K, heads of values, V) of a delta rule."""
    heads, width = geometry(options, model)
    key_dim = expanded(width, getattr(options, "expand_k", 1.0))
    return model.hidden_size, heads, key_dim, options.value_heads or heads, expanded(width, options.expand_v)


def _inner(options: Any, model: Any) -> tuple[int, int]:
    """(D, H K)."""
    heads, width = geometry(options, model)
    return model.hidden_size, heads * width


def norm(options: Any, width: int) -> int:
    """`width` of the norm before the output, where there is one."""
    return 0 if options.output_norm == "none" else width


def feature_map(name: str, head_dim: int, feature_dim: int) -> int:
    """Of one learned map: matrices [K, F], and the biases of hedgehog and hadamard."""
    features = feature_dim or head_dim
    return {
        "t2r": features * head_dim,
        "hedgehog": head_dim * (head_dim + 1),
        "hadamard": 2 * features * (head_dim + 1),
    }.get(name, 0)


def linear_attention(options: Any, model: Any) -> int:
    """D (2 H K + 3 H V), V of the norm, W (2 H K + H V) of convolutions, and the learned maps."""
    width, (heads, key_dim) = model.hidden_size, geometry(options, model)
    value_dim = expanded(key_dim, options.expand_v)
    weights = width * heads * (2 * key_dim + 3 * value_dim) + norm(options, value_dim)
    maps = (1 if options.tie_feature_maps else 2) * feature_map(options.feature_map, key_dim, options.feature_dim)
    return weights + options.conv * heads * (2 * key_dim + value_dim) + maps


def retention(options: Any, model: Any) -> int:
    """D (2 H K + 3 H V), V of the norm, W (2 H K + H V) of convolutions."""
    width, (heads, key_dim) = model.hidden_size, geometry(options, model)
    value_dim = expanded(key_dim, options.expand_v)
    weights = width * heads * (2 * key_dim + 3 * value_dim)
    return weights + norm(options, value_dim) + options.conv * heads * (2 * key_dim + value_dim)


def lightning_attention(options: Any, model: Any) -> int:
    """5 D H K, H K of the norm (K a head's), 3 W H K of convolutions."""
    width, inner = _inner(options, model)
    scales = geometry(options, model)[1] if options.norm == "head" else inner
    return (5 * width + 3 * options.conv) * inner + scales


def quadratic(options: Any, model: Any) -> int:
    """D (2 H K + 2 H V), D H V more with a gate, W (2 H K + H V) of convolutions."""
    width, values = _inner(options, model)
    keys = geometry(options, model)[0] * options.feature_dim
    return width * (2 * keys + (2 + options.gate) * values) + options.conv * (2 * keys + values)


def rebased(options: Any, model: Any) -> int:
    """4 K of the norms (2 K where they are tied) beside the projections."""
    return quadratic(options, model) + (2 if options.tie_norms else 4) * options.feature_dim


def gla(options: Any, model: Any) -> int:
    """D (H K + G K + G V + 2 H V), (D + G K) R + G K of the decay, V of the norm, W (H K + G K + G V)."""
    width, heads, kv_heads, key_dim, value_dim = _grouped(options, model)
    inputs, keys = (heads + kv_heads) * key_dim + kv_heads * value_dim, kv_heads * key_dim
    decay = (width + keys) * options.gate_rank + keys
    return width * (inputs + 2 * heads * value_dim) + decay + norm(options, value_dim) + options.conv * inputs


def gsa(options: Any, model: Any) -> int:
    """D (H K + G K + G V + G S + H V), H V of the norm, W (H K + G K + G V) of convolutions."""
    width, heads, kv_heads, key_dim, value_dim = _grouped(options, model)
    inputs, outputs = (heads + kv_heads) * key_dim + kv_heads * value_dim, heads * value_dim
    return width * (inputs + kv_heads * options.slots + outputs) + norm(options, outputs) + options.conv * inputs


def hgrn2(options: Any, model: Any) -> int:
    """4 D H K, H K of the norm, 3 W H K of convolutions."""
    width, inner = _inner(options, model)
    return (4 * width + 3 * options.conv) * inner + norm(options, inner)


def mamba2(options: Any, model: Any) -> int:
    """D (3 C + 2 G N + H), (W + 1) (C + 2 G N) of convolutions, C of the norm, 3 H of the decay; C = H P."""
    inner = expanded(model.hidden_size, options.expand)
    heads = options.heads or inner // (options.head_dim or 64)
    shared = 2 * options.groups * options.state
    inner = heads * (options.head_dim or inner // heads)
    convolutions = (options.conv + 1) * (inner + shared) if options.conv else 0
    return model.hidden_size * (3 * inner + shared + heads) + convolutions + inner + 3 * heads


def delta_rule(options: Any, model: Any) -> int:
    """D (2 H K + 2 HV V + HV), W (2 H K + HV V) of convolutions, V of the norm."""
    width, heads, key_dim, value_heads, value_dim = _delta(options, model)
    keys, values = heads * key_dim, value_heads * value_dim
    weights = width * (2 * keys + 2 * values + value_heads)
    return weights + options.conv * (2 * keys + values) + norm(options, value_dim)


def delta_net(options: Any, model: Any) -> int:
    """D HV V of the gate beside the rule's."""
    width, _, _, value_heads, value_dim = _delta(options, model)
    return delta_rule(options, model) + options.gate * width * value_heads * value_dim


def gated_delta_net(options: Any, model: Any) -> int:
    """D HV V of the gate and (D + 2) HV of the decay beside the rule's."""
    width, _, _, value_heads, value_dim = _delta(options, model)
    return delta_rule(options, model) + width * value_heads * value_dim + (width + 2) * value_heads


def kda(options: Any, model: Any) -> int:
    """D R + (R + 1) HV K + HV of the decay and D R' + (R' + 1) HV V of the gate beside the rule's; R' without bias.

    At full rank D HV K and D HV V in the place of D R + R HV K and D R' + R' HV V.
    """
    width, _, key_dim, heads, value_dim = _delta(options, model)
    if options.full_rank:
        decay = (width + 1) * heads * key_dim + heads
        return delta_rule(options, model) + decay + (width + options.gate_bias) * heads * value_dim
    decay_rank, gate_rank = options.decay_rank or value_dim, options.gate_rank or value_dim
    decay = width * decay_rank + (decay_rank + 1) * heads * key_dim + heads
    return delta_rule(options, model) + decay + width * gate_rank + (gate_rank + options.gate_bias) * heads * value_dim


def rwkv6(options: Any, model: Any) -> int:
    """5 D C, D (6 + 10 R) of the mixes, (D + C) R' of the decay, 4 C of w_0, u and the norm; C = H K."""
    width, inner = _inner(options, model)
    return 5 * width * inner + width * (6 + 10 * options.mix_rank) + (width + inner) * options.decay_rank + 4 * inner


def _rwkv7_ranks(options: Any, width: int) -> dict[str, int]:
    factors = {"decay_rank": 2.5, "rate_rank": 2.5, "value_rank": 1.7, "gate_rank": 5.0}
    return {name: getattr(options, name) or max(32, 32 * round(x * width**0.5 / 32)) for name, x in factors.items()}


def rwkv7(options: Any, model: Any) -> int:
    """4 D C, 6 D of the mixes, (D + C) R of each rank, 8 C of w_0, a_0, v_0, xi, alpha, rho and the norm; C = H K."""
    width, inner = _inner(options, model)
    ranks = sum(_rwkv7_ranks(options, width).values())
    return 4 * width * inner + 6 * width + (width + inner) * ranks + 8 * inner


def rwkv7_values(options: Any, model: Any) -> int:
    """(D + C) R + C: the first layer has no values to mix with."""
    width, inner = _inner(options, model)
    return (width + inner) * _rwkv7_ranks(options, width)["value_rank"] + inner


def softmax_attention(options: Any, model: Any) -> int:
    """D (2 H d + 2 G d), the biases (H + 2 G) d, W (H + 2 G) d of convolutions.

    Norms of heads have 2 d, of all heads together (H + G) d, an output gate D H d.
    """
    heads, width = options.heads or model.num_heads, options.head_dim or model.head_dim
    kv_heads = options.kv_heads or (heads if options.heads else model.num_kv_heads)
    weights = model.hidden_size * ((3 if options.output_gate else 2) * heads + 2 * kv_heads)
    weights += {"none": 0, "head": 2, "full": heads + kv_heads}[options.qk_norm]
    return (weights + (heads + 2 * kv_heads) * (options.qkv_bias + options.conv)) * width


def mla(options: Any, model: Any) -> int:
    """q: D H (n + r), or Q (D + 1 + H (n + r)); D (C + r) + C; C H (n + v); H v D; D H of a gate."""
    width, heads, latent, rotary = (
        model.hidden_size,
        options.heads or model.num_heads,
        options.kv_lora_rank,
        options.qk_rope_head_dim,
    )
    queries, rank = heads * (options.head_dim + rotary), options.q_lora_rank
    return (
        (rank * (width + 1 + queries) if rank else width * queries)
        + width * (latent + rotary)
        + latent
        + latent * heads * (options.head_dim + options.v_head_dim)
        + heads * options.v_head_dim * width
        + (width * heads if options.output_gate == "head" else 0)
    )


def memories(name: str) -> Formula:
    """The inner mixer's, its writing layers once more a further memory, and the router's D a memory."""

    def count(options: Any, model: Any) -> int:
        mixer: Any = MIXERS[name]
        inner, inner_options = mixer.inner_of(options, model)
        more = 0 if options.shared_projections else options.num_memories + options.shared_memory - 1
        written = WRITES[inner.name](inner_options, model)
        return LAYER[inner.name](inner_options, model) + more * written + options.num_memories * model.hidden_size

    return count


def _gla_writes(options: Any, model: Any) -> int:
    width, _, kv_heads, key_dim, value_dim = _grouped(options, model)
    keys = kv_heads * key_dim
    return width * kv_heads * (key_dim + value_dim) + (width + keys) * options.gate_rank + keys


def _gsa_writes(options: Any, model: Any) -> int:
    width, _, kv_heads, key_dim, value_dim = _grouped(options, model)
    return width * kv_heads * (key_dim + value_dim + options.slots)


def _kv_writes(options: Any, model: Any) -> int:
    heads, key_dim = geometry(options, model)
    return model.hidden_size * heads * (key_dim + expanded(key_dim, options.expand_v))


def _twice(options: Any, model: Any) -> int:
    width, inner = _inner(options, model)
    return 2 * width * inner


def _delta_writes(options: Any, model: Any) -> int:
    width, heads, key_dim, value_heads, value_dim = _delta(options, model)
    return width * (heads * key_dim + value_heads * (value_dim + 1))


def _gated_delta_writes(options: Any, model: Any) -> int:
    return _delta_writes(options, model) + model.hidden_size * _delta(options, model)[3]


def _kda_writes(options: Any, model: Any) -> int:
    width, _, key_dim, heads, value_dim = _delta(options, model)
    if options.full_rank:
        return _delta_writes(options, model) + width * heads * key_dim
    return _delta_writes(options, model) + (width + heads * key_dim) * (options.decay_rank or value_dim)


LAYER: dict[str, Formula] = {
    "based": quadratic,
    "delta_net": delta_net,
    "gated_delta_net": gated_delta_net,
    "gla": gla,
    "gsa": gsa,
    "hgrn2": hgrn2,
    "kda": kda,
    "lightning_attention": lightning_attention,
    "linear_attention": linear_attention,
    "mamba2": mamba2,
    "mla": mla,
    "mom_gated_delta_net": memories("mom_gated_delta_net"),
    "mom_gla": memories("mom_gla"),
    "rebased": rebased,
    "retention": retention,
    "rwkv6": rwkv6,
    "rwkv7": rwkv7,
    "softmax_attention": softmax_attention,
}
NOT_IN_FIRST: dict[str, Formula] = {"rwkv7": rwkv7_values}
WRITES: dict[str, Formula] = {
    "delta_net": _delta_writes,
    "gated_delta_net": _gated_delta_writes,
    "gla": _gla_writes,
    "gsa": _gsa_writes,
    "hgrn2": _twice,
    "kda": _kda_writes,
    "lightning_attention": _twice,
    "linear_attention": _kv_writes,
    "retention": _kv_writes,
}
"""Of the layers that a memory has of its own."""
