"""The decoder: embedding, blocks, norm, head; training loss, prefill and decoding.

Everything inside works on one flat stream of packed documents: a batch [B, T] is B documents of T tokens. Decoding
keeps a `DecodeState`: the named states of every layer and how far each sequence has come.

Shapes: B sequences, T tokens, D width, V vocabulary.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from torchlinearmoe.documents import Documents
from torchlinearmoe.initialize import Normal, initialize, set_initializers
from torchlinearmoe.kernels.cross_entropy import chunk_hits, chunk_loss, linear_cross_entropy
from torchlinearmoe.layers.norm import RMSNorm
from torchlinearmoe.mixers import MIXERS
from torchlinearmoe.mixers.base import Carried, Carry, Context, LayerPlace, Mixer, State
from torchlinearmoe.models.block import Block
from torchlinearmoe.models.layer_mixers import layer_mixers
from torchlinearmoe.module import Module
from torchlinearmoe.moe.totals import StepTotals
from torchlinearmoe.recipe.schema import ModelRecipe
from torchlinearmoe.segments import Segments


@dataclass(frozen=True)
class DecodeState:
    """Where B sequences stand."""

    layers: list[State]
    """Named state of every layer, dim 0 = B."""
    positions: Tensor
    """int64 [B], tokens seen so far."""
    seen: tuple[int, ...]
    """The same on the host."""
    max_length: int
    """Tokens the softmax layers have room for."""

    def select(self, rows: list[int]) -> DecodeState:
        """The sequences `rows`, of which any may come several times (a copy)."""
        layers = [{name: value[rows] for name, value in layer.items()} for layer in self.layers]
        return DecodeState(layers, self.positions[rows], tuple(self.seen[i] for i in rows), self.max_length)


class Head(Module):
    """Projection to the vocabulary, and the loss through it. A tied head is given the embedding's weight."""

    regions = ("kernel",)

    def __init__(self, width: int, vocab_size: int, std: float, tied: bool) -> None:
        super().__init__()
        self.weight = None if tied else nn.Parameter(torch.empty(vocab_size, width))
        self.kernel, self.backend, self.hits = chunk_loss, "auto", chunk_hits
        if not tied:
            set_initializers(self, weight=Normal(std))

    def forward(self, h: Tensor, labels: Tensor | None = None, weight: Tensor | None = None) -> Tensor:
        """Logits [..., V], or with `labels` int64 [T] the summed cross entropy."""
        weight = self.weight if weight is None else weight
        assert weight is not None
        if labels is None:
            return h @ weight.t()
        return linear_cross_entropy(h, weight, labels, self.kernel, self.backend)


