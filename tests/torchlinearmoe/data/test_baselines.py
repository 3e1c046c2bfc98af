"""Counting models: real distributions, in the order they should have."""

import math
import random

import numpy as np
import pytest

from torchlinearmoe.data.baselines import DISCOUNTS, Bigram, baseline_losses, choose_discount
from torchlinearmoe.data.loader import build_validation_loader


def test_order_on_the_corpus_that_ships(corpus, tokenizer):
    losses = baseline_losses(corpus.train, corpus.validation, tokenizer.vocab_size)
    assert losses.uniform == pytest.approx(math.log(1024))
    assert losses.uniform - 1 > losses.unigram > losses.bigram + 1.5
    assert losses.bigram < 3.66, "at least as good as bucketed deleted interpolation"


@pytest.mark.parametrize("length", [256, 512])
def test_scored_are_the_labels_a_model_is_scored_on(corpus, tokenizer, length):
    losses = baseline_losses(corpus.train, corpus.validation, tokenizer.vocab_size, max_train_tokens=20_000)
    ids = corpus.train.read(0, 20_000)
    counts = np.bincount(ids[1:], minlength=1024) + 1
    log_p = np.log(counts / counts.sum())
    total = scored = 0
    for batch in build_validation_loader(corpus.validation, sequence_length=length, micro_batch_size=2):
        labels = batch.labels[batch.labels >= 0].numpy()
        total -= log_p[labels].sum()
        scored += batch.valid_tokens
    assert losses.tokens == scored
    assert losses.unigram == pytest.approx(total / scored)


@pytest.mark.parametrize("discount", [0.0, 0.3, 0.95, 1.0])
def test_bigram_probabilities_sum_to_one(discount):
    vocabulary = 11
    generator = np.random.default_rng(0)
    ids = generator.integers(0, 8, 60)  # ids 8, 9, 10 never occur
    bigram = Bigram.fit(ids[:-1], ids[1:], vocabulary, discount)
    every = np.arange(vocabulary)
    for context in range(vocabulary):
        p = bigram.probability(np.full(vocabulary, context), every)
        assert p.sum() == pytest.approx(1) and (p >= 0).all()
        assert discount == 0 or (p > 0).all()


def test_bigram_by_hand():
    """Of the pairs ab ab ac ba, D = 0.5: p(b | a) = (2 - 0.5) / 3 + 0.5 * 2 / 3 * p1(b), p1 = (2, 2, 2) / 6."""
    previous, label = np.array([0, 0, 0, 1]), np.array([1, 1, 2, 0])
    bigram = Bigram.fit(previous, label, 3, 0.5)
    assert bigram.probability(np.array([0, 0, 2]), np.array([1, 0, 1])) == pytest.approx(
        [1.5 / 3 + 1 / 3 / 3, 1 / 3 / 3, 1 / 3]
    )


def test_a_chain_is_learnt_to_its_entropy(make_stream):
    """a is followed by a with probability 0.9, b by b; the bigram model must find the chain's entropy."""
    generator = random.Random(0)

    def text(length):
        letters = ["a"]
        for _ in range(length):
            stay = generator.random() < 0.9
            letters.append(letters[-1] if stay else "ab"[letters[-1] == "a"])
        return "".join(letters)

    losses = baseline_losses(make_stream([text(100_000)]), make_stream([text(50_000)]), 27)
    assert losses.bigram == pytest.approx(-0.9 * math.log(0.9) - 0.1 * math.log(0.1), abs=0.01)
    assert losses.unigram == pytest.approx(math.log(2), abs=0.02)


def test_the_discount_fits_the_text():
    """A walk where every pair is seen often wants none; text full of pairs seen once wants much."""
    generator = np.random.default_rng(0)
    assert choose_discount(generator.integers(0, 2, 50_000), 2) == DISCOUNTS[0]
    assert choose_discount(generator.integers(0, 2000, 50_000), 2000) == DISCOUNTS[-1]


def test_splits_must_hold_something(corpus, make_stream, tmp_path, letters):
    from torchlinearmoe.data.splits import open_splits

    make_stream(["abc"])
    nothing = open_splits([tmp_path / "stream-1"], tokenizer=letters, validation_fraction=0).validation
    with pytest.raises(ValueError, match="data.validation_fraction above 0"):
        baseline_losses(corpus.train, nothing, 27)
