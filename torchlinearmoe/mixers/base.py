"""The contract every token mixer keeps.

A mixer turns the hidden states of packed documents into new ones. Over any span of tokens a linear mixer is
S_out = A S_in + B; its file declares what the trainer, the decoder and the parallel layouts need to know: the named
state and how each part carries over (`state_spec`), parameters shared by all its layers (`shared_module`), tensors that
travel with the hidden state (`carried_channels`), how its parameters split over tensor-parallel ranks
(`tensor_parallel`), and its FLOPs. A new mixer is one file here, and its definition in the tests
(`tests/torchlinearmoe/mixers/definitions/`), which says whether its formula is the paper's.

Shapes: T tokens (packed, all documents of a micro-batch in one stream), D model width, H heads, K and V key and value
width of a head, N documents.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from types import MethodType
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor
from torch.distributed.tensor import Placement

from torchlinearmoe.documents import Documents
from torchlinearmoe.errors import RecipeError
from torchlinearmoe.kernels.choose import KernelCall
from torchlinearmoe.layers.past import After, Carry, Empty, Past, Resumed, Spanned, State, StateSpec, complete
from torchlinearmoe.layers.rope import RopeScaling, frequencies
from torchlinearmoe.module import Module
from torchlinearmoe.moe.totals import StepTotals
from torchlinearmoe.precision import wide_type
from torchlinearmoe.recipe.schema import ModelRecipe
from torchlinearmoe.registry import Registry

Carried = dict[str, Tensor]
"""Tensors that travel with the hidden state from layer to layer, [T, ...] each."""


@dataclass(frozen=True)
class Context:
    """What a forward of packed documents knows besides the hidden states."""

    documents: Documents
    positions: Tensor
    """int64 [T], position of each token in its document, counted from the document's very first token."""
    shared: Mapping[str, Tensor] = field(default_factory=dict)
    """Outputs of the shared modules, by mixer name."""
    totals: StepTotals | None = None
    """Of the optimizer step while training, else None."""
    stepping: bool = False
    """Every document is one token: decoding."""
    history: int = 0
    """While decoding, the longest context in tokens, the new tokens included."""
    tables: dict[tuple[int, float, torch.dtype, RopeScaling | None], tuple[Tensor, Tensor]] = field(
        default_factory=dict
    )
    """Rotary tables computed so far in this forward."""

    def past(self, state: State | None) -> Past:
        """What a layer's tokens find before them, `state` being the one that it is called with."""
        documents = self.documents
        if state is not None:
            return Resumed(documents.segments, state)
        if documents.spans is not None:
            return Spanned(documents.segments, documents.spans)
        return Empty(documents.bounded)

    def rotary(
        self, dim: int, theta: float, dtype: torch.dtype, scaling: RopeScaling | None = None
    ) -> tuple[Tensor, Tensor]:
        """Cosines and sines of the rotary angles for inputs of `dtype`, [T, dim / 2] each; computed once a forward.

        float64 for float64, else float32. With a scaling they carry its amplitude.
        """
        kind = wide_type(dtype)
        key = (dim, theta, kind, scaling)
        if key not in self.tables:
            device = self.positions.device
            speeds = frequencies(dim, theta, device) if scaling is None else scaling.frequencies(dim, theta, device)
            angles = self.positions.double()[:, None] * speeds
            amplitude = 1.0 if scaling is None else scaling.amplitude
            self.tables[key] = ((amplitude * angles.cos()).to(kind), (amplitude * angles.sin()).to(kind))
        return self.tables[key]


def rope_scaling(model: ModelRecipe) -> RopeScaling | None:
    """The scaling of the softmax layers' rotary frequencies; None for none."""
    if model.rope_scaling == "none":
        return None
    return RopeScaling(
        kind=model.rope_scaling,
        factor=model.rope_factor,
        original_length=model.rope_original_length,
        beta_slow=model.rope_beta_slow,
        beta_fast=model.rope_beta_fast,
        mscale=model.rope_mscale,
        mscale_all_dim=model.rope_mscale_all_dim,
    )


@dataclass(frozen=True)
class LayerPlace:
    """Where a layer stands in the model."""

    layer: int
    """Index among all layers."""
    ordinal: int
    """Index among the layers of the same mixer."""
    count: int
    """Layers of the same mixer."""


