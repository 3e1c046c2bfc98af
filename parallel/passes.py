"""Micro-batches through a model: one after the other, or through a pipeline.

Both forms give the same: after `forward_backward` the gradients of the whole step are reduced and wait for the
optimizer, and every rank of a pipeline knows the loss.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleInterleaved1F1B,
    ScheduleZBVZeroBubble,
)
from torch.torch_version import TorchVersion

from torchlinearmoe.data.packing import IGNORED
from torchlinearmoe.models.decoder import Decoder
from torchlinearmoe.optim.sums import GradientSums, start_sums
from torchlinearmoe.parallel.fsdp import set_gradient_sync
from torchlinearmoe.parallel.inputs import Inputs
from torchlinearmoe.parallel.mesh import Meshes
from torchlinearmoe.parallel.pipeline import micro_batches, num_stages, passed_between
from torchlinearmoe.parallel.stage import Stage
from torchlinearmoe.recipe.schema import Recipe

logger = logging.getLogger(__name__)

# Older ones add up the gradients of all outputs of an operation before they go on to the weights, and fail at a
# `torch.autograd.Function`.
SPLITS_BACKWARDS = TorchVersion(torch.__version__) >= "2.13"


class Passes(Protocol):
    """How a step's micro-batches go through the parts of the model that this rank has."""

    @property
    def parts(self) -> Sequence[Decoder]: ...

    def forward_backward(self, batches: list[Inputs], tokens: Tensor) -> Tensor:
        """Add the gradients of summed loss / `tokens` over all batches; returns this rank's summed loss, float64."""
        ...

    def forward(self, batches: Iterable[Inputs]) -> Tensor:
        """Summed loss of all batches on this rank, float64, without gradients."""
        ...


class Loop:
    """The whole model on every rank: one micro-batch after the other."""

    def __init__(self, model: Decoder) -> None:
        self.model = model
        self.parts = [model]
        self.sums = GradientSums(model)

    def forward_backward(self, batches: list[Inputs], tokens: Tensor) -> Tensor:
        total = _zero(tokens.device)
        with self.sums.over(len(batches)):
            for index, batch in enumerate(batches):
                set_gradient_sync(self.model, index == len(batches) - 1)
                loss = self.loss(batch)
                (loss / tokens.to(loss.dtype)).backward()
                self.sums.collect()
                total += loss.detach()
        return total

    @torch.no_grad()
    def forward(self, batches: Iterable[Inputs]) -> Tensor:
        total = _zero(self.model.embed.weight.device)
        for batch in batches:
            total += self.loss(batch)
        return total

    def loss(self, batch: Inputs) -> Tensor:
        """Summed loss of a batch."""
        return self.model(batch.tokens, labels=batch.labels, documents=batch.documents, totals=batch.totals)


