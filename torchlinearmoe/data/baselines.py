"""What counting scores: held-out loss of a uniform, a unigram and a bigram model.

A trained model should pass them in this order; one that does not pass the bigram model has not learned to look further
back than one token. Losses are in nats per token over every label of the held-out stream. These are the labels a model
is evaluated on, and label j is conditioned on id j - 1, the model's input at that place, so the figures do not depend
on the length of samples.

The bigram model is interpolated Kneser-Ney (Kneser and Ney, 1995; the interpolated form of Chen and Goodman, "An
Empirical Study of Smoothing Techniques for Language Modeling", 1998):

    p(w | v) = (c(v, w) - D)+ / c(v)  +  D n(v) / c(v) * p1(w)        n(v): different successors of v
    p1(w)    = (m(w) + 1) / sum over u of (m(u) + 1)                  m(w): different predecessors of w

c counts the training split. The discount D is the one that predicts best a tenth of the training split from the other
nine; the held-out split has no say in it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from torchlinearmoe.data.splits import TokenStream
from torchlinearmoe.errors import UserError

DISCOUNTS = tuple(np.arange(0.05, 1.0, 0.05).round(2).tolist())
BLOCK = 1024
"""Of every ten blocks of so many training tokens, the last is kept aside while the discount is chosen."""
READ = 1 << 20
"""Held-out tokens scored at once."""


@dataclass(frozen=True)
class Baselines:
    """Held-out losses in nats per token."""

    uniform: float
    unigram: float
    bigram: float
    tokens: int
    """Labels they are averaged over."""


def baseline_losses(
    train: TokenStream, validation: TokenStream, vocab_size: int, max_train_tokens: int = 20_000_000
) -> Baselines:
    """The three losses on `validation`, counted on the first `max_train_tokens` ids of `train`.

    `vocab_size` is the tokenizer's; the unigram model is smoothed by adding one. Raises UserError on an empty split.
    """
    if min(len(train), len(validation)) < 2:
        raise UserError("baselines need a training and a held-out split; set data.validation_fraction above 0")
    ids = train.read(0, min(len(train), max_train_tokens))
    unigram_W = np.bincount(ids[1:], minlength=vocab_size) + 1.0
    unigram_W /= unigram_W.sum()
    bigram = Bigram.fit(ids[:-1], ids[1:], vocab_size, choose_discount(ids, vocab_size))
    unigram_loss = bigram_loss = 0.0
    for previous, label in _pairs(validation):
        unigram_loss -= float(np.log(unigram_W[label]).sum())
        bigram_loss -= float(np.log(bigram.probability(previous, label)).sum())
    tokens = len(validation) - 1
    return Baselines(float(np.log(vocab_size)), unigram_loss / tokens, bigram_loss / tokens, tokens)


@dataclass(frozen=True)
class Bigram:
    """Interpolated Kneser-Ney over pairs of ids. W: the vocabulary, P: the different pairs seen."""

    vocab_size: int
    discount: float
    pairs_P: np.ndarray
    """int64: v * vocab_size + w, increasing."""
    counts_P: np.ndarray
    context_counts_W: np.ndarray
    """c(v)"""
    successors_W: np.ndarray
    """n(v)"""
    unigram_W: np.ndarray
    """p1(w)"""

    @classmethod
    def fit(cls, previous: np.ndarray, label: np.ndarray, vocab_size: int, discount: float) -> Bigram:
        """Counts the pairs (previous[i], label[i]), both int64 [T]; 0 <= discount <= 1."""
        pairs_P, counts_P = np.unique(previous * vocab_size + label, return_counts=True)
        predecessors_W = np.bincount(pairs_P % vocab_size, minlength=vocab_size) + 1.0
        return cls(
            vocab_size=vocab_size,
            discount=discount,
            pairs_P=pairs_P,
            counts_P=counts_P,
            context_counts_W=np.bincount(previous, minlength=vocab_size),
            successors_W=np.bincount(pairs_P // vocab_size, minlength=vocab_size),
            unigram_W=predecessors_W / predecessors_W.sum(),
        )

    def probability(self, previous: np.ndarray, label: np.ndarray) -> np.ndarray:
        """float64 [T]: p(label[i] | previous[i]). After an id never followed by anything it is p1."""
        pairs = previous * self.vocab_size + label
        place = np.minimum(np.searchsorted(self.pairs_P, pairs), len(self.pairs_P) - 1)
        count = np.where(self.pairs_P[place] == pairs, self.counts_P[place], 0)
        total = self.context_counts_W[previous]
        taken = np.where(total > 0, self.discount * self.successors_W[previous], 1.0)
        total = np.maximum(total, 1)
        return np.maximum(count - self.discount, 0.0) / total + taken / total * self.unigram_W[label]


def choose_discount(ids: np.ndarray, vocab_size: int) -> float:
    """The discount with which nine tenths of `ids` (int64 [T], one text) predict the tenth kept aside best."""
    previous, label = ids[:-1], ids[1:]
    aside = np.arange(len(label)) // BLOCK % 10 == 9
    if not aside.any():
        return 0.75  # too little text to choose
    kept = Bigram.fit(previous[~aside], label[~aside], vocab_size, 0.0)

    def loss(discount: float) -> float:
        bigram = Bigram(**{**vars(kept), "discount": discount})
        return -float(np.log(bigram.probability(previous[aside], label[aside])).mean())

    return min(DISCOUNTS, key=loss)


def _pairs(stream: TokenStream) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(input, label) of every label of the stream, READ at a time."""
    for start in range(0, len(stream) - 1, READ):
        ids = stream.read(start, min(start + READ + 1, len(stream)))
        yield ids[:-1], ids[1:]
