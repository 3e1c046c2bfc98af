"""Parameters and FLOPs of a model by kind of layer. Shapes are asked of the model, sharded or not: all are global."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from torchlinearmoe.mixers.base import Mixer
from torchlinearmoe.models.decoder import Decoder
from torchlinearmoe.models.flops import active_parameters


@dataclass(frozen=True)
class LayerKind:
    """Layers that have the same mixer and feed-forward."""

    mixer: str
    layers: int
    mixer_parameters: int
    """Of one layer's mixer, all memories."""
    mixer_active: int
    """Of these, what one token meets."""
    ffn_parameters: int
    """Of one layer's feed-forward, all experts."""
    ffn_active: int
    """Of these, what one token meets."""
    norm_parameters: int
    """Of one layer's two norms."""

    @property
    def passive(self) -> int:
        """Of one layer, what one token does not meet."""
        return self.mixer_parameters - self.mixer_active + self.ffn_parameters - self.ffn_active


@dataclass(frozen=True)
class Parameters:
    """Parameters of a model; `total` is the sum of the parts below it."""

    total: int
    active: int
    """What one token meets: all but the experts and memories it is not sent to. Embedding and head count whole."""
    embedding: int
    head: int
    """0 where the head is the embedding."""
    shared: int
    """Read by all layers of a mixer, such as HGRN2's lower bounds."""
    final_norm: int
    kinds: list[LayerKind]


def count_parameters(model: Decoder) -> Parameters:
    """Every parameter of `model` once, by place."""
    kinds: dict[tuple[str, int, int, int, int, int], int] = {}
    for layer in model.layers.values():
        mixer, ffn = _parts(layer)
        norms = _size(layer) - _size(mixer) - _size(ffn)
        kind = (mixer.name, _size(mixer), mixer.active_parameters(), _size(ffn), active_parameters(ffn), norms)
        kinds[kind] = kinds.get(kind, 0) + 1
    listed = [LayerKind(name, layers, *sizes) for (name, *sizes), layers in kinds.items()]
    total = _size(model)
    return Parameters(
        total=total,
        active=total - sum(kind.layers * kind.passive for kind in listed),
        embedding=_size(model.embed),
        head=_size(model.head),
        shared=_size(model.shared),
        final_norm=_size(model.norm),
        kinds=listed,
    )


@dataclass(frozen=True)
class FlopTerm:
    """One summand of a token's forward FLOPs."""

    name: str
    formula: str
    flops: float


def forward_flop_terms(model: Decoder, length: int) -> list[FlopTerm]:
    """The summands of `models.flops.forward_flops_per_token`: FLOPs of one token in documents of `length` tokens."""
    mixing: dict[str, tuple[int, float, float]] = {}
    feed_forward, with_one = 0.0, 0
    for layer in model.layers.values():
        mixer, ffn = _parts(layer)
        layers, projections, between = mixing.get(mixer.name, (0, 0.0, 0.0))
        core = mixer.mixing_flops(length)
        mixing[mixer.name] = (layers + 1, projections + mixer.flops_per_token(length) - core, between + core)
        feed_forward += 2.0 * active_parameters(ffn)
        with_one += _size(ffn) > 0
    recipe = model.recipe
    terms = [FlopTerm("head", "2 D V", 2.0 * recipe.hidden_size * recipe.vocab_size)]
    for name, (layers, projections, between) in mixing.items():
        terms.append(FlopTerm(f"{name} projections", f"2 a weight, {layers} layers", projections))
        terms.append(FlopTerm(f"{name} mixing", f"between tokens at {length} a document, {layers} layers", between))
    terms.append(FlopTerm("feed-forward", f"2 an active weight, {with_one} layers", feed_forward))
    return terms


def _parts(layer: nn.Module) -> tuple[Mixer, nn.Module]:
    mixer, ffn = layer.mixer, layer.ffn
    assert isinstance(mixer, Mixer) and isinstance(ffn, nn.Module)
    return mixer, ffn


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
