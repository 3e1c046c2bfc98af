"""How the experts and memories of each layer are used, counted while training and read when metrics are logged.

Each micro-batch adds to buffers on the device; nothing is synchronised until `gather_statistics`.

Activation checkpointing runs a forward twice. A recomputation happens inside a running backward, a first forward never
does, so `recomputing` tells them apart and everything is counted once, whichever way the blocks are checkpointed.

E experts (or memories), k of them a token.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from torchlinearmoe.module import Module
from torchlinearmoe.moe.balance import Losses, count_assignments


def recomputing() -> bool:
    """Whether this forward is run again by activation checkpointing, that is from inside a backward."""
    return torch._C._current_graph_task_id() != -1


class LoadStatistics(Module):
    """One layer's running sums since they were last collected. Buffers, not saved in checkpoints.

    kind: the first part of the figures' names, "moe" for experts, "mom" for memories.
    """

    regions = ("record",)

    def __init__(self, num_experts: int, kind: str = "moe"):
        super().__init__()
        self.kind = kind
        self.num_experts = num_experts
        self.register_buffer("counts_E", torch.zeros(num_experts, dtype=torch.int64), persistent=False)
        self.register_buffer("dropped", torch.zeros((), dtype=torch.int64), persistent=False)
        self.register_buffer("tokens", torch.zeros((), dtype=torch.int64), persistent=False)
        self.register_buffer("probs_E", torch.zeros(num_experts, dtype=torch.float64), persistent=False)
        self.register_buffer("losses", torch.zeros(2, dtype=torch.float64), persistent=False)

    counts_E: Tensor
    dropped: Tensor
    tokens: Tensor
    probs_E: Tensor
    losses: Tensor

    def reset_buffers(self) -> None:
        """Start counting anew."""
        for buffer in self.buffers():
            buffer.zero_()

    def record(
        self,
        topk_ids_Tk: Tensor,
        probs_TE: Tensor,
        keep_Tk: Tensor | None,
        losses: Losses | None,
        counted_T: Tensor | None = None,
    ) -> Tensor:
        """Add a micro-batch: choices [T, k] before dropping, probabilities [T, E], kept assignments [T, k], losses.

        counted_T: bool [T], False for padding, whose probabilities are zero. Returns assignments to each, int64 [E].
        """
        with torch.no_grad():  # a decorator around it would be what is compiled
            counts_E = count_assignments(topk_ids_Tk, self.num_experts, counted_T)
            self.counts_E += counts_E
            self.tokens += probs_TE.shape[0] if counted_T is None else counted_T.sum()
            self.probs_E += probs_TE.sum(0)
            if keep_Tk is not None:
                self.dropped += counts_E.sum() - keep_Tk.sum()
            for place, loss in enumerate(losses or ()):
                if loss is not None:
                    self.losses[place].add_(loss)
            return counts_E

    def packed(self) -> Tensor:
        """All sums in one fp64 vector [2E + 4] (counts are exact up to 2^53)."""
        return torch.cat(
            (
                self.counts_E.double(),
                self.probs_E,
                self.losses,
                torch.stack((self.dropped.double(), self.tokens.double())),
            )
        )


@torch.no_grad()
def gather_statistics(
    parts: Sequence[nn.Module],
    group: ProcessGroup | None = None,
    stages: ProcessGroup | None = None,
    *,
    reset: bool = True,
) -> dict[str, Tensor]:
    """The sums [2E + 4] of every router since they were last reset, by KIND/PATH of its layer, on the host.

    Resets them. One all-reduce over `group` (all ranks whose tokens make up a step, of one pipeline stage; every one of
    them has to call) and one transfer to the host, for all layers together. `parts` are what this rank has of the
    model, `stages` the ranks that have the rest of its layers. Layers that saw no token are left out.
    """
    layers = [
        (f"{module.kind}/{path.rpartition('.')[0]}", module)
        for part in parts
        for path, module in part.named_modules()
        if isinstance(module, LoadStatistics)
    ]
    packed: dict[str, Tensor] = {}
    if layers:
        flat = torch.cat([layer.packed() for _, layer in layers])
        if group is not None:
            dist.all_reduce(flat, group=group)
        sizes = [2 * layer.num_experts + 4 for _, layer in layers]
        packed = {path: values for (path, _), values in zip(layers, flat.cpu().split(sizes))}
        if reset:
            for _, layer in layers:
                layer.reset_buffers()
    if stages is not None:
        gathered: list[dict[str, Tensor]] = [{}] * stages.size()
        dist.all_gather_object(gathered, packed, group=stages)
        packed = {path: values for some in gathered for path, values in some.items()}
    return {path: packed[path] for path in sorted(packed, key=_in_order) if packed[path][-1] > 0}


def _in_order(path: str) -> list[int]:
    """The numbers in a path: layers as they follow one another."""
    return [int(part) for part in path.split(".") if part.isdigit()]


def expert_load(packed: dict[str, Tensor]) -> Tensor | None:
    """Assignments to every expert of every layer, [layers, E]; None without any."""
    counts = [values[: _experts(values)] for path, values in packed.items() if path.startswith("moe/")]
    return torch.stack(counts) if counts else None


def load_figures(packed: dict[str, Tensor], *, steps: int = 1) -> dict[str, float]:
    """The load figures of the sums of `gather_statistics`, as a flat dict; empty when there are none.

    Keys are `moe/FIGURE` for all layers with experts, `mom/FIGURE` for all with memories (the maximum of max_load and
    dropped, the minimum of min_load, the mean of entropy, the sum of the losses) and `moe/PATH/FIGURE`,
    `mom/PATH/FIGURE` for the layer at PATH:
    max_load, min_load: the busiest and idlest expert's assignments over the mean (1 is perfect balance);
    entropy: of the mean probabilities, in nats (log E is perfect balance); dropped: fraction of assignments over
    capacity; balance_loss, z_loss: as added to the training loss, coefficients included, mean of the `steps` collected.
    """
    by_kind: dict[str, list[dict[str, float]]] = {}
    result: dict[str, float] = {}
    for path, values in packed.items():
        figures = _figures(values)
        figures["balance_loss"] /= steps
        figures["z_loss"] /= steps
        by_kind.setdefault(path.partition("/")[0], []).append(figures)
        result.update({f"{path}/{name}": value for name, value in figures.items()})
    summary = {
        f"{kind}/{name}": float(over([figures[name] for figures in per_layer]))
        for kind, per_layer in by_kind.items()
        for name, over in _SUMMARY.items()
    }
    return summary | result


_SUMMARY = {
    "max_load": max,
    "min_load": min,
    "entropy": lambda values: sum(values) / len(values),
    "dropped": max,
    "balance_loss": sum,
    "z_loss": sum,
}
"""How the figures of several layers become one."""


def load_by_layer(figures: dict[str, float]) -> dict[str, list[float]]:
    """The busiest and idlest expert of every layer, over layers, of the figures of `load_figures`; empty without any.

    Keys are `moe/layers` (the layers' numbers), `moe/max_load_by_layer` and `moe/min_load_by_layer`, the same with
    `mom`. Loads are over the mean, in four digits.
    """
    result: dict[str, list[float]] = {}
    for key, value in figures.items():
        kind, _, rest = key.partition("/")
        path, slash, name = rest.rpartition("/")
        if slash and name in ("max_load", "min_load"):
            result.setdefault(f"{kind}/{name}_by_layer", []).append(float(f"{value:.4g}"))
            if name == "max_load":
                result.setdefault(f"{kind}/layers", []).extend(_in_order(path)[:1])
    return result


def collect_statistics(
    model: nn.Module, group: ProcessGroup | None = None, *, steps: int = 1, reset: bool = True
) -> dict[str, float]:
    """`load_figures` of a whole model's `gather_statistics`."""
    return load_figures(gather_statistics([model], group, reset=reset), steps=steps)


def _experts(packed: Tensor) -> int:
    return (packed.shape[0] - 4) // 2


def _figures(packed: Tensor) -> dict[str, float]:
    num_experts = _experts(packed)
    counts_E, probs_E, losses, rest = packed.split([num_experts, num_experts, 2, 2])
    assignments, tokens = counts_E.sum(), rest[1]
    mean_E = probs_E / tokens
    return {
        "max_load": (counts_E.max() * num_experts / assignments).item(),
        "min_load": (counts_E.min() * num_experts / assignments).item(),
        "entropy": torch.special.entr(mean_E).sum().item(),
        "dropped": (rest[0] / assignments).item(),
        "balance_loss": losses[0].item(),
        "z_loss": losses[1].item(),
    }
