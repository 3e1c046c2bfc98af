"""Batches of unequal sequences under a mask, padding anywhere, through a decoder that knows packed documents.

    tokens   . . a b      mask   0 0 1 1      packed   a b | c d e f
             c d e f             1 1 1 1

Shapes: B sequences, T tokens, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from torchlinearmoe.documents import Documents
from torchlinearmoe.models.decoder import Decoder, DecodeState


def forward_masked(model: Decoder, tokens: Tensor, mask: Tensor | None) -> Tensor:
    """Logits [B, T, V] of int64 [B, T], or of embeddings [B, T, D]; each sequence by itself.

    Zero where `mask` [B, T] is.
    """
    if mask is None or bool(mask.all()):
        return model(tokens)
    valid = mask.bool()
    lengths = [count for count in valid.sum(1).tolist() if count]
    documents = Documents.prompts(lengths, tokens.device)
    return spread(model(tokens[valid], documents=documents), valid)


def prefill_masked(
    model: Decoder, tokens: Tensor, mask: Tensor | None, state: DecodeState
) -> tuple[Tensor, DecodeState]:
    """The same going on from `state`; returns the state after each sequence's last token too."""
    if mask is None or bool(mask.all()):
        return model.prefill(tokens, state)
    valid = mask.bool()
    lengths = valid.sum(1).tolist()
    order = valid.int().argsort(dim=1, descending=True, stable=True)
    rows = torch.arange(tokens.shape[0], device=tokens.device)[:, None]
    logits, state = model.prefill(tokens[rows, order], state, lengths)
    front = torch.arange(tokens.shape[1], device=tokens.device) < valid.sum(1, keepdim=True)
    return spread(logits[front], valid), state


def spread(logits: Tensor, valid: Tensor) -> Tensor:
    """What there is of the valid tokens, row after row, back to where they stood; zero elsewhere."""
    out = logits.new_zeros(*valid.shape, logits.shape[-1])
    out[valid] = logits
    return out
