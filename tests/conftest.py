"""Fixtures of all tests, and how workers share them."""

import importlib
import math
import os
from typing import Any

import pytest

pytest_plugins = ["matrix_table"]


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Several workers for all the tests, or all slow ones; none for chosen ones, a GPU, or the matrix, whose ranks
    fill a machine alone."""
    chosen, marks = config.args_source != pytest.Config.ArgsSource.TESTPATHS, config.option.markexpr
    if chosen or not (marks == "slow" or marks.startswith("not ")):
        config.option.dist = "no"
        return 0
    if marks == "slow":
        config.option.dist = "load"  # few, long, and most of them in one file
    return max(2, min(4, (os.cpu_count() or 1) // 4))


def pytest_xdist_setupnodes() -> None:
    """Threads of several workers on the same cores wait for each other; read when a worker imports torch."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture
def little_tuning(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton tries two configurations of a kernel that is tuned, of the smallest tiles: all of them cost minutes."""
    tuner = importlib.import_module("triton.runtime.autotuner").Autotuner
    prune = tuner.prune_configs

    def room(config: Any) -> int:
        return config.num_stages * math.prod(x for x in config.kwargs.values() if isinstance(x, int) and x > 0)

    def smallest(self: Any, *args: Any, **kwargs: Any) -> list[Any]:
        return sorted(prune(self, *args, **kwargs), key=room)[:2]

    monkeypatch.setattr(tuner, "prune_configs", smallest)
