"""Memories of gated linear attention: projections in common, what a token meets of them, their recipes and refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from mixer_cases import Case, make_stack, random_inputs, relative, small_model
from parameter_formulas import WRITES

from torchlinearmoe.errors import RecipeError
from torchlinearmoe.mixers import MIXERS
from torchlinearmoe.mixers.base import Mixer
from torchlinearmoe.mixers.gla import Options
from torchlinearmoe.recipe import resolve
from torchlinearmoe.recipe.parse import dump


def test_all_memories_may_have_the_same_projections() -> None:
    """Which equals memories with layers of their own that happen to be equal."""
    own = make_stack(Case("mom_gla", {"conv": 3}))
    same = make_stack(Case("mom_gla", {"conv": 3, "shared_projections": True}))
    weights = dict(same.named_parameters())
    with torch.no_grad():
        for name, parameter in own.named_parameters():
            source = weights[name.replace("write_layers", "inner")]
            parameter.copy_(source.unsqueeze(1).expand_as(parameter) if "write_layers" in name else source)
        x_TD = random_inputs(70)
        assert relative(same.packed(x_TD, (30, 40)), own.packed(x_TD, (30, 40))) < 1e-12


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"num_memories": 0}, "mixer.mom_gla.num_memories = 0: must be at least 1"),
        ({"top_k": 5}, "mixer.mom_gla.top_k = 5: must lie between 1 and num_memories = 4"),
        ({"top_k": 0}, "mixer.mom_gla.top_k = 0: must lie between 1 and num_memories = 4"),
        ({"balance_coefficient": -1.0}, "mixer.mom_gla.balance_coefficient = -1.0: must not be negative"),
        ({"inner": "softmax_attention"}, "mixer.mom_gla.inner = 'softmax_attention': cannot be a memory; legal: "),
        ({"inner": "mom_gla"}, "mixer.mom_gla.inner = 'mom_gla': cannot be a memory; legal: "),
        ({"inner": "nothing"}, "mixer.mom_gla.inner = 'nothing': cannot be a memory; legal: "),
        ({"inner": "hgrn2", "expand_k": 1.0}, "mixer.mom_gla.expand_k: an option of gla, but inner = 'hgrn2'"),
        ({"gate_rank": 0}, "mixer.mom_gla.gate_rank = 0: must be at least 1"),
        ({"expand_v": 0.01}, "mixer.mom_gla.expand_v = 0.01: must make whole channels"),
    ],
)
def test_refuses_in_one_line(wrong: dict[str, Any], message: str) -> None:
    mixer = MIXERS["mom_gla"]
    with pytest.raises(RecipeError) as error:
        mixer.check(mixer.Options(**wrong), small_model())
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


def test_an_inner_mixer_is_as_its_own_section_says_and_the_section_is_kept() -> None:
    tables: dict[str, Any] = {
        "model": {"mixer": "mom_gla"},
        "mixer": {"mom_gla": {"inner": "retention"}, "retention": {"expand_v": 1.0}},
        "training": {"steps": 1},
    }
    recipe = resolve(tables)
    text = dump(recipe)
    assert "[mixer.mom_gla]" in text and "[mixer.retention]" in text
    mixer, options = MIXERS["mom_gla"].inner_of(recipe.model.mixer_options["mom_gla"], recipe.model)  # pyright: ignore
    assert mixer is MIXERS["retention"] and options.expand_v == 1.0
    tables["mixer"]["retention"]["expand_v"] = 0.001
    with pytest.raises(RecipeError, match="mixer.retention.expand_v = 0.001"):
        resolve(tables)


def test_only_the_memories_that_a_token_has_count_as_active() -> None:
    mixer = make_stack(Case("mom_gla", {})).layers[0]
    assert isinstance(mixer, Mixer)
    written = WRITES["gla"](Options(), small_model())
    assert sum(p.numel() for p in mixer.parameters()) - mixer.active_parameters() == 2 * written
    more = make_stack(Case("mom_gla", {"num_memories": 8})).layers[0]
    router = 4 * 64
    assert more.active_parameters() == mixer.active_parameters() + router
    assert more.flops_per_token(64) == mixer.flops_per_token(64) + 2 * router
