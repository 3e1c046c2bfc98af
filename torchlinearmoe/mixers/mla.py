"""Multi-head latent attention (DeepSeek-AI 2024, DeepSeek-V2, arXiv 2405.04434, section 2.1).

The `N` layers of DeepSeek-V2. Keys and values of all heads are read from one latent vector a token, and only that and
one rotated key for all heads are kept:

    c = norm(x Wc)                 k_r = rotate(x Wr)             the state: c and k_r, 512 + 64 numbers a token
    q_h = [q_n, rotate(q_r)]       k_h = [c Wk_h, k_r]            v_h = c Wv_h
    o_h = softmax(f (n + r)^(-1/2) q_h k_h^T) v_h [* sigmoid(x g_h)]    f: YaRN's factor of the scores, 1 without

A step does not make keys and values again: q_n k_n = (q_n Wk_h^T) c, so queries are taken to the latent, attend there
as one head with the key [c, k_r] and the value c, and Wv_h follows (appendix C).

Published weights come in unpermuted: the rotated channels are interleaved, pairs (2i, 2i + 1), as they are there. Names
in Hugging Face's `DeepseekV2Attention`: `q_proj` (without query compression) or `q_a_proj`, `q_a_layernorm` (here
`q_a_norm`), `q_b_proj`; `kv_a_proj_with_mqa` (`kv_a_proj`), `kv_a_layernorm` (`kv_a_norm`), `kv_b_proj`, `o_proj`;
rows of `kv_a_proj` are [c, k_r], of a head in `q_proj` or `q_b_proj` [q_n, q_r], of a head in `kv_b_proj` [k_n, v].

Shapes: T tokens, D width, H heads, Q query latent, C key-value latent, n and r unrotated and rotated channels of a
query or key, v of a value, B sequences.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.distributed.tensor import Placement, Replicate, Shard

from torchlinearmoe.documents import Documents
from torchlinearmoe.errors import RecipeError
from torchlinearmoe.initialize import linear
from torchlinearmoe.kernels import attention
from torchlinearmoe.kernels.cached_attention import cached_attention
from torchlinearmoe.kernels.choose import KernelCall
from torchlinearmoe.layers.norm import RMSNorm
from torchlinearmoe.layers.past import After, Past, Resumed
from torchlinearmoe.layers.rope import rotate_interleaved
from torchlinearmoe.mixers.attention import append_to_cache, attend, attend_to_history, padded_queries, with_history
from torchlinearmoe.mixers.base import (
    Carry,
    Context,
    LayerPlace,
    Mixer,
    MixerOptions,
    StateSpec,
    register,
    rope_scaling,
)
from torchlinearmoe.recipe.schema import ModelRecipe

LATENT_EPS = 1e-6
"""Of the norms on the latents, whatever the model's own, as in the published code."""


@dataclass(frozen=True, kw_only=True)
class Options(MixerOptions):
    """`[mixer.mla]`; defaults as in DeepSeek-V2-Lite, `heads = 0` takes the family's."""

    head_dim: int = 128
    """Unrotated channels of a head's queries and keys (qk_nope_head_dim)."""
    qk_rope_head_dim: int = 64
    """Rotated channels of a head's queries; those of the key are shared by all heads."""
    v_head_dim: int = 128
    """Width of a head's values."""
    kv_lora_rank: int = 512
    """Width of the latent that keys and values are made of."""
    q_lora_rank: int = 0
    """Width of the latent that queries are made of; 0 makes them of the input itself."""
    rope: bool = True
    """Rotate the channels that are for it; without, they are compared as they are (Kimi Linear, arXiv 2510.26692)."""
    output_gate: Literal["none", "head"] = "none"
    """Multiply what each head reads by a sigmoid gate of the token, one a head (Ling 3.0)."""


