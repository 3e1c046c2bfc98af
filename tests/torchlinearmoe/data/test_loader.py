"""The loader: the same samples on any number of ranks and workers, from any step on."""

from itertools import islice
from typing import Any

import pytest
import torch

from torchlinearmoe.data.loader import build_loader, build_validation_loader
from torchlinearmoe.data.packing import IGNORED

L = 32
SIZES: Any = {"sequence_length": L, "samples_per_step": 8, "seed": 3}


def rows(batch):
    """A micro-batch as a list of (inputs, labels) of its samples."""
    return list(zip(batch.tokens.view(-1, batch.row_length).tolist(), batch.labels.view(-1, batch.row_length).tolist()))


def step_rows(loaders, steps):
    """The samples of each step over all ranks, in global order: accumulation, then rank, then row."""
    out = []
    for parts in islice(zip(*loaders), steps):
        out.append([row for batches in zip(*parts) for batch in batches for row in rows(batch)])
    return out


@pytest.mark.parametrize("workers", [0, 2])
def test_a_step_is_the_same_on_any_number_of_ranks(corpus, workers):
    reference = step_rows([build_loader(corpus.train, **SIZES, micro_batch_size=1)], 3)
    assert all(len(step) == 8 for step in reference)
    for ranks in (1, 2, 4):
        loaders = [
            build_loader(corpus.train, **SIZES, micro_batch_size=2, rank=r, ranks=ranks, workers=workers)
            for r in range(ranks)
        ]
        assert all(loader.accumulation == 4 // ranks for loader in loaders)
        assert step_rows(loaders, 3) == reference


def test_an_epoch_is_every_sample_once(make_stream):
    torch.manual_seed(0)
    stream = make_stream(["".join(chr(97 + int(c)) for c in torch.randint(0, 26, (200,))) for _ in range(4)])
    loader = build_loader(stream, sequence_length=10, micro_batch_size=4, samples_per_step=4, seed=0)
    samples = [row for step in islice(loader, 40) for batch in step for row in rows(batch)]
    ids = stream.read(0, len(stream)).tolist()
    n = (len(ids) - 1) // 10
    every = sorted((ids[10 * i : 10 * i + 10], ids[10 * i + 1 : 10 * i + 11]) for i in range(n))
    assert n == 80 and sorted(samples[:n]) == sorted(samples[n:]) == every
    assert samples[:n] != samples[n:] != every


@pytest.mark.parametrize("workers", [0, 2])
def test_resumed_goes_on_as_if_uninterrupted(corpus, workers):
    whole = step_rows([build_loader(corpus.train, **SIZES, micro_batch_size=2)], 7)
    first = build_loader(corpus.train, **SIZES, micro_batch_size=4, workers=workers)
    begun = step_rows([first], 3)
    state = first.state_dict()
    assert state == {"next_step": 3}, "read ahead by workers does not count"
    loaded = [build_loader(corpus.train, **SIZES, micro_batch_size=2, rank=r, ranks=2, workers=workers) for r in (0, 1)]
    for loader in loaded:
        loader.load_state_dict(state)
    assert begun + step_rows(loaded, 4) == whole
    started = build_loader(corpus.train, **SIZES, micro_batch_size=1, start_step=3, workers=2 - workers)
    assert begun + step_rows([started], 4) == whole


@pytest.mark.parametrize("workers", [0, 2])
def test_stop_step_ends_the_run(corpus, workers):
    loader = build_loader(corpus.train, **SIZES, micro_batch_size=2, start_step=2, stop_step=5, workers=workers)
    assert [len(step) for step in loader] == [4, 4, 4]
    assert loader.next_step == 5 and list(loader) == []


def test_seeds_give_other_samples(corpus):
    steps = [
        step_rows([build_loader(corpus.train, sequence_length=L, samples_per_step=8, micro_batch_size=8, seed=s)], 1)
        for s in (0, 1)
    ]
    assert steps[0] != steps[1]


@pytest.mark.parametrize(
    ("ranks", "m", "length", "workers"),
    [(1, 1, 64, 0), (2, 3, 64, 0), (3, 2, 500, 0), (4, 4, 5000, 0), (1, 1, 64, 2), (2, 3, 64, 2)],
)
def test_validation_scores_every_label_once(corpus, ranks, m, length, workers):
    stream = corpus.validation
    loaders = [
        build_validation_loader(
            stream, sequence_length=length, micro_batch_size=m, rank=r, ranks=ranks, workers=workers
        )
        for r in range(ranks)
    ]
    parts = [list(loader) for loader in loaders]
    assert len({len(part) for part in parts}) == 1 and len(parts[0]) == len(loaders[0]) > 0
    assert all(batch.num_sequences == m and batch.row_length == length for part in parts for batch in part)
    labels = torch.cat([batch.labels for batches in zip(*parts) for batch in batches])
    valid = labels != IGNORED
    assert labels[valid].tolist() == stream.read(1, len(stream)).tolist()
    assert sum(batch.valid_tokens for part in parts for batch in part) == len(stream) - 1
    again = [batch.labels.tolist() for batch in loaders[0]]
    assert again == [batch.labels.tolist() for batch in parts[0]]


def test_ranks_without_samples_get_ignored_batches(make_stream):
    stream = make_stream(["abc"])
    batches = [
        list(build_validation_loader(stream, sequence_length=4, micro_batch_size=1, rank=r, ranks=3)) for r in range(3)
    ]
    assert [[batch.valid_tokens for batch in part] for part in batches] == [[4], [0], [0]]
    assert batches[2][0].cu_seqlens == [0, 4] and batches[2][0].labels.tolist() == [IGNORED] * 4


def test_impossible_sizes_are_refused(corpus, make_stream):
    with pytest.raises(ValueError, match=r"tokens_per_step = 256: must be a multiple of .* = 32 \* 3 \* 1"):
        build_loader(corpus.train, **SIZES, micro_batch_size=3)
    with pytest.raises(ValueError, match="training.tokens_per_step"):
        build_loader(corpus.train, **SIZES, micro_batch_size=8, ranks=2)
    with pytest.raises(ValueError, match="training.sequence_length = 5: the training text has only 5 tokens"):
        build_loader(make_stream(["abc"]), sequence_length=5, micro_batch_size=1, samples_per_step=1, seed=0)


@pytest.mark.gpu
@pytest.mark.parametrize("workers", [0, 2])
def test_pinned_batches_reach_the_gpu(corpus, workers):
    plain = build_loader(corpus.train, **SIZES, micro_batch_size=4)
    pinned = build_loader(corpus.train, **SIZES, micro_batch_size=4, workers=workers, pin_memory=True)
    for expected, step in islice(zip(plain, pinned), 3):
        assert all(batch.tokens.is_pinned() and batch.labels.is_pinned() for batch in step)
        assert [rows(batch.to("cuda")) for batch in step] == [rows(batch) for batch in expected]
        assert [batch.cu_seqlens for batch in step] == [batch.cu_seqlens for batch in expected]
