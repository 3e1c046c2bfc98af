"""Mamba2: its initial values, its geometry, its tensor-parallel placements, its refusals."""

from __future__ import annotations

import pytest
import torch
from mixer_cases import Case, make_stack, small_model
from torch.distributed.tensor import Placement, Replicate, Shard
from torch.nn import functional as F

from torchlinearmoe.errors import RecipeError
from torchlinearmoe.initialize import initialize
from torchlinearmoe.mixers.base import LayerPlace
from torchlinearmoe.mixers.mamba2 import Mamba2, Options, StepDecay


def test_initial_rates_and_steps_cover_their_ranges():
    decay = StepDecay(1000)
    initialize(decay, 3)
    A, dt = decay.A_log.detach().exp(), F.softplus(decay.dt_bias.detach())
    assert 1 <= float(A.min()) < 1.3 and 15.7 < float(A.max()) <= 16.001
    assert 0.999e-3 <= float(dt.min()) < 1.1e-3 and 0.09 < float(dt.max()) <= 0.1001
    assert float(dt.log().mean()) == pytest.approx(torch.tensor([1e-3, 1e-1]).log().mean().item(), abs=0.15)
    assert bool(decay.D.eq(1).all())


def test_rates_steps_and_skips_stay_in_float32():
    decay = StepDecay(2)
    initialize(decay, 0)
    assert decay.keep_fp32 and set(decay.no_weight_decay) == {name for name, _ in decay.named_parameters()}
    outputs = decay(torch.randn(5, 2, dtype=torch.bfloat16))
    assert {x.dtype for x in outputs} == {torch.float32}
    assert bool((outputs[1] <= 0).all())
    assert outputs[2].data_ptr() != decay.D.data_ptr(), "the parameter may be freed after the call"


def test_default_geometry_is_heads_of_64_in_twice_the_width():
    def shape(dims: dict, **options) -> tuple[int, ...]:
        model = small_model(**dims)
        Mamba2.check(Options(**options), model)
        return Mamba2(Options(**options), model, LayerPlace(0, 0, 1)).state_spec()["recurrent"].shape

    assert shape({}) == (2, 128, 64)
    assert shape({"hidden_size": 256, "num_heads": 16}) == (8, 128, 64)
    assert shape({}, heads=4) == (4, 128, 32)
    assert shape({}, head_dim=16, state=8, expand=1.0) == (4, 8, 16)


def test_a_single_groups_b_and_c_are_whole_on_every_rank():
    def placements(groups: int) -> dict[str, Placement]:
        return make_stack(Case("mamba2", {"head_dim": 32, "groups": groups})).layers[0].tensor_parallel()

    shared = {f"{n}_proj.weight" for n in "bc"} | {f"convs.{n}.{kind}" for n in "bc" for kind in ("weight", "bias")}
    for groups, placement in ((1, Replicate()), (2, Shard(0))):
        assert {placements(groups)[name] for name in shared} == {placement}
        others = {name: placement for name, placement in placements(groups).items() if name not in shared}
        assert others.pop("o_proj.weight") == Shard(1)
        assert set(others.values()) == {Shard(0)}


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"heads": 7}, "mixer.mamba2.heads: 7 heads of 18 do not make mixer.mamba2.expand * model.hidden_size = 128"),
        ({"heads": 2, "head_dim": 32}, "mixer.mamba2.heads: 2 heads of 32 do not make"),
        ({"heads": 1000}, "mixer.mamba2.heads: 1000 heads of 0 do not make"),
        ({"head_dim": 256}, "mixer.mamba2.heads: 0 heads of 256 do not make"),
        ({"expand": 0.01}, "mixer.mamba2.expand = 0.01: must make whole channels"),
        ({"groups": 0}, "mixer.mamba2.groups = 0: must divide the 2 heads"),
        ({"groups": 3}, "mixer.mamba2.groups = 3: must divide the 2 heads"),
        ({"state": 0}, "mixer.mamba2.state = 0: must be at least 1"),
        ({"conv": -1}, "mixer.mamba2.conv = -1: must not be negative"),
    ],
)
def test_refuses_in_one_line(wrong, message):
    with pytest.raises(RecipeError) as error:
        Mamba2.check(Options(**wrong), small_model())
    assert str(error.value).startswith(message) and "\n" not in str(error.value)