@dataclass(frozen=True, kw_only=True)
class MixerOptions:
    """Options common to mixers with heads; 0 takes the default geometry."""

    heads: int = 0
    """Query heads."""
    head_dim: int = 0
    """Width of a head."""


def geometry(options: MixerOptions, model: ModelRecipe) -> tuple[int, int]:
    """(heads, head width) of a linear mixer.

    The default is the family's heads when their width is a multiple of 16 up to 256, else D / 128 heads of 128, or
    D / 64 heads of 64 where 128 does not divide D.
    """
    width = model.hidden_size
    if options.heads and options.head_dim:
        return options.heads, options.head_dim
    if options.heads:
        return options.heads, width // options.heads
    if options.head_dim:
        return width // options.head_dim, options.head_dim
    natural = width // model.num_heads
    if width % model.num_heads == 0 and natural % 16 == 0 and 16 <= natural <= 256:
        return model.num_heads, natural
    head = 64 if width % 128 == 64 else 128
    return width // head, head


def expanded(width: int, factor: float) -> int:
    """A head's width times an `expand_*` option that passed `Mixer.check_expansion`."""
    return round(width * factor)


class SharedModule(Module):
    """Parameters that all layers of a mixer read, through what `forward()` returns."""

    def tensor_parallel(self) -> dict[str, Placement]:
        """As `Mixer.tensor_parallel`."""
        raise NotImplementedError


O = TypeVar("O", bound=MixerOptions)


