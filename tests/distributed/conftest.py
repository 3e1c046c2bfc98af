"""Fixtures of the tests that run over several ranks."""

import pickle
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from harness import RankError, RankPool

# The cases of the mixer tests, which find every registered mixer by themselves.
sys.path.append(str(Path(__file__).parents[1] / "torchlinearmoe" / "mixers"))


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPool]:
    """`ranks(n, fn, *args)` runs the top-level function `fn(rank, *args)` on n gloo ranks, see `harness`."""
    pool = RankPool()
    yield pool
    pool.close()


@pytest.fixture(scope="module")
def once(ranks: RankPool) -> Callable[..., list[Any]]:
    """`once(n, fn, *args)` is `ranks(n, fn, *args)`, made by the first test that asks; its failure is every asker's."""
    answers: dict[bytes, list[Any] | RankError] = {}

    def ask(world_size: int, fn: Callable[..., Any], *args: Any, timeout: float | None = None) -> list[Any]:
        key = pickle.dumps((world_size, fn, args))
        if key not in answers:
            try:
                answers[key] = ranks(world_size, fn, *args, timeout=timeout)
            except RankError as error:
                answers[key] = error
        answer = answers[key]
        if isinstance(answer, RankError):
            raise answer
        return answer

    return ask


@pytest.fixture
def selected(request: pytest.FixtureRequest) -> list[str]:
    """The values of the parameter `mixer` for which this test is to run, its other parameters being the same.

    A test of one mixer asks the ranks for all of these at once: a call of its own for each would cost more than what
    it computes, and `-k` still chooses what is computed.
    """

    def others(item: Any) -> dict[str, Any]:
        return {name: value for name, value in item.callspec.params.items() if name != "mixer"}

    own: Any = request.node
    tests: list[Any] = [item for item in request.session.items if item.parent is own.parent]
    same = [item for item in tests if item.originalname == own.originalname and others(item) == others(own)]
    return [item.callspec.params["mixer"] for item in same]
