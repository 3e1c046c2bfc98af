"""Fixtures of all tests."""

import importlib
import os

import pytest


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Several workers for a plain `pytest`; none for chosen tests, a GPU, or the matrix, which fill a machine alone."""
    plain = config.args_source == pytest.Config.ArgsSource.TESTPATHS and config.option.markexpr.startswith("not ")
    if not plain:
        config.option.dist = "no"
        return 0
    return max(2, min(4, (os.cpu_count() or 1) // 4))


@pytest.fixture
def little_tuning(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton tries two configurations of a kernel that is tuned: all of them cost minutes."""
    tuner = importlib.import_module("triton.runtime.autotuner").Autotuner
    prune = tuner.prune_configs
    monkeypatch.setattr(tuner, "prune_configs", lambda self, *args, **kwargs: prune(self, *args, **kwargs)[:2])
