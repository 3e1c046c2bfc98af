"""Softmax attention with grouped key-value heads and rotary positions (Ainslie et al. 2023, arXiv 2305.13245).

The `N` layers of the families that use GQA. Not linear: its state is the past itself, one key and value a token. With a
`window` (Beltagy et al. 2020, arXiv 2004.05150) a token sees itself and the window - 1 tokens before it, and the state
keeps no more than that: position p lies in slot p mod window, and a new token takes the place of the one that leaves.

    window 4 after positions 0 .. 5      slot 0 1 2 3
                                         holds 4 5 2 3

Shapes: T tokens, D width, H query heads, G key-value heads, d head width, B sequences, W window, L tokens of the
longest.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.distributed.tensor import Placement, Replicate, Shard

from torchlinearmoe.errors import RecipeError
from torchlinearmoe.initialize import linear
from torchlinearmoe.kernels import attention
from torchlinearmoe.kernels.cached_attention import cached_attention
from torchlinearmoe.kernels.choose import KernelCall
from torchlinearmoe.layers.convolution import Convolutions
from torchlinearmoe.layers.norm import RMSNorm
from torchlinearmoe.layers.past import After, Past, Resumed
from torchlinearmoe.layers.rope import rotate_first
from torchlinearmoe.mixers.attention import append_to_cache, attend, padded_queries
from torchlinearmoe.mixers.base import (
    Carry,
    Context,
    LayerPlace,
    Mixer,
    MixerOptions,
    State,
    StateSpec,
    register,
    rope_scaling,
)
from torchlinearmoe.recipe.schema import ModelRecipe


@dataclass(frozen=True, kw_only=True)
class Options(MixerOptions):
    """`[mixer.softmax_attention]`; 0 takes the family's value."""

    kv_heads: int = 0
    """Key and value heads."""
    window: int = 0
    """Tokens that a token sees, itself included; 0 for all of its document."""
    conv: int = 0
    """Taps of a short convolution on queries, keys and values, before the rotation; 0 for none."""
    qkv_bias: bool = False
    """Biases on the query, key and value projections; the families with biases bring them."""
    qk_norm: Literal["none", "head", "full"] = "none"
    """RMSNorm of queries and keys before the rotation: of each head, one weight for all, or of all heads together."""
    rope: bool = True
    """Rotate queries and keys by their positions."""
    rotary_dim: int = 0
    """Channels of a head that are rotated, the first ones; 0 for all."""
    output_gate: bool = False
    """Multiply what each head reads by a sigmoid gate of the token, a channel each."""
    scale: float = 0.0
    """What scores are multiplied by; 0 for 1 / sqrt(head width)."""


def _heads(options: Options, model: ModelRecipe) -> tuple[int, int, int]:
    """(query heads, key-value heads, head width)."""
    heads = options.heads or model.num_heads
    kv_heads = options.kv_heads or (model.num_kv_heads if not options.heads else heads)
    return heads, kv_heads, options.head_dim or model.head_dim


