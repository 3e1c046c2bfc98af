"""Fixtures of all tests, and how workers share them."""

import importlib
import os
from typing import Any

import pytest
from xdist.scheduler import LoadScopeScheduling

RANKS = "tests/distributed/"

pytest_plugins = ["matrix_table"]


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Several workers for a plain `pytest`; none for chosen tests, a GPU, or the matrix, which fill a machine alone."""
    plain = config.args_source == pytest.Config.ArgsSource.TESTPATHS and config.option.markexpr.startswith("not ")
    if not plain:
        config.option.dist = "no"
        return 0
    return max(2, min(4, (os.cpu_count() or 1) // 4))


def pytest_xdist_setupnodes() -> None:
    """Threads of several workers on the same cores wait for each other; read when a worker imports torch."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")


class RanksInOneWorker(LoadScopeScheduling):
    """One worker takes all tests over several ranks, which fill two cores alone; the others share what is left."""

    def _split_scope(self, nodeid: str) -> str:
        return RANKS if nodeid.startswith(RANKS) else nodeid


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadScopeScheduling | None:
    """None leaves the choice to pytest-xdist: another `--dist` spreads the ranks over the workers too."""
    return RanksInOneWorker(config, log) if config.option.dist == "load" else None


@pytest.fixture
def little_tuning(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton tries two configurations of a kernel that is tuned: all of them cost minutes."""
    tuner = importlib.import_module("triton.runtime.autotuner").Autotuner
    prune = tuner.prune_configs
    monkeypatch.setattr(tuner, "prune_configs", lambda self, *args, **kwargs: prune(self, *args, **kwargs)[:2])