class Pipeline:
    """Stages on several ranks, run in the order of the recipe's schedule.

    Every rank of the pipeline calls the same methods with the same batches.
    """

    def __init__(self, stages: list[Stage], recipe: Recipe, meshes: Meshes, device: torch.device, dtype: torch.dtype):
        self.micro_batches = micro_batches(recipe, meshes.degrees)
        self.parts = stages
        self.device, self.group = device, meshes.pipeline_group
        self.sums: list[Tensor] = []
        self.tokens = torch.ones((), device=device)
        count = num_stages(recipe.parallel)
        runners = [_Runner(stage, count, recipe, self.group, device, dtype) for stage in stages]
        options: dict[str, Any] = {"loss_fn": self._loss, "scale_grads": False}
        schedule = recipe.parallel.pipeline_schedule
        if schedule == "1f1b":
            (runner,) = runners
            self.schedule = Schedule1F1B(runner, self.micro_batches, **options)
        else:
            kind = ScheduleInterleaved1F1B if schedule == "interleaved" else ScheduleZBVZeroBubble
            if schedule == "zero_bubble" and not SPLITS_BACKWARDS:
                logger.warning(
                    "parallel.pipeline_schedule = 'zero_bubble': torch %s cannot split a backward, the gradients of "
                    "weights are computed with those of inputs; torch 2.13 splits it",
                    torch.__version__,
                )
            self.schedule = kind(list(runners), self.micro_batches, **options)

    def forward_backward(self, batches: list[Inputs], tokens: Tensor) -> Tensor:
        self.tokens = tokens
        if len(batches) > 1:
            for stage in self.parts:
                start_sums(stage)
        return self._run(self.schedule.step, batches)

    @torch.no_grad()
    def forward(self, batches: Iterable[Inputs]) -> Tensor:
        total = _zero(self.device)
        for some in _chunks(batches, self.micro_batches):
            # A schedule runs as many micro-batches as it was made for: the last ones again, with nothing to predict.
            blank = replace(some[-1], labels=torch.full_like(some[-1].labels, IGNORED))
            total += self._run(self.schedule.eval, some + [blank] * (self.micro_batches - len(some)))
        return total

    def _run(self, run: Any, batches: list[Inputs]) -> Tensor:
        """Run the schedule on exactly as many micro-batches as it has; the summed loss, on all stages."""
        assert len(batches) == self.micro_batches
        for stage in self.parts:
            stage.table = batches
        run(target=torch.arange(self.micro_batches), return_outputs=False)
        total = _zero(self.device)
        for loss in self.sums:
            total += loss
        self.sums.clear()
        for stage in self.parts:
            stage.table = ()
        dist.all_reduce(total, group=self.group)
        return total

    def _loss(self, loss: Tensor, micro_batch: Tensor) -> Tensor:
        self.sums.append(loss.detach().clone())
        return loss / self.tokens.to(loss.dtype)


class _Runner(PipelineStage):
    """Torch's runner of a stage, which tells the stage its micro-batch."""

    def __init__(
        self,
        stage: Stage,
        count: int,
        recipe: Recipe,
        group: dist.ProcessGroup,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        passed_in = () if stage.holds_first else passed_between(recipe, stage.span.start, dtype)
        passed_out = (
            (torch.empty((), dtype=torch.promote_types(dtype, torch.float32), device="meta"),)
            if stage.holds_last
            else passed_between(recipe, stage.span.stop, dtype)
        )
        super().__init__(
            stage,
            stage.index,
            count,
            device,
            input_args=passed_in,
            output_args=passed_out,
            group=group,
            dw_builder=None if SPLITS_BACKWARDS else _nothing_left,
        )
        self.stage = stage

    def forward_one_chunk(self, fwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        self.stage.micro_batch = fwd_chunk_id
        if self.has_backward and not self.is_first:
            # If the first run was without gradients, torch 2.11 receives into buffers without any ever after.
            for received in self.args_recv_info[fwd_chunk_id]:
                buffer = getattr(received, "buffer", None)
                if buffer is not None and buffer.is_floating_point():
                    buffer.requires_grad_(True)
        return super().forward_one_chunk(fwd_chunk_id, *args, **kwargs)

    def perform_reduce_grad(self, grad_scale_factor: int) -> None:
        self.stage.backward_shared()
        super().perform_reduce_grad(grad_scale_factor)

    def _get_init_p2p_neighbors_ops(self) -> list[dist.P2POp]:
        # Two stages of one rank need no connection; gloo has none to itself, and torch 2.11 asks for it.
        return [op for op in super()._get_init_p2p_neighbors_ops() if op.peer != dist.get_rank()]

    # Between two stages of one rank torch hands gradients over in a run without any, too.
    def get_local_bwd_output(self, mb_index: int) -> Any:
        return super().get_local_bwd_output(mb_index) if self.has_backward else ()

    def set_local_bwd_input(self, next_stage_bwd_outputs: Any, mb_index: int) -> None:
        if self.has_backward:
            super().set_local_bwd_input(next_stage_bwd_outputs, mb_index)


def _nothing_left() -> Callable[[], None]:
    """What remains of a micro-batch's backward for the weights once all of it has run with the inputs."""
    return lambda: None


def _zero(device: torch.device) -> Tensor:
    return torch.zeros((), dtype=torch.float64, device=device)


def _chunks(batches: Iterable[Inputs], size: int) -> Iterator[list[Inputs]]:
    iterator = iter(batches)
    while chunk := list(islice(iterator, size)):
        yield chunk
