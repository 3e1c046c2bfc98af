"""Which tensors of one model another model starts from.

    embeddings, norms, head       the same tensors
    a layer of the same mixer     the same tensors
    a layer of another mixer      its query, key, value and output projections, heads repeated where there are more
    experts                       the same, or every one a copy of the dense feed-forward (upcycling, Komatsuzaki et al.
                                  2023, arXiv 2212.05055)

Everything else keeps its initial values. What is taken must compute the same: a recipe that would read the weights
otherwise (another rotary base, other heads) is an error, not a start.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torchlinearmoe.checkpoint.boxes import EXPERT, Copy, Index, whole
from torchlinearmoe.checkpoint.stream import Weights
from torchlinearmoe.errors import RecipeError
from torchlinearmoe.families import FAMILIES
from torchlinearmoe.mixers import MIXERS
from torchlinearmoe.models.block import placed
from torchlinearmoe.models.layer_feed_forwards import DENSE, EXPERTS, feed_forwards
from torchlinearmoe.models.layer_mixers import layer_mixers
from torchlinearmoe.recipe import ModelRecipe

ALWAYS = (
    *("hidden_size", "num_layers", "vocab_size", "norm_eps", "norm_offset", "ffn_scales"),
    *("embed_scale", "residual_scale", "logit_divisor", "activation"),
)
ATTENTION = ("num_heads", "num_kv_heads", "head_dim")
FREE_MOE = (
    *("top_k", "balance", "balance_coefficient", "balance_scope", "z_loss_coefficient", "bias_rate"),
    *("capacity_factor", "eval_capacity_factor", "drop_policy", "backend"),
)
"""`[moe]` keys that may differ between experts and a model that takes them."""


@dataclass
class Transplant:
    """What goes where."""

    copies: dict[str, list[Copy]] = field(default_factory=dict)
    """Tensors that are taken, as boxes of the source's."""
    upcycled: set[str] = field(default_factory=set)
    """Those of them that are experts made of a dense feed-forward."""
    fresh: dict[str, str] = field(default_factory=dict)
    """Tensors that keep their initial values, and why."""
    unused: list[str] = field(default_factory=list)
    """Tensors of the source that nothing is made of."""


def plan_transplant(target: ModelRecipe, shapes: Mapping[str, Index], source: Weights) -> Transplant:
    """How a model of the recipe `target`, whose tensors have `shapes`, starts from the model in `source`.

    Raises RecipeError, one line that names the field and both values, where the source's weights mean something else
    under `target`.
    """
    check_recipes(target, source.recipe.model, str(source.path))
    plan = Transplant()
    planner = _Planner(target, source, plan)
    for name, shape in shapes.items():
        planner.place(name, shape)
    used = {copy.source for copies in plan.copies.values() for copy in copies}
    plan.unused = [name for name in source.shapes if name not in used]
    return plan


def check_recipes(target: ModelRecipe, source: ModelRecipe, where: str) -> None:
    """Raise RecipeError for the first field by which taken weights would compute something else."""
    keys = [("model", key) for key in ALWAYS]
    common = {ours for ours, theirs in zip(layer_mixers(target), layer_mixers(source)) if ours == theirs}
    if FAMILIES[source.family].attention in common:
        scaling = [key for key in vars(source) if key.startswith("rope_") and key != "rope_scaling"]
        rope = ("rope_theta", "rope_scaling", *(scaling if source.rope_scaling != "none" else ()))
        keys += [("model", key) for key in (*ATTENTION, *rope)]
    if target.moe.num_experts and source.moe.num_experts:
        keys += [("moe", key) for key in vars(source.moe) if key not in FREE_MOE]
    for section, key in keys:
        ours, theirs = (getattr(recipe.moe if section == "moe" else recipe, key) for recipe in (target, source))
        _equal(f"{section}.{key}", ours, theirs, where)
    _feed_forwards(target, source, where)
    _placements(target, source, where)
    for name in sorted(common):
        for key, theirs in vars(source.mixer_options[name]).items():
            _equal(f"mixer.{name}.{key}", getattr(target.mixer_options[name], key), theirs, where)
    if not source.moe.num_experts:
        if target.moe.num_experts:
            _equal("moe.hidden_size", target.moe.hidden_size, source.ffn_hidden_size, where)
            _equal("moe.latent_size", target.moe.latent_size, 0, where)
        else:
            _equal("model.ffn_hidden_size", target.ffn_hidden_size, source.ffn_hidden_size, where)
    if target.tie_embeddings and not source.tie_embeddings:
        _equal("model.tie_embeddings", True, False, where)


def _feed_forwards(target: ModelRecipe, source: ModelRecipe, where: str) -> None:
    """Layers have a feed-forward where they had one, however the pattern is written; experts where both models have
    any."""
    ours, theirs = feed_forwards(target), feed_forwards(source)
    if not (target.moe.num_experts and source.moe.num_experts):
        ours, theirs = ([DENSE if kind == EXPERTS else kind for kind in kinds] for kinds in (ours, theirs))
    if ours != theirs:
        _equal("model.feed_forwards", target.feed_forwards, source.feed_forwards, where)


def _placements(target: ModelRecipe, source: ModelRecipe, where: str) -> None:
    """Norms stand where they stood and sums are weighed as they were, in layers of whatever mixer."""
    for names in zip(layer_mixers(target), layer_mixers(source), strict=True):
        softmax = [MIXERS[name].keeps_past for name in names]
        ours, theirs = (placed(model, kind) for model, kind in zip((target, source), softmax))
        own = softmax[0] and target.attention_norm_placement
        _equal("model.attention_norm_placement" if own else "model.norm_placement", ours[0], theirs[0], where)
        _equal(f"model.{'attention' if softmax[0] else 'linear'}_scales", [*ours[1]], [*theirs[1]], where)


