"""Fixtures of the tests that run over several ranks."""

from collections.abc import Iterator

import pytest
from harness import RankPool


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPool]:
    """`ranks(n, fn, *args)` runs the top-level function `fn(rank, *args)` on n gloo ranks, see `harness`."""
    pool = RankPool()
    yield pool
    pool.close()
