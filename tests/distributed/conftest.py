"""Fixtures of the tests that run over several ranks."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness import RankPool

# The cases of the mixer tests, which find every registered mixer by themselves.
sys.path.append(str(Path(__file__).parents[1] / "torchlinearmoe" / "mixers"))


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPool]:
    """`ranks(n, fn, *args)` runs the top-level function `fn(rank, *args)` on n gloo ranks, see `harness`."""
    pool = RankPool()
    yield pool
    pool.close()