class Decoder(Module):
    """A Linear-MoE language model. `model(tokens)` gives logits; see the module's docstring.

    Given `layers` it holds these consecutive ones only, under the names they have in the whole model, with the
    embedding where the first layer is among them, and the norm and the head where the last one is. A tied head brings
    the embedding along. Modules that are not held are None.
    """

    embed: nn.Embedding
    norm: RMSNorm
    head: Head

    def __init__(self, recipe: ModelRecipe, layers: range | None = None) -> None:
        super().__init__()
        self.recipe = recipe
        self.views: tuple[Callable[[Segments], Any], ...] = ()
        """Of the documents of a forward, made ahead of the layers: what compiled regions read."""
        names = layer_mixers(recipe)
        layers = range(len(names)) if layers is None else layers
        self.holds_first, self.holds_last = layers.start == 0, layers.stop == len(names)
        self.register_module("embed", None)
        if self.holds_first or (self.holds_last and recipe.tie_embeddings):
            self.embed = nn.Embedding(recipe.vocab_size, recipe.hidden_size)
            set_initializers(self.embed, weight=Normal(recipe.init_std))
        counts = Counter(names)
        self.shared = nn.ModuleDict()
        for name in dict.fromkeys(names[index] for index in layers):
            module = MIXERS[name].shared_module(recipe.mixer_options[name], recipe, counts[name])
            if module is not None:
                self.shared[name] = module
        self.layers = nn.ModuleDict()
        for index in layers:
            name = names[index]
            place = LayerPlace(index, names[:index].count(name), counts[name])
            self.layers[str(index)] = Block(recipe, _build_mixer(name, recipe, place), index)
        self.register_module("norm", None)
        self.register_module("head", None)
        if self.holds_last:
            self.regions = ("norm.forward",)  # the last norm is in no block's region
            self.norm = RMSNorm(recipe.hidden_size, recipe.norm_eps, recipe.norm_offset)
            self.head = Head(recipe.hidden_size, recipe.vocab_size, recipe.init_std, recipe.tie_embeddings)

    def forward(
        self,
        tokens: Tensor,
        cu_seqlens: Tensor | None = None,
        *,
        labels: Tensor | None = None,
        documents: Documents | None = None,
        totals: StepTotals | None = None,
    ) -> Tensor:
        """Logits of packed or plain tokens, or the summed loss.

        tokens: int64 [B, T]; cu_seqlens: int32 [N + 1] with B == 1, each document by itself. Returns [B, T, V]. With
        `documents` the tokens are one flat stream [T] (logits [T, V]); with `labels`, int64 [T] and -100 where there
        is no target, the summed cross entropy comes back, and `totals` of the step attaches the routers' losses.
        Floating-point tokens, here and in what follows, are embeddings, with a dimension D more.
        """
        shape = tokens.shape[:-1] if tokens.is_floating_point() else tokens.shape
        if documents is None:
            documents = _documents_of(tokens[..., 0] if len(shape) < tokens.dim() else tokens, cu_seqlens)
            self._check_tokens(tokens)
        h = self.hidden(tokens.reshape(-1, *tokens.shape[len(shape) :]), documents, totals)
        if labels is not None:
            return self.project(h, labels.reshape(-1))
        logits = self.project(h)
        return logits.unflatten(0, shape) if len(shape) > 1 else logits

    def hidden(self, tokens: Tensor, documents: Documents, totals: StepTotals | None = None) -> Tensor:
        """What the head reads, [T, D], of a flat stream of tokens [T]: `project` any rows of it."""
        context = Context(documents, documents.whole_positions, self.shared_outputs(), totals)
        h, _ = self._run(tokens, context, None)
        return h

    def init_state(self, batch_size: int, max_length: int | None = None) -> DecodeState:
        """Empty state of `batch_size` sequences; `max_length` bounds the softmax layers (default model.max_length)."""
        weight = self.embed.weight
        room = max_length or self.recipe.max_length
        layers = [layer.mixer.init_state(batch_size, room, weight.device, weight.dtype) for layer in self._blocks()]
        positions = torch.zeros(batch_size, dtype=torch.int64, device=weight.device)
        return DecodeState(layers, positions, (0,) * batch_size, room)

    def prefill(
        self, tokens: Tensor, state: DecodeState, lengths: Tensor | list[int] | None = None
    ) -> tuple[Tensor, DecodeState]:
        """Read prompts of unequal lengths.

        tokens: int64 [B, T], right-padded; lengths: B of them (default T each). Every sequence goes on from `state`.
        Returns logits [B, T, V], zero on the padding, and the new state. Softmax layers write into the given state's
        room. Raises ValueError where a sequence outgrows `max_length` of a state with softmax layers.
        """
        batch, width = tokens.shape[:2]
        counts = [width] * batch if lengths is None else [int(n) for n in lengths]
        if len(counts) != batch or min(counts) < 0 or max(counts) > width:
            raise ValueError(f"lengths = {counts}: must be {batch} numbers between 0 and {width}")
        self._check_tokens(tokens)
        rows = [i for i, n in enumerate(counts) if n]
        logits = tokens.new_zeros(batch, width, self.recipe.vocab_size, dtype=self.embed.weight.dtype)
        if not rows:
            return logits, state
        part = state if len(rows) == batch else state.select(rows)
        kept = [counts[i] for i in rows]
        documents = Documents.prompts(kept, tokens.device)
        row_of = torch.tensor(rows, device=tokens.device)[documents.ids.long()]
        h, part = self._decode(tokens[row_of, documents.positions], documents, part, kept, stepping=False)
        logits[row_of, documents.positions] = self.project(h)
        return logits, part if len(rows) == batch else _merge(state, part, rows)

    def step(self, tokens: Tensor, state: DecodeState) -> tuple[Tensor, DecodeState]:
        """One token for every sequence: int64 [B] -> logits [B, V] and the new state. Errors as in `prefill`."""
        if tokens.device.type == "cpu":  # elsewhere each step would wait for it
            self._check_tokens(tokens)
        documents = Documents.batch(tokens.shape[0], 1, tokens.device)
        h, state = self._decode(tokens, documents, state, [1] * tokens.shape[0], stepping=True)
        return self.project(h), state

    def _check_tokens(self, tokens: Tensor) -> None:
        """Raise ValueError for ids that have no embedding: on a GPU one would end the process."""
        if tokens.numel() and tokens.device.type != "meta" and not tokens.is_floating_point():
            least, most = (int(n) for n in tokens.aminmax())
            if least < 0 or most >= self.recipe.vocab_size:
                wrong = least if least < 0 else most
                raise ValueError(f"tokens: {wrong} is no id; they go from 0 to {self.recipe.vocab_size - 1}")

    def _decode(
        self, tokens: Tensor, documents: Documents, state: DecodeState, counts: list[int], *, stepping: bool
    ) -> tuple[Tensor, DecodeState]:
        seen = tuple(a + b for a, b in zip(state.seen, counts, strict=True))
        if max(seen) > state.max_length and any(_grows(layer.mixer) for layer in self._blocks()):
            raise ValueError(
                f"max_length = {state.max_length}: a sequence of {max(seen)} tokens has no room in the softmax layers; "
                "make the state with a larger max_length"
            )
        positions = documents.positions + state.positions[documents.ids.long()]
        context = Context(documents, positions, self.shared_outputs(), None, stepping, max(seen))
        h, layers = self._run(tokens, context, state.layers)
        advance = torch.tensor(counts, device=tokens.device)
        return h, DecodeState(layers, state.positions + advance, seen, state.max_length)

    def _run(self, tokens: Tensor, context: Context, states: list[State] | None) -> tuple[Tensor, list[State]]:
        """Flat tokens [T] through the blocks and the last norm, [T, D]."""
        x, after, _ = self.run_layers(self.enter(tokens), context, states, {})
        return self.norm(x), after

    def enter(self, tokens: Tensor) -> Tensor:
        """What the first layer reads, [T, D], of ids [T] or their embeddings [T, D]."""
        x = tokens if tokens.is_floating_point() else self.embed(tokens)
        return x if self.recipe.embed_scale == 1 else x * self.recipe.embed_scale

    def run_layers(
        self, x: Tensor, context: Context, states: list[State] | None, carried: Carried
    ) -> tuple[Tensor, list[State], Carried]:
        """Hidden states [T, D] and carried tensors through the blocks held here; the states come back if given."""
        after: list[State] = []
        for make in self.views if states is None else ():
            make(context.documents.bounded)
        for index, layer in enumerate(self.layers.values()):
            x, state, carried = layer(x, context, None if states is None else states[index], carried)
            if state is not None:
                after.append(state)
        return x, after, carried

    def project(self, h: Tensor, labels: Tensor | None = None) -> Tensor:
        """Normed hidden states [T, D] to logits, or with labels to their summed cross entropy."""
        if self.recipe.logit_divisor != 1:
            h = h / self.recipe.logit_divisor
        return self.head(h, labels, self.embed.weight if self.recipe.tie_embeddings else None)

    def shared_outputs(self) -> dict[str, Tensor]:
        """What the shared modules give their mixers' layers, by mixer."""
        return {name: module() for name, module in self.shared.items()}

    def _blocks(self) -> list[Block]:
        return [layer for layer in self.layers.values() if isinstance(layer, Block)]