@register("mla", listed=False)
class MLA(Mixer[Options]):
    """Softmax attention over keys and values that share one latent a token."""

    projections = {"q": "q_proj", "o": "o_proj"}
    keeps_past = True
    Options = Options
    variants = (
        {"head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 12, "kv_lora_rank": 24},
        {"heads": 3, "head_dim": 10, "qk_rope_head_dim": 6, "v_head_dim": 16, "kv_lora_rank": 20, "q_lora_rank": 14},
        {"head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 12, "kv_lora_rank": 24, "rope": False},
        {"head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 12, "kv_lora_rank": 24, "output_gate": "head"},
    )
    float8 = ("q_proj", "q_a_proj", "q_b_proj", "kv_a_proj", "kv_b_proj", "o_proj")
    regions = ("project", "expand", "output")

    def __init__(self, options: Options, model: ModelRecipe, place: LayerPlace) -> None:
        super().__init__(options, model, place)
        self.heads = options.heads or model.num_heads
        self.key_dim, self.rope_dim, self.value_dim = options.head_dim, options.qk_rope_head_dim, options.v_head_dim
        self.latent_dim, self.rotated = options.kv_lora_rank, options.rope
        self.theta, self.scaling = model.rope_theta, rope_scaling(model)
        factor = 1.0 if self.scaling is None else self.scaling.score_factor
        self.scale = factor * (self.key_dim + self.rope_dim) ** -0.5
        self.backend = model.attention_backend
        width, std, query_latent = model.hidden_size, model.init_std, options.q_lora_rank
        queries = self.heads * (self.key_dim + self.rope_dim)
        if query_latent:
            self.q_a_proj = linear(width, query_latent, std)
            self.q_a_norm = RMSNorm(query_latent, LATENT_EPS)
            self.q_b_proj = linear(query_latent, queries, std)
        else:
            self.q_proj = linear(width, queries, std)
        self.compressed = query_latent > 0
        self.kv_a_proj = linear(width, self.latent_dim + self.rope_dim, std)
        self.kv_a_norm = RMSNorm(self.latent_dim, LATENT_EPS)
        self.kv_b_proj = linear(self.latent_dim, self.heads * (self.key_dim + self.value_dim), std)
        self.g_proj = linear(width, self.heads, std) if options.output_gate == "head" else None
        self.o_proj = linear(self.heads * self.value_dim, width, std / (2 * model.num_layers) ** 0.5)

    @classmethod
    def check(cls, options: Options, model: ModelRecipe) -> None:
        cls.check_counts(options)
        for name in ("head_dim", "v_head_dim", "kv_lora_rank"):
            if not getattr(options, name):
                raise RecipeError(f"mixer.mla.{name} = 0: must be at least 1")
        if options.qk_rope_head_dim % 2 or not options.qk_rope_head_dim:
            raise RecipeError(f"mixer.mla.qk_rope_head_dim = {options.qk_rope_head_dim}: must be even and not 0")

    @classmethod
    def head_groups(cls, options: Options, model: ModelRecipe) -> tuple[str, int]:
        return "heads", options.heads or model.num_heads

    def state_spec(self) -> dict[str, StateSpec]:
        """The normed latent and the rotated key, one entry a token."""
        return {
            "latent": StateSpec((self.latent_dim,), Carry.APPEND, fp32=False),
            "rope_key": StateSpec((self.rope_dim,), Carry.APPEND, fp32=False),
        }

    def tensor_parallel(self) -> dict[str, Placement]:
        """Latents are replicated; what is made of them is split by heads."""
        if self.compressed:
            placements: dict[str, Placement] = {"q_a_proj.weight": Replicate(), "q_a_norm.weight": Replicate()}
            placements["q_b_proj.weight"] = Shard(0)
        else:
            placements = {"q_proj.weight": Shard(0)}
        placements |= {f"{name}.weight": Replicate() for name in ("kv_a_proj", "kv_a_norm")}
        if self.g_proj is not None:
            placements["g_proj.weight"] = Shard(0)
        return placements | {"kv_b_proj.weight": Shard(0), "o_proj.weight": Shard(1)}

    def kernel_calls(self, device: str, dtype: torch.dtype) -> Iterator[KernelCall]:
        """Attention over packed documents."""
        yield attention.OPERATOR, self.backend, attention.call(0, self.key_dim + self.rope_dim, device, dtype)

    def mixing_flops(self, length: int) -> float:
        """Scores and values, 2 H (n + r + v) a token seen, (length + 1) / 2 of them."""
        width = self.key_dim + self.rope_dim
        return attention.budget([length], self.heads, self.heads, width, self.value_dim).flops / length

    def project(self, x_TD: Tensor, cosines: Tensor, sines: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [T, H, n + r], the latent [T, C] and the shared key [T, r]."""
        q = self.q_b_proj(self.q_a_norm(self.q_a_proj(x_TD))) if self.compressed else self.q_proj(x_TD)
        q = q.unflatten(-1, (-1, self.key_dim + self.rope_dim))
        latent, k_r = self.kv_a_proj(x_TD).split((self.latent_dim, self.rope_dim), -1)
        if not self.rotated:
            return q, self.kv_a_norm(latent), k_r
        q_n, q_r = q.split((self.key_dim, self.rope_dim), -1)
        q = torch.cat([q_n, rotate_interleaved(q_r, cosines, sines)], -1)
        return q, self.kv_a_norm(latent), rotate_interleaved(k_r[:, None], cosines, sines)[:, 0]

    def expand(self, latent: Tensor, k_r: Tensor) -> tuple[Tensor, Tensor]:
        """Keys [..., H, n + r] and values [..., H, v] of latents [..., C] and shared keys [..., r]."""
        k_n, v = (
            self.kv_b_proj(latent)
            .unflatten(-1, (-1, self.key_dim + self.value_dim))
            .split((self.key_dim, self.value_dim), -1)
        )
        k_r = k_r.unsqueeze(-2).expand(*k_n.shape[:-1], self.rope_dim)
        return torch.cat([k_n, k_r], -1), v

    def output(self, o: Tensor, x_TD: Tensor) -> Tensor:
        """[T, H, v], and the layer's input that a gate is made of -> [T, D]."""
        if self.g_proj is not None:
            o = o * self.g_proj(x_TD).sigmoid().unsqueeze(-1)
        return self.o_proj(o.flatten(-2))

    def run(self, x_TD: Tensor, context: Context, past: Past) -> tuple[Tensor, After]:
        tables = context.rotary(self.rope_dim, self.theta, x_TD.dtype, self.scaling)
        q, latent, k_r = self.project(x_TD, *tables)
        if not isinstance(past, Resumed):
            return self.output(self._attend_packed(q, latent, k_r, context.documents), x_TD), {}
        latents, keys = append_to_cache(past.state, context, latent=latent, rope_key=k_r)
        attend_cache = self._attend_latents if context.stepping else self._attend_expanded
        return self.output(attend_cache(q, latents, keys, context), x_TD), {**past.state}

    def _attend_packed(self, q: Tensor, latent: Tensor, k_r: Tensor, documents: Documents) -> Tensor:
        """Documents that start empty. Context-parallel ranks gather latents, unless heads are asked for."""
        spans = documents.spans
        if spans is None or spans.exchange.attention == "heads":
            return attend(q, *self.expand(latent, k_r), documents, scale=self.scale, backend=self.backend)
        both = with_history(torch.cat([latent, k_r], -1), spans)
        k, v = self.expand(*both.split((self.latent_dim, self.rope_dim), -1))
        return attend_to_history(q, k, v, documents, scale=self.scale, backend=self.backend)

    def _attend_expanded(self, q: Tensor, latents: Tensor, keys: Tensor, context: Context) -> Tensor:
        """Several tokens a sequence over keys and values made of the cache."""
        k, v = self.expand(latents, keys)
        rows, positions = padded_queries(q, context)
        out = cached_attention(rows, k, v, positions, self.scale)
        return out[context.documents.ids.long(), context.documents.positions]

    def _attend_latents(self, q_BHd: Tensor, latents: Tensor, keys: Tensor, context: Context) -> Tensor:
        """One token a sequence over the cache itself, whose single head all query heads read as if they were tokens."""
        k_weight, v_weight = self.kv_b_proj.weight.unflatten(0, (-1, self.key_dim + self.value_dim)).split(
            (self.key_dim, self.value_dim), 1
        )
        q_n, q_r = q_BHd.split((self.key_dim, self.rope_dim), -1)
        queries = torch.cat([torch.einsum("bhn,hnc->bhc", q_n, k_weight), q_r], -1)[:, :, None]
        positions = context.positions[:, None].expand(-1, queries.shape[1])
        cached = torch.cat([latents, keys], -1)[:, :, None]
        o_BHC = cached_attention(queries, cached, latents[:, :, None], positions, self.scale)[:, :, 0]
        return torch.einsum("bhc,hvc->bhv", o_BHC, v_weight)
