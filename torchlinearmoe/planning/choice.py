"""Which layout of a recipe to take: for each number of ranks, length and memory the fastest one that fits.

Tried are all shares of a sequence (`context`) and of the experts (`expert`), and all kinds of activation checkpointing;
`tensor` above 1, the least of it first, where nothing fits without: it sends more, and saves memory of gathered weights
alone. The rest is as the recipe says, `pipeline` too, and what the command line gives stays. A rank's part of the model
is laid out once for each `tensor` and `expert`, by the code that training takes, and priced as a plan is: the figures
are those of a plan of that layout.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from torchlinearmoe.errors import RecipeError
from torchlinearmoe.models.decoder import Decoder
from torchlinearmoe.parallel.mesh import Degrees, Meshes, resolve_degrees, tokens_per_step
from torchlinearmoe.parallel.pipeline import check_micro_batches, micro_batches
from torchlinearmoe.planning.communication import counting_forwards
from torchlinearmoe.planning.context import LayerTraffic, traffic_by_layer
from torchlinearmoe.planning.memory import Memory, checkpoint_bytes, optimizer_states
from torchlinearmoe.planning.rank import RankPlan, price, rank_parts
from torchlinearmoe.planning.report import format_bytes, layout_text
from torchlinearmoe.planning.time import Machine, StepTime, busiest_flops, step_time, trading
from torchlinearmoe.planning.world import pretended_world
from torchlinearmoe.recipe import Recipe
from torchlinearmoe.run_folder import with_tokens_per_step

SHORTEST_SPAN = 256
"""Tokens."""
MICRO_BATCHES = 4
"""Of a pipeline, a stage, where the recipe says no `training.tokens_per_step`."""
CHECKPOINTING = ("none", "selective", "full")

Load = Callable[[Sequence[str]], Recipe]
"""The recipe, with further overrides behind those of the command line."""


@dataclass(frozen=True)
class Priced:
    """A layout and what it costs."""

    recipe: Recipe
    degrees: Degrees
    memory: Memory
    """Of the rank that holds most."""
    time: StepTime

    @property
    def speed(self) -> float:
        """Tokens a second of all ranks."""
        tokens = self.recipe.training.tokens_per_step
        assert tokens is not None
        return tokens / self.time.total


@dataclass
class Cell:
    """What was found for one number of ranks and one length."""

    fastest: dict[float, Priced]
    """By the memory of a GPU."""
    leanest: Priced | None = None
    tried: int = 0
    refusal: str = ""
    """Why the first layout that cannot be built cannot."""

    def take(self, found: Priced, memories: Collection[float], usable: float) -> None:
        """See whether `found` is better than what there is."""
        self.tried += 1
        if self.leanest is None or found.memory.total < self.leanest.memory.total:
            self.leanest = found
        for memory in memories:
            best = self.fastest.get(memory)
            if found.memory.total <= usable * memory * 2**30 and (best is None or found.speed > best.speed):
                self.fastest[memory] = found


def choose_layouts(
    load: Load,
    fixed: Collection[str],
    worlds: Sequence[int],
    lengths: Sequence[int],
    memories: Sequence[float],
    dtype: torch.dtype,
    machine: Machine,
    progress: Callable[[int, int], None] | None = None,
) -> list[dict[str, Any]]:
    """A row for each memory, number of ranks and length; sizes in bytes, JSON types only.

    fixed: keys of the recipe that stay; memories: GiB of a GPU. Needs a process without a process group. `progress` is
    called with (numbers of ranks done, all).
    """
    cells: dict[tuple[int, int], Cell] = {}
    traffic: dict[tuple[int, int, int], LayerTraffic] = {}
    tell = progress or (lambda done, total: None)
    for done, world in enumerate(worlds):
        tell(done, len(worlds))
        search = _Search(load, frozenset(fixed), world, lengths, memories, dtype, machine, traffic)
        cells |= {(world, length): cell for length, cell in search.run().items()}
    tell(len(worlds), len(worlds))
    return [
        _row(memory, world, length, cells[world, length])
        for memory in memories
        for world in worlds
        for length in lengths
    ]


def left_open(fixed: Collection[str]) -> list[str]:
    """Overrides that forget what a file says of the degrees that are tried; `fixed` keys stay."""
    keys = [f"parallel.{axis}" for axis in ("tensor", "expert", "context")]
    return [f"{key}=1" for key in keys if key not in fixed]


class _Search:
    """Of one number of ranks."""

    def __init__(
        self,
        load: Load,
        fixed: frozenset[str],
        world: int,
        lengths: Sequence[int],
        memories: Sequence[float],
        dtype: torch.dtype,
        machine: Machine,
        traffic: dict[tuple[int, int, int], LayerTraffic],
    ) -> None:
        self.load, self.fixed, self.world = load, fixed, world
        self.lengths, self.memories, self.dtype, self.machine = lengths, memories, dtype, machine
        self.traffic = traffic
        self.flops: dict[tuple[Any, ...], float] = {}
        self.recipe = load([*left_open(fixed), f"training.sequence_length={lengths[0]}"])
        self.pipeline = self.recipe.parallel.pipeline
        with torch.device("meta"):
            self.whole = Decoder(self.recipe.model)

    def run(self) -> dict[int, Cell]:
        """A cell for each length."""
        cells = {length: Cell({}) for length in self.lengths}
        if (least := self._least()) > self.machine.usable * max(self.memories) * 2**30:
            told = f"weights, gradients and optimizer states alone are {format_bytes(least)} a GPU"
            return {length: Cell({}, refusal=told) for length in self.lengths}
        # Of memory that can do at all.
        attainable = [memory for memory in self.memories if least <= self.machine.usable * memory * 2**30]
        for tensor in self._tensor_degrees():
            wanting = {n: cell for n, cell in cells.items() if not cell.fastest.keys() >= set(attainable)}
            for expert in self._options("parallel.expert", self._expert_degrees()) if wanting else ():
                self._try(tensor, expert, wanting)
        return cells

    def _least(self) -> float:
        """Bytes a rank that no layout goes below: an even share of all that is saved, and of gradients."""
        saved = checkpoint_bytes(self.whole, optimizer_states(self.whole, self.recipe.optimizer))
        gradients = self.dtype.itemsize * sum(parameter.numel() for parameter in self.whole.parameters())
        return (saved + gradients) * self.recipe.parallel.data_replicate / self.world

    def _tensor_degrees(self) -> list[int]:
        """Those within a node."""
        within = [n for n in _divisors(self.world // self.pipeline) if n <= self.machine.node_ranks]
        return self._options("parallel.tensor", within)

    def _options(self, key: str, values: list[Any]) -> list[Any]:
        section, name = key.split(".")
        return [getattr(getattr(self.recipe, section), name)] if key in self.fixed else values

    def _expert_degrees(self) -> list[int]:
        lenders = self.world // self.pipeline // self.recipe.parallel.data_replicate
        experts = self.recipe.model.moe.num_experts
        return [n for n in _divisors(lenders) if experts % n == 0] if experts else [1]

    def _try(self, tensor: int, expert: int, cells: dict[int, Cell]) -> None:
        """Price every context and kind of activation checkpointing of layouts that share the parts of ranks."""
        wanted: list[tuple[Cell, Recipe, Degrees]] = []
        for length, cell in cells.items():
            copy = self.world // (self.pipeline * tensor * self.recipe.parallel.data_replicate)
            spans = [n for n in _divisors(copy) if n == 1 or length // n >= SHORTEST_SPAN]
            for context in self._options("parallel.context", spans):
                for mode in self._options("training.activation_checkpointing", list(CHECKPOINTING)):
                    try:
                        recipe, degrees = self._variant(length, tensor, expert, context, mode)
                    except RecipeError as error:
                        cell.refusal = cell.refusal or str(error)
                        continue
                    wanted.append((cell, recipe, degrees))
        if not wanted:
            return
        plans: list[list[RankPlan]] = [[] for _ in wanted]
        _, first, laid_out = wanted[0]
        # Torch gives the lower ranks of an axis the larger pieces: the first of a stage holds as much as any of it.
        for rank in range(0, self.world, self.world // self.pipeline):
            with pretended_world(self.world, rank):
                parts = rank_parts(first, Meshes(laid_out, "cpu"), self.dtype)
                meshes = {own.context: Meshes(own, "cpu") for own in {degrees for _, _, degrees in wanted}}
                for found, (_, recipe, degrees) in zip(plans, wanted, strict=True):
                    own = meshes[degrees.context]
                    counting = counting_forwards(self.whole, micro_batches(recipe, degrees))
                    found.append(price(parts, recipe, own, self.dtype, counting, self._exchanged(recipe, own)))
        for found, (cell, recipe, degrees) in zip(plans, wanted, strict=True):
            largest = max((plan.memory for plan in found), key=lambda memory: memory.total)
            times = [
                step_time(recipe, degrees, self._flops(recipe, plan), plan.collectives, self.machine) for plan in found
            ]
            priced = Priced(recipe, degrees, largest, max(times, key=lambda time: time.total))
            cell.take(priced, self.memories, self.machine.usable)

    def _variant(self, length: int, tensor: int, expert: int, context: int, mode: str) -> tuple[Recipe, Degrees]:
        """The recipe of one layout; RecipeError where it cannot be."""
        degrees = {"tensor": tensor, "expert": expert, "context": context}
        overrides = [f"parallel.{axis}={degree}" for axis, degree in degrees.items()]
        overrides += [f"training.sequence_length={length}", f"training.activation_checkpointing={mode}"]
        recipe = self.load(overrides)
        found = resolve_degrees(recipe.parallel, self.world)
        tokens = tokens_per_step(recipe.training, found)
        if recipe.training.tokens_per_step is None and self.pipeline > 1:
            tokens *= MICRO_BATCHES * self.pipeline
        recipe = with_tokens_per_step(recipe, tokens)
        check_micro_batches(recipe, found)
        return recipe, found

    def _flops(self, recipe: Recipe, plan: RankPlan) -> float:
        """A token's in the last span."""
        training, context, traded = recipe.training, recipe.parallel.context, trading(plan.spans)
        key = (training.sequence_length, training.activation_checkpointing, context, traded)
        if key not in self.flops:
            self.flops[key] = busiest_flops(self.whole, training, context, traded)
        return self.flops[key]

    def _exchanged(self, recipe: Recipe, meshes: Meshes) -> LayerTraffic:
        """What spans exchange does not depend on who else there is."""
        key = (meshes.degrees.context, meshes.degrees.tensor, recipe.training.sequence_length)
        if key not in self.traffic:
            self.traffic[key] = traffic_by_layer(recipe, meshes, self.dtype)
        return self.traffic[key]


def _row(memory: float, world: int, length: int, cell: Cell) -> dict[str, Any]:
    """A cell as plain data."""
    row: dict[str, Any] = {"world_size": world, "sequence_length": length, "gpu_gib": memory, "tried": cell.tried}
    best, leanest = cell.fastest.get(memory), cell.leanest
    if best is None:
        told = cell.refusal
        if leanest is not None:
            least = leanest.memory
            part, size = max(dataclasses.asdict(least).items(), key=lambda item: item[1])
            told = (
                f"the least is {format_bytes(least.total)} ({part.replace('_', ' ')} {format_bytes(size)}) "
                f"with {layout_text(_layout(leanest))}"
            )
        return row | {"fits": False, "why": told}
    training = best.recipe.training
    return row | {
        "fits": True,
        "layout": _layout(best),
        "tokens_per_step": training.tokens_per_step,
        "memory": {**dataclasses.asdict(best.memory), "total": best.memory.total},
        "seconds": {**dataclasses.asdict(best.time), "total": best.time.total},
        "tokens_per_second": best.speed,
    }


def _layout(found: Priced) -> dict[str, Any]:
    return dataclasses.asdict(found.degrees) | {
        "activation_checkpointing": found.recipe.training.activation_checkpointing
    }


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
