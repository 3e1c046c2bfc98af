"""Based and Rebased: the size of their states, Rebased's norms, what they refuse."""

from __future__ import annotations

import pytest
from mixer_cases import Case, make_stack, small_model
from torch import Tensor

from torchlinearmoe.errors import RecipeError
from torchlinearmoe.initialize import initialize
from torchlinearmoe.mixers import MIXERS
from torchlinearmoe.mixers.base import Mixer


def _weight(mixer: Mixer, name: str) -> Tensor:
    return mixer.get_parameter(name).detach()


@pytest.mark.parametrize(("name", "rows"), [("based", 153), ("rebased", 136)])
def test_sixteen_channels_make_the_papers_state(name: str, rows: int):
    mixer = make_stack(Case(name, {})).layers[0]
    assert mixer.state_spec()["recurrent"].shape == (2, rows, 33)


def test_rebased_norms_start_neutral_and_apart():
    stack = make_stack(Case("rebased", {}))
    initialize(stack, 0)
    for norm in ("q_norm", "k_norm"):
        assert _weight(stack.layers[0], f"{norm}.weight").eq(1).all()
        assert _weight(stack.layers[0], f"{norm}.bias").eq(0).all()
    tied = {name for name, _ in make_stack(Case("rebased", {"tie_norms": True})).layers[0].named_parameters()}
    assert "q_norm.weight" in tied and "k_norm.weight" not in tied


@pytest.mark.parametrize("name", ["based", "rebased"])
def test_queries_need_a_channel(name: str):
    mixer = MIXERS[name]
    with pytest.raises(RecipeError, match=rf"^mixer\.{name}\.feature_dim = 0: must be at least 1$"):
        mixer.check(mixer.Options(feature_dim=0), small_model())  # pyright: ignore[reportCallIssue]
