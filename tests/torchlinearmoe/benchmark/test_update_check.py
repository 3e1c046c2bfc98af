"""The check before the timing sees an update that is a little wrong."""

import pytest
import torch

from torchlinearmoe.benchmark.update_parts import BETAS, EPS, LR, SLICE, Expected, chosen
from torchlinearmoe.kernels.optimizer import definition
from torchlinearmoe.kernels.optimizer.definition import Slot
from torchlinearmoe.kernels.optimizer.rounding import split_halves


def _slot(states: torch.dtype) -> tuple[Slot, torch.Tensor]:
    torch.manual_seed(0)
    size = 3 * SLICE + 17
    weight, rest = split_halves(torch.empty(size).uniform_(-0.02, 0.02))
    moments = torch.zeros(2, size, dtype=states)
    return Slot(weight, rest, moments[0], moments[1], 0.1, key=5), torch.empty(size).uniform_(-1e-3, 1e-3).bfloat16()


@pytest.mark.parametrize("states", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("lr", "wrong"), [(LR, False), (1.01 * LR, True)])
def test_an_update_passes_only_if_it_is_the_definitions(states, lr, wrong):
    slot, grad = _slot(states)
    step, factor = torch.tensor(1.0), torch.tensor(0.5)
    expected = Expected.of(slot, grad, step, factor)
    definition.adamw(slot, grad, step=step, lr=lr, betas=BETAS, eps=EPS, factor=factor)
    if wrong:
        with pytest.raises(AssertionError):
            expected.check(weights=1e-5, moments=1e-2)
    else:
        expected.check(weights=0.0, moments=0.0)  # also the roundings by chance, which go by place


def test_the_smallest_the_largest_and_every_type_are_checked():
    sizes = [(5, torch.float32), (9, torch.bfloat16), (1, torch.bfloat16), (30, torch.bfloat16)]
    parameters = [torch.zeros(size, dtype=dtype) for size, dtype in sizes]
    assert set(chosen(parameters)) == {0, 2, 3}
