"""Numbers read later are those of the moment they were asked for."""

import pytest
import torch

from torchlinearmoe.late import LateNumbers, to_device


def test_the_values_on_a_cpu():
    values = torch.tensor([1.0, 15.0])
    early = LateNumbers(values)
    values.add_(1)
    assert early.read() == [1.0, 15.0] and LateNumbers(values).read() == [2.0, 16.0]
    assert torch.equal(to_device(torch.tensor([2.0]), torch.device("cpu")), torch.tensor([2.0]))


@pytest.mark.gpu
def test_on_a_gpu_reading_waits_for_nothing_that_came_after():
    values = to_device(torch.tensor([1.0, 15.0]), torch.device("cuda"))
    early = LateNumbers(values)
    values.add_(1)
    end = torch.cuda.Event()
    torch.cuda._sleep(10**9)
    end.record()
    assert early.read() == [1.0, 15.0] and not end.query()
    torch.cuda.synchronize()
    assert LateNumbers(values).read() == [2.0, 16.0]
