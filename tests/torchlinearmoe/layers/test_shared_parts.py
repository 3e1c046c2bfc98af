"""The parts that mixers share: convolutions with and without activation, norms, grouped heads, initial step sizes."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from torchlinearmoe.initialize import initialize, inverse_softplus_of_exp
from torchlinearmoe.kernels.heads import repeat_heads
from torchlinearmoe.layers.convolution import Convolutions
from torchlinearmoe.layers.norm import GroupedRMSNorm
from torchlinearmoe.layers.past import Empty, Resumed, State
from torchlinearmoe.segments import Segments


def _resumed(tokens: int, state: State) -> Resumed:
    return Resumed(Segments.of_lengths((tokens,)), state)


def test_projections_without_convolution_are_activated_only_when_asked():
    x = torch.randn(6, 4)
    for always, expected in ((False, x), (True, F.silu(x))):
        convs = Convolutions({"q": 4}, 0, always_activate=always)
        for past in (Empty(Segments.of_lengths((6,))), _resumed(6, {})):
            outputs, after = convs({"q": x}, past)
            assert torch.equal(outputs["q"], expected)
            assert after == {}


def test_convolutions_activate_once():
    x = torch.randn(6, 4)
    results = []
    for always in (False, True):
        convs = Convolutions({"q": 4}, 3, bias=True, always_activate=always)
        initialize(convs, 0)
        results.append(convs({"q": x}, Empty(Segments.of_lengths((6,))))[0]["q"])
        outputs, after = convs({"q": x}, _resumed(6, {"conv_q": torch.zeros(1, 2, 4)}))
        torch.testing.assert_close(outputs["q"], results[-1])
        assert torch.equal(after["conv_q"][0], x[-2:])
    assert torch.equal(*results)
    assert sorted(name for name, _ in convs.named_parameters()) == ["q.bias", "q.weight"]


def test_grouped_norm_normalises_every_group_by_itself():
    norm = GroupedRMSNorm(12, 3, 1e-6)
    with torch.no_grad():
        norm.weight.copy_(torch.arange(12.0) + 1)
    x = torch.randn(5, 12)
    y = norm(x)
    for part, own, weight in zip(x.split(4, -1), y.split(4, -1), norm.weight.split(4)):
        torch.testing.assert_close(own, F.rms_norm(part, (4,), weight, 1e-6))
    assert norm(x.bfloat16()).dtype == torch.bfloat16


def test_heads_are_repeated_next_to_each_other():
    x = torch.randn(3, 2, 5)
    assert torch.equal(repeat_heads(x, 3), x.repeat_interleave(3, 1))
    assert repeat_heads(x, 1) is x
    one = torch.randn(3, 1, 5, 2)
    assert torch.equal(repeat_heads(one, 4), one.repeat_interleave(4, 1))
    assert repeat_heads(one, 4).data_ptr() == one.data_ptr()


def test_softplus_gives_back_the_step_and_its_floor():
    steps = torch.tensor([1e-6, 1e-4, 1e-3, 0.1, 3.0], dtype=torch.float64)
    back = F.softplus(inverse_softplus_of_exp(steps.log()))
    torch.testing.assert_close(back, steps.clamp(min=1e-4))
