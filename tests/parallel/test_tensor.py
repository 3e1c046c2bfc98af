"""Degrees of tensor parallelism that cannot be are refused when the recipe is read, with the legal ones."""

from typing import Any

import pytest

from torchlinearmoe.errors import RecipeError
from torchlinearmoe.recipe import resolve

MODEL = {"num_heads": 6, "num_kv_heads": 3, "hidden_size": 96, "vocab_size": 1026, "layout": "LN"}
DENSE = {"num_experts": 0, "top_k": 0}


def tables(degree: int, **changes: dict[str, Any]) -> dict[str, Any]:
    base: dict[str, Any] = {
        "model": MODEL | {"mixer": "hgrn2"},
        "training": {"steps": 1, "sequence_length": 36},
        "parallel": {"tensor": degree},
    }
    return base | {section: base.get(section, {}) | table for section, table in changes.items()}


def test_a_degree_that_everything_divides_by_is_taken() -> None:
    assert resolve(tables(3)).parallel.tensor == 3


@pytest.mark.parametrize(
    "degree, changes, told",
    [
        (0, {}, r"parallel.tensor = 0: must be at least 1"),
        (4, {}, r"parallel.tensor = 4: must divide model.vocab_size = 1026; legal: 1, 3$"),
        (6, {}, r"parallel.tensor = 6: must divide kv_heads of softmax_attention = 3; legal: 1, 3$"),
        (9, {"model": {"layout": "L"}}, r"parallel.tensor = 9: must divide heads of hgrn2 = 6; legal: 1, 2, 3, 6$"),
        (3, {"training": {"sequence_length": 10}}, r"must divide tokens of a micro-batch .* = 10; legal: 1$"),
        (
            3,
            {"model": {"layout": "L", "mixer": "mamba2"}, "mixer": {"mamba2": {"heads": 12, "groups": 4}}},
            r"parallel.tensor = 3: must divide groups of mamba2 = 4; legal: 1, 2$",
        ),
        (
            3,
            {"moe": {"shared_hidden_size": 32}},
            r"must divide moe.shared_hidden_size = 32; legal: 1$",
        ),
        (
            3,
            {"moe": {"first_dense_layers": 1}, "model": {"ffn_hidden_size": 64}},
            r"must divide model.ffn_hidden_size = 64; legal: 1$",
        ),
        (
            3,
            {"moe": DENSE, "model": {"ffn_hidden_size": 64}},
            r"must divide model.ffn_hidden_size = 64; legal: 1$",
        ),
    ],
)
def test_a_degree_that_leaves_a_remainder_is_refused(degree: int, changes: dict[str, Any], told: str) -> None:
    with pytest.raises(RecipeError, match=told):
        resolve(tables(degree, **changes))
