"""Fixtures of all tests, how workers share them, and the table that the matrix of layouts fills."""

import importlib
import os
from typing import Any

import pytest
from matrix_table import Table
from xdist.scheduler import LoadScopeScheduling

RANKS = "tests/distributed/"
TABLE = Table()


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Several workers for a plain `pytest`; none for chosen tests, a GPU, or the matrix, which fill a machine alone."""
    plain = config.args_source == pytest.Config.ArgsSource.TESTPATHS and config.option.markexpr.startswith("not ")
    if not plain:
        config.option.dist = "no"
        return 0
    # Threads of several processes on the same cores wait for each other; read when a worker imports torch.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    return max(2, min(4, (os.cpu_count() or 1) // 4))


class RanksInOneWorker(LoadScopeScheduling):
    """One worker takes all tests over several ranks, which fill two cores alone; the others share what is left."""

    def _split_scope(self, nodeid: str) -> str:
        return RANKS if nodeid.startswith(RANKS) else nodeid


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadScopeScheduling | None:
    """None leaves the choice to pytest-xdist: another `--dist` spreads the ranks over the workers too."""
    return RanksInOneWorker(config, log) if config.option.dist == "load" else None


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Called where the table is printed, also for what a worker ran."""
    if report.when == "call":
        properties: list[tuple[str, Any]] = report.user_properties
        for name, cell in properties:
            if name == "cell":
                TABLE.add(*cell)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if TABLE.cells:
        terminalreporter.section("largest relative errors: of losses and first gradients, of last gradients")
        for line in TABLE.lines():
            terminalreporter.line(line)


@pytest.fixture
def little_tuning(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton tries two configurations of a kernel that is tuned: all of them cost minutes."""
    tuner = importlib.import_module("triton.runtime.autotuner").Autotuner
    prune = tuner.prune_configs
    monkeypatch.setattr(tuner, "prune_configs", lambda self, *args, **kwargs: prune(self, *args, **kwargs)[:2])
