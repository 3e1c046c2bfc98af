"""The order of samples: a shuffle without memory is still a shuffle."""

import pytest

from torchlinearmoe.data.order import Permutation, SampleOrder


@pytest.mark.parametrize("n", [*range(1, 30), 97, 256, 257, 1000, 4097])
def test_every_sample_once_an_epoch(n):
    permutation = Permutation(n, (n * 7919, 3))
    assert sorted(permutation(x) for x in range(n)) == list(range(n))


def test_billions_are_reached_without_memory():
    n = 3_000_000_019
    permutation = Permutation(n, (11, 5))
    images = [permutation(x) for x in range(2000)]
    assert len(set(images)) == 2000
    assert 0 <= min(images) < n / 100 and n * 0.99 < max(images) < n


def test_epochs_and_seeds_shuffle_differently():
    n = 500
    orders = {
        (seed, epoch): [Permutation(n, (seed, epoch))(x) for x in range(n)] for seed in (0, 1) for epoch in (0, 1)
    }
    lists = [*orders.values(), list(range(n))]
    for i, one in enumerate(lists):
        for other in lists[:i]:
            # Two random orders of n agree in one place on average.
            assert sum(a == b for a, b in zip(one, other)) < 10


def test_every_sample_is_as_likely_at_every_place():
    n, draws = 5, 4000
    counts = [[0] * n for _ in range(n)]
    for seed in range(draws):
        permutation = Permutation(n, (seed, 0))
        for x in range(n):
            counts[x][permutation(x)] += 1
    expected = draws / n
    chi_square = sum((count - expected) ** 2 / expected for row in counts for count in row)
    assert chi_square < 60, chi_square  # 16 degrees of freedom; a random order gives about 16


def test_the_order_is_fixed_for_good():
    """Changing it would make old checkpoints go on with other samples."""
    assert [Permutation(10, (0, 0))(x) for x in range(10)] == [8, 9, 1, 6, 7, 3, 0, 2, 5, 4]


@pytest.mark.parametrize("seed", [0, 1, 1234567])
def test_sample_order_goes_epoch_by_epoch_and_back(seed):
    order = SampleOrder(7, seed)
    forward = [order[g] for g in range(21)]
    for epoch in range(3):
        assert sorted(forward[7 * epoch : 7 * epoch + 7]) == list(range(7))
    assert [order[g] for g in reversed(range(21))] == forward[::-1]


def test_outside_and_empty_are_refused():
    with pytest.raises(IndexError, match="outside 0 .. 4"):
        Permutation(5, (0,))(5)
    with pytest.raises(ValueError, match="0 elements"):
        Permutation(0, (0,))
