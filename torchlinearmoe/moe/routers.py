"""What the routers of a model keep between the steps of a run, for experts and memories, whoever trains it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn
from torch.distributed import ProcessGroup

from torchlinearmoe.moe.balance import counting_pass, forget_global_counts, needs_counting_pass, update_bias
from torchlinearmoe.moe.layer import MoE
from torchlinearmoe.moe.statistics import expert_load, gather_statistics, load_by_layer, load_figures


class Routers:
    """The routers of `parts`, what this rank has of the model `whole`.

    tokens: all ranks whose tokens make up a step, of one pipeline stage; stages: the ranks that have the rest of the
    layers. Every rank of them makes the same calls.
    """

    def __init__(
        self,
        whole: nn.Module,
        parts: Sequence[nn.Module],
        *,
        tokens: ProcessGroup | None = None,
        stages: ProcessGroup | None = None,
    ) -> None:
        self._modules = nn.ModuleList(parts)
        self._layers = [module for module in self._modules.modules() if isinstance(module, MoE)]
        self._parts, self._tokens, self._stages = parts, tokens, stages
        self._needs_counts = needs_counting_pass(whole)
        self._steps = 0

    def count_first(self, forward: Callable[[], object], micro_batches: int) -> None:
        """Call `forward`, a step's forwards, where a loss of the whole step has to know them all beforehand."""
        if micro_batches > 1 and self._needs_counts:
            with counting_pass(self._modules, self._tokens):
                forward()

    def end_step(self, skipped: Tensor) -> None:
        """Move the selection biases by the step's counts, unless `skipped` (0-dim) is 1, and forget these."""
        update_bias(self._layers, self._tokens, skipped)
        forget_global_counts(self._modules)
        self._steps += 1

    def figures(self) -> tuple[dict[str, float | list[float]], Tensor | None]:
        """The load figures, of all layers together and by layer, since the last call, and the assignments to experts
        [layers, E]."""
        packed = gather_statistics(self._parts, self._tokens, self._stages)
        figures = load_figures(packed, steps=max(self._steps, 1))
        self._steps = 0
        together = {key: value for key, value in figures.items() if key.count("/") == 1}
        return {**together, **load_by_layer(figures)}, expert_load(packed)
