"""Context parallelism: the ranks of a group share their sequences, each has one contiguous span of every packed row.

The loader gives all of them the same micro-batches; each cuts its spans out. Labels and document borders were made
before, on whole rows. Mixers exchange what passes from span to span (`mixers/spanned.py`, `mixers/attention.py` and
`exchange/tails.py`); all else in the model sees one token at a time.

Where no document crosses from one rank to the next, nothing is exchanged: what is left is data parallelism.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

from torchlinearmoe.data.packing import IGNORED, MicroBatch
from torchlinearmoe.documents import Documents
from torchlinearmoe.parallel.mesh import Meshes
from torchlinearmoe.recipe.schema import ParallelRecipe
from torchlinearmoe.spans import Exchange, cut_spans


@dataclass(frozen=True, eq=False, kw_only=True)
class SpanBatch(MicroBatch):
    """This rank's spans of a micro-batch, one after the other; `cu_seqlens` are the borders of the whole rows."""

    group: dist.ProcessGroup
    exchange: Exchange

    def documents(self, device: torch.device | str = "cpu") -> Documents:
        """The pieces of documents in the spans, and how they go on over the ranks."""
        spans = cut_spans(self.cu_seqlens, self.row_length * self.group.size(), self.group, device, self.exchange)
        return Documents.packed(
            spans.borders, self.row_length, device, spans if spans.crossed else None, filled=self.filled
        )


def own_spans(batch: MicroBatch, group: dist.ProcessGroup, exchange: Exchange | None = None) -> SpanBatch:
    """This rank's spans of `batch`, equal on all ranks of `group`, which must divide its rows."""
    rank, ranks = group.rank(), group.size()
    tokens, labels = (
        x.view(-1, ranks, batch.row_length // ranks)[:, rank].flatten() for x in (batch.tokens, batch.labels)
    )
    length = batch.row_length // ranks
    filled = batch.filled and tuple(min(max(count - rank * length, 0), length) for count in batch.filled)
    return SpanBatch(
        tokens=tokens,
        labels=labels,
        cu_seqlens=batch.cu_seqlens,
        row_length=length,
        valid_tokens=int((labels != IGNORED).sum()),
        filled=filled,
        group=group,
        exchange=exchange or Exchange(),
    )


def own_part(batch: MicroBatch, meshes: Meshes, parallel: ParallelRecipe) -> MicroBatch:
    """What this rank computes of its data rank's micro-batch."""
    return batch if meshes.degrees.context == 1 else own_spans(batch, meshes.context_group, exchange_of(parallel))


def exchange_of(parallel: ParallelRecipe) -> Exchange:
    """The recipe's choices."""
    states = {"float32": None, "bfloat16": torch.bfloat16}[parallel.context_states]
    return Exchange(states=states, attention=parallel.context_attention)
