"""Fixtures of the tests that run over several ranks, and the table that the matrix of layouts fills."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness import RankPool
from matrix_table import Table

# The cases of the mixer tests, which find every registered mixer by themselves.
sys.path.append(str(Path(__file__).parents[1] / "torchlinearmoe" / "mixers"))

TABLE = pytest.StashKey[Table]()


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPool]:
    """`ranks(n, fn, *args)` runs the top-level function `fn(rank, *args)` on n gloo ranks, see `harness`."""
    pool = RankPool()
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def table(request: pytest.FixtureRequest) -> Table:
    """Printed at the end of the session."""
    return request.config.stash.setdefault(TABLE, Table())


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if TABLE in config.stash:
        terminalreporter.section("largest relative errors: of losses and first gradients, of last gradients")
        for line in config.stash[TABLE].lines():
            terminalreporter.line(line)
