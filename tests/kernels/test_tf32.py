"""The interpreter of these tests rounds as a GPU does."""

from __future__ import annotations

import importlib.util
from concurrent.futures import ProcessPoolExecutor

import pytest
import tf32

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")


@pytest.mark.parametrize("precision, expected", [("tf32", 1.0), ("tf32x3", 1 + 2.0**-12), ("ieee", 1 + 2.0**-12)])
def test_products_of_float32_lose_what_tf32_has_not(
    interpreter: ProcessPoolExecutor, precision: str, expected: float
) -> None:
    assert interpreter.submit(tf32.product, precision).result() == expected