@register("softmax_attention")
class SoftmaxAttention(Mixer[Options]):
    """o = softmax(q k^T * scale, causal inside the document and the window) v  [* sigmoid(W_g x)]."""

    keeps_past = True
    Options = Options
    variants = (
        {"heads": 4, "head_dim": 16, "kv_heads": 2},
        {"heads": 3, "head_dim": 10, "kv_heads": 1},
        {"conv": 4},
        {"qkv_bias": True},
        {"qk_norm": "head", "rotary_dim": 10, "output_gate": True},
        {"rope": False, "qk_norm": "head"},
        {"qk_norm": "full"},
        {"window": 6, "scale": 0.5},
        {"window": 5, "heads": 4, "head_dim": 16, "kv_heads": 2},
        {"window": 65, "heads": 3, "head_dim": 10, "kv_heads": 1},
    )
    float8 = ("q_proj", "k_proj", "v_proj", "g_proj", "o_proj")
    regions = ("project", "rotate_heads", "output")

    def __init__(self, options: Options, model: ModelRecipe, place: LayerPlace) -> None:
        super().__init__(options, model, place)
        self.heads, self.kv_heads, self.head_dim = _heads(options, model)
        self.window = options.window
        self.scale = options.scale or self.head_dim**-0.5
        self.theta, self.scaling = model.rope_theta, rope_scaling(model)
        self.backend = model.attention_backend
        width, std, bias = model.hidden_size, model.init_std, options.qkv_bias
        self.q_proj = linear(width, self.heads * self.head_dim, std, bias)
        self.k_proj = linear(width, self.kv_heads * self.head_dim, std, bias)
        self.v_proj = linear(width, self.kv_heads * self.head_dim, std, bias)
        self.q_norm = self.k_norm = None
        self.norm_per_head = options.qk_norm == "head"
        if options.qk_norm != "none":
            widths = (1, 1) if self.norm_per_head else (self.heads, self.kv_heads)
            self.q_norm, self.k_norm = (RMSNorm(n * self.head_dim, model.norm_eps, model.norm_offset) for n in widths)
        self.g_proj = linear(width, self.heads * self.head_dim, std) if options.output_gate else None
        self.rotary_dim = (options.rotary_dim or self.head_dim) if options.rope else 0
        kv_width = self.kv_heads * self.head_dim
        self.convs = Convolutions({"q": self.heads * self.head_dim, "k": kv_width, "v": kv_width}, options.conv)
        self.o_proj = linear(self.heads * self.head_dim, width, std / (2 * model.num_layers) ** 0.5)

    @classmethod
    def check(cls, options: Options, model: ModelRecipe) -> None:
        cls.check_counts(options)
        if options.scale < 0:
            raise RecipeError(f"mixer.softmax_attention.scale = {options.scale}: must not be negative")
        heads, kv_heads, width = _heads(options, model)
        if heads % kv_heads:
            raise RecipeError(f"mixer.softmax_attention.kv_heads = {kv_heads}: must divide the {heads} query heads")
        if not options.rope:
            if options.rotary_dim:
                raise RecipeError(
                    f"mixer.softmax_attention.rotary_dim = {options.rotary_dim}: nothing is rotated with "
                    "mixer.softmax_attention.rope = false; set it to 0"
                )
        elif options.rotary_dim % 2 or options.rotary_dim > width:
            raise RecipeError(
                f"mixer.softmax_attention.rotary_dim = {options.rotary_dim}: must be even and at most {width}, a "
                "head's width; 0 for all of it"
            )
        elif width % 2 and not options.rotary_dim:
            field = "mixer.softmax_attention.head_dim" if options.head_dim else "model.head_dim"
            raise RecipeError(
                f"{field} = {width}: rotary positions need an even head width; set mixer.softmax_attention.rotary_dim"
            )

    @classmethod
    def head_groups(cls, options: Options, model: ModelRecipe) -> tuple[str, int]:
        return "kv_heads", _heads(options, model)[1]

    def state_spec(self) -> dict[str, StateSpec]:
        """One entry a token; with a window a ring of its size, which only this mixer knows how to read."""
        shape = (self.kv_heads, self.head_dim)
        entry = StateSpec(shape, Carry.APPEND, fp32=False)
        if self.window:
            entry = StateSpec((self.window, *shape), Carry.LAST_TOKENS, fp32=False)
        return {"keys": entry, "values": entry, **self.convs.state_spec()}

    def tensor_parallel(self) -> dict[str, Placement]:
        placements = {f"{name}.weight": Shard(0) for name in ("q_proj", "k_proj", "v_proj")}
        if self.q_proj.bias is not None:
            placements |= {f"{name}.bias": Shard(0) for name in ("q_proj", "k_proj", "v_proj")}
        if self.q_norm is not None:
            placements |= dict.fromkeys(
                ("q_norm.weight", "k_norm.weight"), Replicate() if self.norm_per_head else Shard(0)
            )
        if self.g_proj is not None:
            placements["g_proj.weight"] = Shard(0)
        placements |= self.convs.tensor_parallel("convs")
        return placements | {"o_proj.weight": Shard(1)}

    def kernel_calls(self, device: str, dtype: torch.dtype) -> Iterator[KernelCall]:
        """Attention over packed documents."""
        yield attention.OPERATOR, self.backend, attention.call(self.window, self.head_dim, device, dtype)

    def mixing_flops(self, length: int) -> float:
        """Scores and values, 4 H d a token seen: (length + 1) / 2 of them, fewer with a window."""
        width = self.head_dim
        return attention.budget([length], self.heads, self.kv_heads, width, width, self.window).flops / length

    def project(self, x_TD: Tensor) -> dict[str, Tensor]:
        """Raw queries q [T, H d], keys k and values v [T, G d], and the gate [T, H d] where there is one."""
        parts = {"q": self.q_proj(x_TD), "k": self.k_proj(x_TD), "v": self.v_proj(x_TD)}
        return parts if self.g_proj is None else {**parts, "gate": self.g_proj(x_TD)}

    def rotate_heads(
        self, q: Tensor, k: Tensor, v: Tensor, cosines: Tensor, sines: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [T, H, d], keys and values [T, G, d]; queries and keys normed and rotated."""
        norms = self.q_norm, self.k_norm
        if not self.norm_per_head:
            q, k = (x if norm is None else norm(x) for x, norm in zip((q, k), norms, strict=True))
        q, k, v = (x.unflatten(-1, (-1, self.head_dim)) for x in (q, k, v))
        if self.norm_per_head:
            q, k = (x if norm is None else norm(x) for x, norm in zip((q, k), norms, strict=True))
        if not self.rotary_dim:
            return q, k, v
        return rotate_first(q, cosines, sines), rotate_first(k, cosines, sines), v

    def output(self, o: Tensor, gate: Tensor | None = None) -> Tensor:
        """[T, H, d], and the gate's logits [T, H d] -> [T, D]."""
        o = o.flatten(-2)
        return self.o_proj(o if gate is None else o * gate.sigmoid())

    def run(self, x_TD: Tensor, context: Context, past: Past) -> tuple[Tensor, After]:
        parts, after = self.convs(self.project(x_TD), past)
        tables = context.rotary(self.rotary_dim, self.theta, x_TD.dtype, self.scaling)
        gate = parts.get("gate")
        q, k, v = self.rotate_heads(parts["q"], parts["k"], parts["v"], *tables)
        if not isinstance(past, Resumed):
            o = attend(q, k, v, context.documents, scale=self.scale, backend=self.backend, window=self.window)
            return self.output(o, gate), after
        attend_state = self._attend_ring if self.window else self._attend_cache
        o, kept = attend_state(q, k, v, context, past.state)
        return self.output(o, gate), {**kept, **after}

    def _attend_cache(self, q: Tensor, k: Tensor, v: Tensor, context: Context, state: State) -> tuple[Tensor, State]:
        """Write the new keys and values into the cache (in place) and attend over it."""
        keys, values = append_to_cache(state, context, keys=k, values=v)
        rows, positions = padded_queries(q, context)
        out = cached_attention(rows, keys, values, positions, self.scale)
        kept = {name: state[name] for name in ("keys", "values")}
        return out[context.documents.ids.long(), context.documents.positions], kept

    def _attend_ring(self, q: Tensor, k: Tensor, v: Tensor, context: Context, state: State) -> tuple[Tensor, State]:
        """Attend over the ring and the new tokens; the ring then holds each sequence's last W tokens."""
        documents, slots = context.documents, torch.arange(self.window, device=q.device)
        if context.stepping:
            # The token that left the window gives its slot to the new one, in place.
            last_B = context.positions
            rows = torch.arange(last_B.shape[0], device=q.device)
            for name, new in (("keys", k), ("values", v)):
                state[name][rows, last_B % self.window] = new.to(state[name].dtype)
            held = min(context.history, self.window)
            keys, values = (state[name][:, :held].to(q.dtype) for name in ("keys", "values"))
            held_BW = _positions_in_slots(last_B, slots[:held], self.window)
            o = cached_attention(q[:, None], keys, values, last_B[:, None], self.scale, key_positions=held_BW)
            return o[:, 0], {name: state[name] for name in ("keys", "values")}
        ids, places = documents.ids.long(), documents.positions
        batch, longest = len(documents.lengths), max(documents.lengths)
        seen_B1 = context.positions[documents.cu_seqlens[:-1].long()].unsqueeze(1)
        last_B1 = seen_B1 + documents.cu_seqlens.diff().unsqueeze(1) - 1
        new_BL = seen_B1 + torch.arange(longest, device=q.device)
        held_BW = _positions_in_slots(seen_B1[:, 0] - 1, slots, self.window)
        key_positions = torch.cat([held_BW, torch.where(new_BL <= last_B1, new_BL, -1)], 1)
        rows, buffers = q.new_zeros(batch, longest, *q.shape[1:]), {}
        rows[ids, places] = q
        for name, new in (("keys", k), ("values", v)):
            padded = new.new_zeros(batch, longest, *new.shape[1:])
            padded[ids, places] = new
            buffers[name] = torch.cat([state[name].to(q.dtype), padded], 1)
        # A row's padding asks in the place of its last token, so that no query is without a key.
        queries = torch.minimum(new_BL, last_B1)
        o = cached_attention(
            rows,
            buffers["keys"],
            buffers["values"],
            queries,
            self.scale,
            key_positions=key_positions,
            window=self.window,
        )
        kept_BW = _positions_in_slots(last_B1[:, 0], slots, self.window)
        source_BW = torch.where(kept_BW >= seen_B1, self.window + kept_BW - seen_B1, slots)
        index = source_BW[:, :, None, None].expand(-1, -1, *k.shape[1:])
        after = {name: buffer.gather(1, index).to(state[name].dtype) for name, buffer in buffers.items()}
        return o[ids, places], after


def _positions_in_slots(last_B: Tensor, slots_W: Tensor, window: int) -> Tensor:
    """int64 [B, W]: the newest position up to `last_B` that lies in each slot of a ring; negative for an empty slot."""
    return last_B[:, None] - (last_B[:, None] - slots_W) % window
