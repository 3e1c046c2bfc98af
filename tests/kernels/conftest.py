"""A process in which Triton is interpreted; this folder on the path, for `cases` and `fake_packages`."""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor

import pytest
import tf32


@pytest.fixture(scope="session")
def interpreter() -> Iterator[ProcessPoolExecutor]:
    """A process of its own: Triton reads once, when it is imported, whether it interprets.

    Its products of float32 are a GPU's: `tf32`.
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TRITON_INTERPRET", "1")
            assert pool.submit(os.getenv, "TRITON_INTERPRET").result() == "1"  # the process has started
        if importlib.util.find_spec("triton") is not None:
            pool.submit(tf32.install).result()
        yield pool
