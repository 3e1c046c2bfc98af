"""Mixture of memories: a router gives each token a few of several memories, and the others keep what they know
(Du et al. 2025, arXiv 2502.13685).

    w_t = softmax of the k largest of W_r x_t, in float32
    S^m_t = A^m_t S^m_{t-1} + B^m_t  for the k chosen memories m and the shared one,  S^m_t = S^m_{t-1}  for the others
    y_t = output(sum over the chosen m of w_tm read(q_t, S^m_t)  +  read(q_t, S^shared_t))

How a memory writes (A, B), is read, and what `output` does (norm, gate, projection, after mixing) is another mixer's,
`inner`, which is taken apart by its `reads` and `writes`: query, gate and output are the token's, one for all
memories; keys, values and decays are the memory's, so each memory has its own layers for them. Constants (A_log, lower
bounds, learned feature maps, taps) are the layer's.

The memories are run as one packed stream. A token becomes k + 1 rows, sorted by memory and then by time; a memory's
rows of one document are to the inner mixer one document. So nothing is padded, dropped or looked up ahead, memories
and documents are kept apart by the borders that every recurrence and convolution already respects, the number of rows
is known beforehand, and the layers of all memories are one grouped product each:

    token      0 1 2 3 | 4 5          two documents, k = 1, two memories (0 and 1) and the shared one (2)
    chosen     0 1 0 0 | 1 0
    row        0 2 3 5 | 1 4 | 0 1 2 3 4 5
    memory     0 0 0 0   1 1   2 2 2 2 2 2
    segment    0 0 0 1   2 3   4 4 4 4 5 5      memory * N + document: where states and convolutions start anew

The sum of two reads is what the paper's mixed state gives, reads being linear in the state; a mixer whose read is not
(GSA) is mixed after reading. The shared memory is one that every token has, with weight 1. The query's convolution
runs over the document before tokens are spread, so that the query is the same for all memories; those of keys and
values run over what the memory was given, as its state does. Positions count in the document.

Shapes: T tokens, D width, k memories a token, R rows, M memories (the shared one included), N documents.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import Placement, Replicate

from torchlinearmoe.documents import Documents
from torchlinearmoe.errors import RecipeError
from torchlinearmoe.layers.convolution import Convolutions
from torchlinearmoe.layers.past import After, Empty, Past, Resumed, Spanned, complete
from torchlinearmoe.mixers.base import (
    MIXERS,
    Context,
    LayerPlace,
    Mixer,
    MixerOptions,
    SharedModule,
    StateSpec,
)
from torchlinearmoe.mixers.linear_mixer import LinearMixer, Parts
from torchlinearmoe.moe.accounting import account
from torchlinearmoe.moe.balance import Balance, attach_loss
from torchlinearmoe.moe.dispatch import LocalDispatch
from torchlinearmoe.moe.grouped_linear import GroupedLinear
from torchlinearmoe.moe.router import Router, Routing
from torchlinearmoe.moe.statistics import LoadStatistics
from torchlinearmoe.parallel.exchange.routed import route_spans
from torchlinearmoe.recipe.schema import ModelRecipe
from torchlinearmoe.segments import Segments


@dataclass(frozen=True, kw_only=True)
class MemoryOptions(MixerOptions):
    """What `[mixer.mom_*]` says besides the options of the memory's own mixer."""

    num_memories: int = 4
    """Memories among which the router chooses."""
    top_k: int = 2
    """Memories that a token reads and writes."""
    shared_memory: bool = True
    """One memory more, which every token reads and writes."""
    shared_projections: bool = False
    """The same keys, values and gates for all memories, which then differ by the tokens they are given alone."""
    renormalize: bool = True
    """The chosen memories' weights sum to one; false leaves them their share of the softmax over all memories."""
    balance_coefficient: float = 0.01
    """Factor of the balance loss."""
    balance_scope: Literal["sequence", "global"] = "sequence"
    """Over which tokens the balance is taken: each packed sequence by itself, or the whole optimizer step."""
    inner: str = ""
    """Another linear mixer to be the memory, with the options of its own section; empty for the one of the name."""


M = TypeVar("M", bound=MemoryOptions)


