"""Devices and types by request, a process group that goes away, and signals that wait for the loop."""

import os
import re
import signal

import pytest
import torch
import torch.distributed as dist

from torchlinearmoe.errors import RecipeError, UserError
from torchlinearmoe.recipe import TrainingRecipe
from torchlinearmoe.runtime import StopSignal, choose_device, choose_dtype, process_group, world_size

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.mark.parametrize(
    "asked, device, given",
    [
        ("auto", CPU, torch.float32),
        ("auto", GPU, torch.bfloat16),
        ("float32", GPU, torch.float32),
        ("bfloat16", CPU, torch.bfloat16),
    ],
)
def test_the_type_follows_the_recipe_then_the_device(asked: str, device: torch.device, given: torch.dtype) -> None:
    assert choose_dtype(TrainingRecipe(dtype=asked), device) == given  # pyright: ignore[reportArgumentType]


def test_a_rank_takes_the_gpu_of_its_local_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert choose_device(TrainingRecipe(device="auto")) == torch.device("cuda", 1)
    assert choose_device(TrainingRecipe(device="cpu")) == CPU
    assert chosen == [1]
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(RecipeError, match="training.device = 'cuda': 2 GPUs for local rank 2"):
        choose_device(TrainingRecipe(device="cuda"))


def test_without_a_gpu_auto_is_the_cpu_and_cuda_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device(TrainingRecipe(device="auto")) == CPU
    with pytest.raises(RecipeError, match="training.device = 'cuda': no GPU is visible"):
        choose_device(TrainingRecipe(device="cuda"))


def test_the_world_is_one_process_without_a_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert world_size() == 1
    for name, value in {"WORLD_SIZE": "3", "RANK": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)
    assert world_size() == 3


@pytest.mark.parametrize(
    ("environment", "told"),
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE = 2: there is no MASTER_ADDR and RANK with it; start with torchrun"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE = 'two' in the environment: must be a number from 1 to 1000000;"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE = '0' in the environment: must be a number from 1"),
        ({"WORLD_SIZE": "9" * 5000}, "WORLD_SIZE = '9999"),
        (
            {"WORLD_SIZE": "2", "RANK": "2", "MASTER_ADDR": "localhost"},
            "RANK = '2' in the environment: must be a number",
        ),
        ({"LOCAL_RANK": "-1"}, "LOCAL_RANK = '-1' in the environment: must be a number from 0 to 0;"),
        ({"MASTER_PORT": "65536"}, "MASTER_PORT = '65536' in the environment: must be a number from 0 to 65535;"),
    ],
)
def test_an_environment_that_no_launcher_made_is_named(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], told: str
) -> None:
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=re.escape(told)):
        world_size()


def test_a_process_alone_has_a_group_that_ends_with_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(KeyError), process_group(CPU):
        assert (dist.get_world_size(), dist.get_backend()) == (1, "gloo")
        raise KeyError
    assert not dist.is_initialized()


def test_signals_are_remembered_and_a_second_ctrl_c_interrupts() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    stop = StopSignal()
    try:
        assert stop.received is None
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.received == signal.SIGTERM
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.received == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            signal.sigtimedwait([], 1)
    finally:
        stop.restore()
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before
