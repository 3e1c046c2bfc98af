"""A process in which Triton is interpreted; this folder on the path, for `cases` and `fake_packages`."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor

import pytest


@pytest.fixture(scope="session")
def interpreter() -> Iterator[ProcessPoolExecutor]:
    """A process of its own: Triton reads once, when it is imported, whether it interprets."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TRITON_INTERPRET", "1")
            assert pool.submit(os.getenv, "TRITON_INTERPRET").result() == "1"  # the process has started
        yield pool