class MoM(Mixer[M]):
    """Memories of one inner mixer behind a router. Subclasses name the mixer and add its options to theirs."""

    memory: ClassVar[str]
    """The mixer whose options `Options` has."""
    projections = {"q": "inner.q_proj", "o": "inner.o_proj"}
    regions = ("query", "write", "inner.read", "inner.output", "dispatcher.dispatch", "dispatcher.combine")

    def __init__(self, options: M, model: ModelRecipe, place: LayerPlace) -> None:
        super().__init__(options, model, place)
        mixer, inner_options = self.inner_of(options, model)
        self.inner: LinearMixer = mixer(inner_options, model, place)
        self.heads = self.inner.heads
        self.shared_memory = options.shared_memory
        self.num_memories = options.num_memories + options.shared_memory
        self.write_rows = options.top_k + options.shared_memory
        self.router = Router(
            model.hidden_size,
            options.num_memories,
            options.top_k,
            renormalize=options.renormalize,
            std=model.init_std,
        )
        self.balance = Balance(
            options.num_memories, coefficient=options.balance_coefficient, scope=options.balance_scope
        )
        self.statistics = LoadStatistics(options.num_memories, kind="mom")
        self.dispatcher = LocalDispatch(self.num_memories)
        self.query_convs = Convolutions({}, 0)
        if "q" in self.inner.convs:
            self.query_convs["q"] = self.inner.convs.pop("q")
        self.write_layers = nn.ModuleDict()
        layers = () if options.shared_projections else self.inner.writes.values()
        for name in (name for chain in layers for name in chain):
            layer = self.inner.get_submodule(name)
            assert isinstance(layer, nn.Linear)
            self.write_layers[name] = GroupedLinear(layer, self.num_memories)
            delattr(self.inner, name)

    @classmethod
    def inner_of(cls, options: M, model: ModelRecipe) -> tuple[type[LinearMixer], Any]:
        """The mixer that the memories are, and its options: those of this section, or of its own where it is named.

        Raises RecipeError for a mixer that cannot be a memory, and for options that it would not read.
        """
        name = MIXERS.canonical(options.inner or cls.memory)
        legal = {other: mixer for other, mixer in MIXERS.items() if issubclass(mixer, LinearMixer)}
        if name not in legal:
            raise RecipeError(
                f"mixer.{cls.name}.inner = '{options.inner}': cannot be a memory; legal: {', '.join(legal)}"
            )
        default = MIXERS[cls.memory].Options()
        own = {entry.name: getattr(options, entry.name) for entry in fields(default)}
        if name == cls.memory:
            return legal[name], replace(default, **own)
        given = {key: value for key, value in own.items() if value != getattr(default, key)}
        for key in given.keys() - {"heads", "head_dim"}:
            raise RecipeError(f"mixer.{cls.name}.{key}: an option of {cls.memory}, but inner = '{options.inner}'")
        return legal[name], replace(model.mixer_options.get(name) or legal[name].Options(), **given)

    @classmethod
    def sections(cls, options: M) -> tuple[str, ...]:
        inner = MIXERS.canonical(options.inner or cls.memory)
        return (cls.name,) if inner == cls.memory else (cls.name, inner)

    @classmethod
    def check(cls, options: M, model: ModelRecipe) -> None:
        cls.check_counts(options)
        if options.num_memories < 1:
            raise RecipeError(f"mixer.{cls.name}.num_memories = {options.num_memories}: must be at least 1")
        if not 1 <= options.top_k <= options.num_memories:
            raise RecipeError(
                f"mixer.{cls.name}.top_k = {options.top_k}: must lie between 1 and num_memories = "
                f"{options.num_memories}"
            )
        if options.balance_coefficient < 0:
            raise RecipeError(
                f"mixer.{cls.name}.balance_coefficient = {options.balance_coefficient}: must not be negative"
            )
        mixer, inner_options = cls.inner_of(options, model)
        try:
            mixer.check(inner_options, model)
        except RecipeError as error:
            if mixer.name != cls.memory:
                raise
            raise RecipeError(str(error).replace(f"mixer.{mixer.name}.", f"mixer.{cls.name}.")) from None

    @classmethod
    def head_groups(cls, options: M, model: ModelRecipe) -> tuple[str, int]:
        mixer, inner_options = cls.inner_of(options, model)
        return mixer.head_groups(inner_options, model)

    @classmethod
    def shared_module(cls, options: M, model: ModelRecipe, count: int) -> SharedModule | None:
        mixer, inner_options = cls.inner_of(options, model)
        return mixer.shared_module(inner_options, model, count)

    def state_spec(self) -> dict[str, StateSpec]:
        inner = {
            name: replace(spec, shape=(self.num_memories, *spec.shape))
            for name, spec in self.inner.state_spec().items()
        }
        return inner | self.query_convs.state_spec()

    def tensor_parallel(self) -> dict[str, Placement]:
        placements = {}
        for name, placement in self.inner.tensor_parallel().items():
            owner = "write_layers" if name.partition(".")[0] in self.write_layers else "inner"
            placements[f"{owner}.{name}"] = placement
        # The router's weights meet each rank's own heads.
        return placements | self.query_convs.tensor_parallel("query_convs") | {"router.weight": Replicate()}

    def mixing_flops(self, length: int) -> float:
        return self.write_rows * self.inner.mixing_flops(length)

    def active_parameters(self) -> int:
        memories = sum(p.numel() for p in self.write_layers.parameters())
        return super().active_parameters() - memories + memories * self.write_rows // self.num_memories

    def flops_per_token(self, length: int) -> float:
        """A token passes the layers and convolutions of what it writes once for every memory it has."""
        memories = sum(p.numel() for p in self.write_layers.parameters()) // self.num_memories
        taps = sum(p.numel() for p in self.inner.convs.parameters() if p.dim() == 2)
        once = (self.inner, self.query_convs, self.router)
        matrices = sum(p.numel() for module in once for p in module.parameters() if p.dim() == 2)
        return 2.0 * (matrices - taps + self.write_rows * (memories + taps)) + self.mixing_flops(length)

    def run(self, x_TD: Tensor, context: Context, past: Past) -> tuple[Tensor, After]:
        routing = self._account(self.router(x_TD), context)
        (q, *reads), after = self.region("query", past)(x_TD, past)
        choice = self._with_shared(routing)
        x_RD, counts_M, rows = self.dispatcher.dispatch(x_TD, choice)
        if self.write_layers:
            parts = self.write(x_RD, counts_M)
        else:
            parts = self.inner.apply_layers(self.inner.writes, x_TD)
            parts = {name: self.dispatcher.spread(part, rows) for name, part in parts.items()}
        parts["q"] = self.dispatcher.spread(q, rows)
        tokens_R = rows.order_R // self.write_rows
        memories_R = choice.topk_ids_Tk.flatten()[rows.order_R]
        parts = self.inner.prepare(parts, self._inner_context(context, tokens_R))
        o_R, memory = self._read(parts, tokens_R, memories_R, context.documents, past)
        o_T = self.dispatcher.combine(o_R.flatten(1), rows).unflatten(1, o_R.shape[1:])
        return self.inner.output(o_T, *reads), after | memory

    def _account(self, routing: Routing, context: Context) -> Routing:
        """Count this rank's part of the stream, as the experts' routers do, and attach the balance loss."""
        if not self.training:
            return routing
        layout, documents = self.balance.layout, context.documents
        loss, _ = account(
            Routing(*map(layout.own, routing)),
            self.balance,
            self.statistics,
            totals=context.totals,
            row_length=documents.row_length,
            counted_T=None if documents.counted is None else layout.own(documents.counted),
        )
        return routing if loss is None else routing._replace(topk_weights_Tk=attach_loss(routing.topk_weights_Tk, loss))

    def _with_shared(self, routing: Routing) -> Routing:
        """The shared memory as one that every token chose, with weight 1."""
        if not self.shared_memory:
            return routing
        ids_Tk = F.pad(routing.topk_ids_Tk, (0, 1), value=self.num_memories - 1)
        return routing._replace(topk_ids_Tk=ids_Tk, topk_weights_Tk=F.pad(routing.topk_weights_Tk, (0, 1), value=1.0))

    def query(self, x_TD: Tensor, past: Past) -> tuple[tuple[Tensor, ...], After]:
        """The query, convolved, and what `output` takes beside the read: [T, ...] each; and the convolution's state."""
        parts = self.inner.apply_layers(self.inner.reads, x_TD)
        convolved, after = self.query_convs({"q": parts["q"]}, past)
        return tuple((parts | convolved).values()), after

    def write(self, x_RD: Tensor, counts_M: Tensor) -> Parts:
        """What each row writes by, from the layers of its memory: [R, ...] each."""
        parts = {}
        for part, names in self.inner.writes.items():
            parts[part] = x_RD
            for name in names:
                parts[part] = self.write_layers[name](parts[part], counts_M)
        return parts

    def _inner_context(self, context: Context, tokens_R: Tensor) -> Context:
        shared = {self.inner.name: context.shared[self.name]} if self.name in context.shared else {}
        return replace(context, positions=context.positions[tokens_R], shared=shared, tables={})

    def _read(
        self, parts: Parts, tokens_R: Tensor, memories_R: Tensor, documents: Documents, past: Past
    ) -> tuple[Tensor, After]:
        """The rows through the inner recurrence, [R, H, ...], and the memories' states."""
        M, N, documents_R = self.num_memories, past.segments.count, documents.ids[tokens_R].long()
        if isinstance(past, Resumed) and past.segments.single:
            return self._step(parts, documents_R * M + memories_R, past)
        segments_R = memories_R * N + documents_R
        segments = Segments.of_ids(segments_R.to(torch.int32), M * N)
        if isinstance(past, Empty):
            return self.inner.region("read", past)(parts, Empty(segments))[0], {}
        if isinstance(past, Spanned):
            spans = route_spans(past.spans, tokens_R, memories_R, M, N)
            return self.inner.region("read", past)(parts, Spanned(segments, spans))[0], {}
        states = {name: past.state[name].transpose(0, 1).flatten(0, 1) for name in self.inner.state_spec()}
        o_R, read = self.inner.read(parts, Resumed(segments, states))
        after = complete(read)
        return o_R, {name: after[name].unflatten(0, (M, N)).transpose(0, 1) for name in states}

    def _step(self, parts: Parts, places_R: Tensor, past: Resumed) -> tuple[Tensor, After]:
        """One token of each sequence: a row takes the state at its place among all memories of all, and leaves one."""
        flat = {name: past.state[name].flatten(0, 1) for name in self.inner.state_spec()}
        borders = torch.arange(places_R.shape[0] + 1, device=places_R.device, dtype=torch.int32)
        rows = Segments(borders[:-1], borders, single=True)
        o_R, read = self.inner.read(parts, Resumed(rows, {name: x[places_R] for name, x in flat.items()}))
        after = complete(read)
        return o_R, {name: x.index_copy(0, places_R, after[name]).view_as(past.state[name]) for name, x in flat.items()}
