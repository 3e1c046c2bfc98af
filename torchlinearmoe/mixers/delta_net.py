"""DeltaNet: linear attention that overwrites what it holds under a key (Yang et al. 2024, arXiv 2406.06484).

    S_t = S_{t-1} + b_t k_t (v_t - S_{t-1}^T k_t)^T,      o_t = S_t^T q_t / sqrt(K)
    b_t = sigmoid(W_b x_t)  [times 2],      y_t = W_o RMSNorm(o_t)  [* swish(W_g x_t)]

Nothing is forgotten but what is overwritten; the rest is in `delta_mixer.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch.distributed.tensor import Placement, Shard

from torchlinearmoe.errors import RecipeError
from torchlinearmoe.initialize import linear
from torchlinearmoe.mixers.base import LayerPlace, expanded, geometry, register
from torchlinearmoe.mixers.delta_mixer import DeltaMixer, DeltaOptions
from torchlinearmoe.recipe.schema import ModelRecipe


@dataclass(frozen=True, kw_only=True)
class Options(DeltaOptions):
    """`[mixer.delta_net]`."""

    expand_k: float = 1.0
    """Width of a key head as a multiple of a head's width."""
    gate: bool = False
    """Multiply the output by swish of a projection."""


@register("delta_net")
class DeltaNet(DeltaMixer[Options]):
    """No decay; per-head norm, gate by choice."""

    Options = Options
    gate_kind = "plain"
    variants = (
        {"conv": 0, "gate": True, "negative_eigenvalues": True},
        {"expand_k": 0.5, "expand_v": 1.5, "conv": 3},
        {"heads": 2, "head_dim": 16, "value_heads": 4},
        {"gate": True, "output_norm": "none", "gate_activation": "sigmoid"},
    )

    def __init__(self, options: Options, model: ModelRecipe, place: LayerPlace) -> None:
        super().__init__(options, model, place)
        self.gated = options.gate
        self.decay = None
        if self.gated:
            self.g_proj = linear(model.hidden_size, self.value_heads * self.value_dim, model.init_std)
        else:
            self.reads = {"q": ("q_proj",)}
        self.norm = (options.gated_norm if self.gated else options.norm)(self.value_dim, model)

    @classmethod
    def dims(cls, options: Options, model: ModelRecipe) -> tuple[int, int, int, int]:
        heads, _, value_heads, value_dim = super().dims(options, model)
        return heads, expanded(geometry(options, model)[1], options.expand_k), value_heads, value_dim

    @classmethod
    def check(cls, options: Options, model: ModelRecipe) -> None:
        super().check(options, model)
        if options.gate_activation != Options.gate_activation and not options.gate:
            raise RecipeError(
                f"mixer.delta_net.gate_activation = '{options.gate_activation}': there is no gate; set "
                "mixer.delta_net.gate = true"
            )
        cls.check_expansion("expand_k", geometry(options, model)[1], options.expand_k)

    def tensor_parallel(self) -> dict[str, Placement]:
        return super().tensor_parallel() | ({"g_proj.weight": Shard(0)} if self.gated else {})