def _equal(key: str, ours: Any, theirs: Any, where: str) -> None:
    if ours != theirs:
        raise RecipeError(f"{key} = {ours!r}: {where}, named by checkpoint.init_from, has {theirs!r}; set it to that")


class _Planner:
    """Finds a place in the source for one tensor after the other."""

    def __init__(self, target: ModelRecipe, source: Weights, plan: Transplant) -> None:
        self.source, self.plan = source, plan
        self.shapes = source.shapes
        model = source.recipe.model
        self.mixers, self.source_mixers = layer_mixers(target), layer_mixers(model)
        self.source_head = model.head_dim if FAMILIES[model.family].attention == "softmax_attention" else 0

    def place(self, name: str, shape: Index) -> None:
        """Find what the tensor `name` is made of."""
        if match := re.fullmatch(r"layers\.(\d+)\.mixer\.(.+)", name):
            layer, part = int(match[1]), match[2]
            if self.mixers[layer] != self.source_mixers[layer]:
                self._project(name, shape, layer, part)
                return
        if match := re.fullmatch(r"(layers\.\d+\.ffn\.)experts\.(gate_up|up|down)", name):
            dense = f"{match[1]}down_proj.weight"
            if name not in self.shapes and dense in self.shapes:
                self._upcycle(name, shape, match[1])
                return
        if name == "head.weight" and name not in self.shapes:
            self._same(name, shape, "embed.weight")
            return
        self._same(name, shape, name)

    def _same(self, name: str, shape: Index, source: str) -> None:
        if source not in self.shapes:
            self.plan.fresh[name] = "not in the source"
        elif self.shapes[source] != shape:
            theirs = list(self.shapes[source])
            raise RecipeError(
                f"checkpoint.init_from = '{self.source.path}': '{source}' has shape {theirs}, the recipe's model has "
                f"{list(shape)}"
            )
        else:
            self.plan.copies[name] = [whole(source, shape)]

    def _project(self, name: str, shape: Index, layer: int, part: str) -> None:
        """A projection of a layer whose mixer is another one than the source's."""
        module, _, kind = part.rpartition(".")
        roles = {module: role for role, module in MIXERS[self.mixers[layer]].projections.items()}
        theirs = MIXERS[self.source_mixers[layer]].projections
        if module not in roles or roles[module] not in theirs:
            self.plan.fresh[name] = f"{self.source_mixers[layer]} has no such part"
            return
        role = roles[module]
        source = f"layers.{layer}.mixer.{theirs[role]}.{kind}"
        found = self.shapes.get(source)
        if found == shape:
            self.plan.copies[name] = [whole(source, shape)]
        elif found is not None and role in ("k", "v") and (copies := self._repeat(source, found, shape)):
            self.plan.copies[name] = copies
        else:
            has = "has none" if found is None else f"has {list(found)}, not {list(shape)}"
            self.plan.fresh[name] = f"{self.source_mixers[layer]} {has}"

    def _repeat(self, source: str, found: Index, shape: Index) -> list[Copy]:
        """Every head of the source several times, side by side; none where that does not make the target."""
        head, times = self.source_head, shape[0] // found[0]
        if not head or found[0] % head or shape[0] != times * found[0] or shape[1:] != found[1:]:
            return []
        box, rest = (head, *shape[1:]), (0,) * (len(shape) - 1)
        return [
            Copy(source, ((h * times + t) * head, *rest), box, (h * head, *rest))
            for h in range(found[0] // head)
            for t in range(times)
        ]

    def _upcycle(self, name: str, shape: Index, prefix: str) -> None:
        """Every expert a copy of the dense feed-forward."""
        experts, inputs, outputs = shape
        parts = [("up_proj" if name.endswith("up") else "down_proj", 0, outputs)]
        if name.endswith("gate_up"):
            outputs //= 2
            parts = [("gate_proj", 0, outputs), ("up_proj", outputs, outputs)]
        self.plan.copies[name] = [
            Copy(f"{prefix}{module}.weight", (expert, 0, start), (1, inputs, width), (0, 0), EXPERT)
            for module, start, width in parts
            for expert in range(experts)
        ]
        self.plan.upcycled.add(name)


def describe(plan: Transplant, where: str) -> list[str]:
    """The plan in a few lines, layers told together."""
    total = len(plan.copies) + len(plan.fresh)
    lines = [f"{len(plan.copies)} of {total} tensors from {where}: {_grouped(list(plan.copies))}"]
    if plan.upcycled:
        lines.append(f"  every expert a copy of the dense feed-forward: {_grouped(sorted(plan.upcycled))}")
    reasons: dict[str, list[str]] = {}
    for name, reason in plan.fresh.items():
        reasons.setdefault(reason, []).append(name)
    lines += [f"  initial values ({reason}): {_grouped(names)}" for reason, names in reasons.items()]
    if plan.unused:
        lines.append(f"  not taken: {_grouped(plan.unused)}")
    return lines


def _grouped(names: Sequence[str]) -> str:
    """`layers.0.a, layers.1.a, b` as `layers.{0-1}.a, b`."""
    layers: dict[str, list[int]] = {}
    for name in names:
        match = re.match(r"layers\.(\d+)\.", name)
        key = name if match is None else "layers.*." + name[match.end() :]
        layers.setdefault(key, []).extend([] if match is None else [int(match[1])])
    return ", ".join(key.replace("*", _ranges(numbers), 1) if numbers else key for key, numbers in layers.items())


def _ranges(numbers: list[int]) -> str:
    """[0, 1, 2, 5] as `{0-2,5}`."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return "{" + ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs) + "}"
