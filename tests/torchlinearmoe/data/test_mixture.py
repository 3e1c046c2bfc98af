"""Mixtures: shares that hold at every step, an order that more steps do not change, sources gone through in epochs."""

from collections import Counter

import pytest

from torchlinearmoe.data import mixture
from torchlinearmoe.data.loader import build_loader
from torchlinearmoe.data.mixture import BLOCK, MixedOrder, MixedStream, quotas
from torchlinearmoe.errors import UserError


@pytest.mark.parametrize("weights", [[3, 1], [1.0], [0.2, 0.3, 0.5], [1, 1, 1], [1e6, 1, 1e-6], [5, 7, 11, 13, 1e-9]])
def test_quotas_are_the_weights_to_within_one_sample(weights):
    counts = quotas(weights)
    assert sum(counts) == BLOCK and min(counts) >= 1
    small = sum(weight / sum(weights) < 1 / BLOCK for weight in weights)
    assert all(abs(c - BLOCK * w / sum(weights)) <= 1 + small for c, w in zip(counts, weights))


@pytest.mark.parametrize("weights", [[3, 1], [0.2, 0.3, 0.5], [97, 2, 1]])
def test_every_stretch_of_a_run_has_the_shares_of_the_whole(weights, monkeypatch):
    order = MixedOrder("abc"[: len(weights)], [50] * len(weights), weights, seed=3, first=7)
    for start, stop in ((7, 107), (40, 300), (BLOCK - 90, BLOCK + 311)):
        seen = Counter(order[g] // 50 for g in range(start, stop))
        for source, weight in enumerate(weights):
            assert abs(seen[source] - (stop - start) * weight / sum(weights)) <= len(weights)
    counted = Counter(order[g] // 50 for g in range(7, BLOCK + 500))
    assert order.counts(BLOCK + 500) == [counted[source] for source in range(len(weights))]
    assert order.counts(7) == [0] * len(weights)


def test_every_source_is_gone_through_once_an_epoch_in_orders_of_its_own():
    order = MixedOrder("ab", [30, 30], [2, 1], seed=0)
    samples = [order[g] for g in range(270)]
    first, second = [s for s in samples if s < 30], [s - 30 for s in samples if s >= 30]
    epochs = [first[i : i + 30] for i in range(0, 180, 30)] + [second[i : i + 30] for i in range(0, 90, 30)]
    assert all(sorted(epoch) == list(range(30)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == len(epochs) == 9
    assert samples == [MixedOrder("ab", [30, 30], [4, 2], seed=0)[g] for g in range(270)], "weights are shares"
    assert samples != [MixedOrder("ab", [30, 30], [2, 1], seed=1)[g] for g in range(270)]
    figures = order.figures(270)
    assert figures == {"data/share/a": 2 / 3, "data/share/b": 1 / 3, "data/epochs/a": 6, "data/epochs/b": 3}


def mixed(make_stream):
    return MixedStream({"a": make_stream(["abcdefg"] * 40), "z": make_stream(["zyx"] * 20)}, [3, 1])


def test_batches_are_a_function_of_the_step_on_any_number_of_ranks(make_stream):
    stream = mixed(make_stream)

    def steps(ranks, start=0, stop=6):
        loaders = [
            build_loader(
                stream,
                sequence_length=8,
                micro_batch_size=1,
                samples_per_step=4,
                seed=5,
                rank=rank,
                ranks=ranks,
                start_step=start,
                stop_step=stop,
            )
            for rank in range(ranks)
        ]
        return [sorted(tuple(b.tokens.tolist()) for part in parts for b in part) for parts in zip(*loaders)], loaders[0]

    whole, loader = steps(1)
    assert steps(4)[0] == whole and steps(2, start=2)[0] == whole[2:] and steps(1, stop=9)[0][:6] == whole
    from_z = sum(23 in sample for step in whole for sample in step)
    assert from_z == 6 and loader.figures(6)["data/share/z"] == 0.25
    assert stream.note(8) == "data.sources: a 75.0% of 321 tokens, z 25.0% of 81 tokens"


def test_sources_are_read_one_after_the_other(make_stream):
    stream = mixed(make_stream)
    ids = stream.read(0, len(stream)).tolist()
    assert len(ids) == 402 and stream.read(300, 390).tolist() == ids[300:390] and stream.read(5, 5).tolist() == []
    assert stream.num_documents == 60
    samples = stream.samples(8)
    assert [samples[i].tokens.tolist() for i in (0, 40)] == [ids[:8], ids[321:329]]
    with pytest.raises(UserError, match="sequence_length = 100: the source 'z' of data.sources has only 81 tokens"):
        stream.samples(100)


def test_a_pattern_is_one_block_long(monkeypatch):
    monkeypatch.setattr(mixture, "BLOCK", 8)
    order = MixedOrder("ab", [1, 1], [3, 1], seed=0)
    assert [order[g] for g in range(16)] == [0, 0, 1, 0, 0, 0, 1, 0] * 2 and order.counts(16) == [12, 4]
