"""Packed documents as other people's kernels want them.

Ours read document ids or borders on the device, whatever their number. Theirs read borders on the device and on the
host, whose copy waits for the device; so borders are looked up once for each tensor that names them, and all layers of
a forward and its backward share the answer. Documents of one length become plain rows, which need no borders at all.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.weak import WeakTensorKeyDictionary

from torchlinearmoe.kernels.backends.call import States


@dataclass(frozen=True)
class Borders:
    """The documents of one packed row; those without tokens are left out, because not every kernel takes them."""

    lengths: tuple[int, ...]
    """Tokens of each document that has any."""
    cu_seqlens: Tensor
    """int64 [N' + 1] on the device, N' documents with tokens."""
    cu_seqlens_host: Tensor
    kept: Tensor | None
    """int64 [N']: their places among all N documents; None when all have tokens."""
    count: int
    """N."""

    @property
    def even(self) -> bool:
        """All documents have one length."""
        return len(set(self.lengths)) == 1

    def rows(self, x: Tensor) -> Tensor:
        """[1, T, ...] to [N', L, ...], L the longest document, zeros after the shorter ones."""
        if self.even:
            return x[0].unflatten(0, (len(self.lengths), self.lengths[0]))
        return torch.nn.utils.rnn.pad_sequence(list(x[0].split(list(self.lengths))), batch_first=True)

    def flat(self, x: Tensor) -> Tensor:
        """The inverse of `rows`."""
        if self.even:
            return x.flatten(0, 1)[None]
        return torch.cat([row[:length] for row, length in zip(x, self.lengths)])[None]

    def select(self, state: Tensor) -> Tensor:
        """States of all documents, [N, ...], to those of the documents with tokens."""
        return state if self.kept is None else state.index_select(0, self.kept)

    def restore(self, final: Tensor, initial: Tensor | None) -> Tensor:
        """The inverse of `select`: a document without tokens ends with the state it started with."""
        if self.kept is None:
            return final
        before = final.new_zeros(self.count, *final.shape[1:]) if initial is None else initial.to(final.dtype)
        return before.index_copy(0, self.kept, final)


_known = WeakTensorKeyDictionary()


def find_borders(states: States) -> Borders | None:
    """The borders that a call names by `cu_seqlens` or by `document_ids`; None for plain rows."""
    source = states.document_ids if states.cu_seqlens is None else states.cu_seqlens
    if source is None:
        return None
    # A buffer that is written again in place names other borders; tensors of inference mode do not tell.
    version = None if source.is_inference() else source._version
    known = _known.get(source)
    if known is not None and version is not None and known[0] == version:
        return known[1]
    if states.cu_seqlens is None:
        lengths = torch.unique_consecutive(source, return_counts=True)[1].tolist()
    else:
        lengths = source.diff().tolist()
    borders = make_borders(lengths, source.device)
    _known[source] = (version, borders)
    return borders


def make_borders(lengths: list[int], device: torch.device) -> Borders:
    """Borders of documents of `lengths` tokens, in tensors of their own."""
    filled = [length for length in lengths if length]
    host = F.pad(torch.tensor(filled, dtype=torch.int64, device="cpu").cumsum(0), (1, 0))
    kept = None
    if len(filled) < len(lengths):
        kept = torch.tensor([n for n, length in enumerate(lengths) if length], dtype=torch.int64, device=device)
    return Borders(tuple(filled), host.to(device), host, kept, len(lengths))