def _build_mixer(name: str, recipe: ModelRecipe, place: LayerPlace) -> Mixer:
    return MIXERS[name](recipe.mixer_options[name], recipe, place)


def _documents_of(tokens: Tensor, cu_seqlens: Tensor | None) -> Documents:
    if tokens.dim() != 2:
        raise ValueError(f"tokens of shape {list(tokens.shape)}: must be [B, T]")
    if cu_seqlens is None:
        return Documents.batch(tokens.shape[0], tokens.shape[1], tokens.device)
    if tokens.shape[0] != 1:
        raise ValueError(f"cu_seqlens with {tokens.shape[0]} rows: packed documents come as one row, [1, T]")
    borders = cu_seqlens.tolist()
    if borders[-1:] != [tokens.shape[1]]:
        raise ValueError(f"cu_seqlens ends at {borders[-1:]}: it must end at the {tokens.shape[1]} tokens of the row")
    return Documents.packed(borders, device=tokens.device)


def _grows(mixer: Mixer) -> bool:
    return any(spec.carry is Carry.APPEND for spec in mixer.state_spec().values())


def _merge(state: DecodeState, part: DecodeState, rows: list[int]) -> DecodeState:
    """`state` with its sequences `rows` replaced by those of `part`."""
    layers = []
    for old, new in zip(state.layers, part.layers, strict=True):
        index = torch.tensor(rows, device=state.positions.device)
        layers.append({name: old[name].index_copy(0, index, value) for name, value in new.items()})
    index = torch.tensor(rows, device=state.positions.device)
    positions = state.positions.index_copy(0, index, part.positions)
    seen = list(state.seen)
    for row, count in zip(rows, part.seen, strict=True):
        seen[row] = count
    return replace(state, layers=layers, positions=positions, seen=tuple(seen))


def build_model(recipe: ModelRecipe, seed: int = 0) -> Decoder:
    """A decoder in float32 on the default device, initialised; equal for equal (recipe, seed, device type)."""
    with torch.device("meta"):
        model = Decoder(recipe)
    model.to_empty(device=torch.get_default_device())
    initialize(model, seed)
    return model
