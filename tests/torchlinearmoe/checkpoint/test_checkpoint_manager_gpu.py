"""Checkpoints of a model on a GPU: DTensors on a CUDA mesh, NCCL for the training, and a CPU that reads the result."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from torchlinearmoe.checkpoint import CheckpointManager, load_model_weights

pytestmark = pytest.mark.gpu
WIDTH = 512


@pytest.fixture
def nccl() -> Iterator[None]:
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1, device_id=torch.device("cuda", 0))
    yield
    dist.destroy_process_group()


def layers() -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(4)))


def build() -> tuple[nn.Module, torch.optim.Optimizer]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    model = layers().cuda()
    fully_shard(model, mesh=init_device_mesh("cuda", (1,)), mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    return model, torch.optim.AdamW(model.parameters(), fused=True)


def train(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model(torch.randn(8, WIDTH, device="cuda")).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def values(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    states = [value for p in model.parameters() for value in (p.detach(), *optimizer.state[p].values())]
    return [getattr(value, "full_tensor", lambda value=value: value)().clone() for value in states]


def test_a_sharded_model_on_a_gpu_is_saved_while_it_trains_and_loaded_there_and_on_a_cpu(
    nccl: None, tmp_path: Path
) -> None:
    model, optimizer = build()
    manager = CheckpointManager(tmp_path, keep=2)
    saved: list[Tensor] = []
    for step in (1, 2):  # the second one reuses the memory of the first
        train(model, optimizer)
        saved = values(model, optimizer)
        manager.save(step, model, optimizer, {"step": step})
        train(model, optimizer)
    path = manager.latest()
    assert path is not None and path == tmp_path / "step-2"

    other, restored = build()
    assert manager.load(path, other, restored) == {"step": 2}
    for ours, theirs in zip(values(other, restored), saved, strict=True):
        assert ours.device == theirs.device and torch.equal(ours, theirs)
    train(other, restored)

    on_cpu = layers()
    load_model_weights(path, on_cpu)
    assert torch.equal(on_cpu.get_parameter("0.weight"), saved[0].cpu())