class Mixer(Module, Generic[O]):
    """A token mixer; see the module's docstring for the contract."""

    name: ClassVar[str]
    keeps_past: ClassVar[bool] = False
    """What a token looks back at are the tokens before, an entry each, not a state that they were folded into."""
    Options: ClassVar[type[MixerOptions]] = MixerOptions
    projections: ClassVar[Mapping[str, str]] = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "o_proj"}
    """The linear layers that play the parts of attention's query, key, value and output, where there are such: a layer
    started from another mixer's weights takes them part by part."""
    variants: ClassVar[tuple[dict[str, Any], ...]] = ()
    """Option overrides, beside the defaults, that change what is computed: every test of the contract runs on each.

    They must be legal for a model of width 64 with two heads; one that changes the head count names `heads` and
    `head_dim` itself.
    """

    heads: int = 0
    """Query heads of the layer, on all tensor-parallel ranks together; 0 for a mixer that leaves them to another."""
    first_head: int = 0
    """Index, among all heads of the layer, of the first one in this module; above zero on a tensor-parallel rank."""
    write_rows: int = 1
    """How often a token is written: more than once in a mixture of memories."""

    def __init__(self, options: O, model: ModelRecipe, place: LayerPlace) -> None:
        """A layer of a model, standing at `place`; the weights are not filled."""
        super().__init__()

    @classmethod
    def check_counts(cls, options: O) -> None:
        """Raise RecipeError for a negative whole number: they are all counts, widths or ranks."""
        for entry in fields(options):
            value = getattr(options, entry.name)
            if isinstance(value, int) and value < 0:
                raise RecipeError(f"mixer.{cls.name}.{entry.name} = {value}: must not be negative")

    @classmethod
    def check_expansion(cls, key: str, width: int, factor: float) -> None:
        """Raise RecipeError unless `factor`, the option `key`, times `width` is a whole number of channels."""
        product = width * factor
        if not 1 <= product < 2**31 or abs(product - round(product)) > 1e-6:
            raise RecipeError(f"mixer.{cls.name}.{key} = {factor}: must make whole channels of a head of {width}")

    @classmethod
    def check(cls, options: O, model: ModelRecipe) -> None:
        """Raise RecipeError for a geometry that cannot be built."""
        cls.check_counts(options)
        heads, width = geometry(options, model)
        if heads < 1 or width < 1 or (not (options.heads and options.head_dim) and heads * width != model.hidden_size):
            raise RecipeError(
                f"mixer.{cls.name}.heads: {heads} heads of {width} do not make model.hidden_size = "
                f"{model.hidden_size}; give mixer.{cls.name}.heads and mixer.{cls.name}.head_dim"
            )

    @classmethod
    def sections(cls, options: O) -> tuple[str, ...]:
        """The `[mixer.NAME]` sections that a layer reads."""
        return (cls.name,)

    @classmethod
    def carried_channels(cls, options: O, model: ModelRecipe) -> dict[str, int]:
        """Channels of each carried tensor, [T, channels], by name: set by the first layer of this mixer, read by all.

        Channels belong to heads and are split with them.
        """
        return {}

    @classmethod
    def shared_module(cls, options: O, model: ModelRecipe, count: int) -> SharedModule | None:
        """The module whose output all `count` layers of this mixer read; built once a model."""
        return None

    @classmethod
    def head_groups(cls, options: O, model: ModelRecipe) -> tuple[str, int]:
        """(name, count) of what tensor-parallel ranks share out evenly: heads, or groups of heads that belong together.

        Every count of heads is a multiple of it.
        """
        return "heads", geometry(options, model)[0]

    def state_spec(self) -> dict[str, StateSpec]:
        """The parts of this layer's state by name."""
        raise NotImplementedError

    def tensor_parallel(self) -> dict[str, Placement]:
        """How each parameter of this layer lies over tensor-parallel ranks, by its name in the module.

        `Shard(0)` splits outputs or what there is of each head, heads staying whole; `Shard(1)` splits inputs, the
        ranks' outputs are partial sums then; `Replicate()` is whole on every rank and meets that rank's heads alone,
        so that its gradients are partial sums too.
        """
        raise NotImplementedError

    def kernel_calls(self, device: str, dtype: torch.dtype) -> Iterable[KernelCall]:
        """The calls of this layer whose backend the recipe may name, on a device of that type, computing in `dtype`."""
        return ()

    def mixing_flops(self, length: int) -> float:
        """Forward FLOPs a token outside the projections, at `length` tokens a document."""
        raise NotImplementedError

    def forward(
        self, x_TD: Tensor, context: Context, state: State | None = None, carried: Carried | None = None
    ) -> tuple[Tensor, State | None, Carried]:
        """Mix packed documents, [T, D] -> [T, D].

        With `state` (one entry a document) every document goes on from its entry and the states after its last token
        come back; without, documents start empty and None comes back. Carried tensors pass through.
        """
        y_TD, after = self.run(x_TD, context, context.past(state))
        return y_TD, None if state is None else complete(after), carried or {}

    def run(self, x_TD: Tensor, context: Context, past: Past) -> tuple[Tensor, After]:
        """`forward` of a mixer without carried tensors: the output, and the parts of the state by name."""
        raise NotImplementedError

    def region(self, name: str, past: Past) -> Callable[..., Any]:
        """The method `name`, in its compiled form unless documents go on from a state."""
        return MethodType(getattr(type(self), name), self) if isinstance(past, Resumed) else getattr(self, name)

    def init_state(self, batch: int, max_length: int, device: torch.device, dtype: torch.dtype) -> State:
        """Empty state of `batch` sequences; only APPEND parts depend on `max_length`."""
        state = {}
        for name, spec in self.state_spec().items():
            shape = (batch, max_length, *spec.shape) if spec.carry is Carry.APPEND else (batch, *spec.shape)
            kind = wide_type(dtype) if spec.fp32 else dtype
            state[name] = torch.zeros(shape, device=device, dtype=kind)
        return state

    def active_parameters(self) -> int:
        """Parameters that one token meets."""
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self, length: int) -> float:
        """Forward FLOPs a token: two a weight of every matrix, plus the mixing."""
        matrices = sum(p.numel() for p in self.parameters() if p.dim() == 2)
        return 2.0 * matrices + self.mixing_flops(length)


M = TypeVar("M", bound="Mixer[Any]")
MIXERS: Registry[type[Mixer[Any]]] = Registry("mixer")


def register(name: str, *aliases: str, listed: bool = True):
    """Class decorator: put a mixer into MIXERS under `name`; a family's own attention is not listed."""

    def decorate(cls: type[M]) -> type[M]:
        cls.name = name
        MIXERS.add(name, cls, aliases, listed)
        return cls

    return decorate
