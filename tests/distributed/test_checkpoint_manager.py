"""Checkpoints across layouts and ranks: what is saved by one number of ranks is loaded by another, and a rank that
fails or dies takes nothing with it that was saved before."""

import os
import signal
import threading
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from harness import RankError, RankPool
from torch import Tensor, nn
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from torchlinearmoe.checkpoint import CheckpointError, CheckpointManager, find_latest
from torchlinearmoe.checkpoint.storage import Writer

WIDTH = 6  # not a multiple of 4: the last ranks of 4 hold less or nothing


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))
        self.scale = nn.Parameter(torch.randn(1))
        self.unused = nn.Parameter(torch.randn(5))
        self.register_buffer("counts", torch.randn(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x * self.scale


def build(seed: int, *, groups: int = 1) -> tuple[Net, torch.optim.Optimizer]:
    """A sharded model with its optimizer; on one rank without sharding. ``groups`` splits the parameters."""
    torch.manual_seed(seed)
    model = Net()
    if dist.get_world_size() > 1:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for module in [*model.layers, model]:
            fully_shard(module, mesh=mesh)
            assert isinstance(module, FSDPModule)
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    parameters = list(model.parameters())
    split = [parameters[g::groups] for g in range(groups)]
    return model, torch.optim.AdamW([{"params": p} for p in reversed(split)], lr=1e-2, fused=True)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for _ in range(steps):
        model(torch.randn(4, WIDTH)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.clone()


def full_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    tensors = {name: whole(value.detach()) for name, value in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        for entry, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{name}/{entry}"] = whole(value)
    return tensors


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def save_trained(rank: int, directory: str, step: int, seed: int) -> dict[str, Tensor]:
    model, optimizer = build(seed)
    train(model, optimizer, 2)
    manager = CheckpointManager(directory, keep=2)
    manager.save(step, model, optimizer, {"tokens": 17 * step, "rank": rank}, {"recipe.toml": f"rank = {rank}"})
    state = full_state(model, optimizer)
    train(model, optimizer, 1)  # the main group is in use while the save goes on
    manager.wait()
    return state


def load_latest(rank: int, directory: str) -> tuple[dict[str, Tensor], dict, str]:
    model, optimizer = build(1000 + rank, groups=2)
    manager = CheckpointManager(directory, keep=2)
    path = manager.latest()
    assert path is not None
    extra = manager.load(path, model, optimizer)
    state = full_state(model, optimizer)
    train(model, optimizer, 1)  # the loaded state is one that the optimizer can go on from
    return state, extra, path.name


@pytest.mark.parametrize("saved_by, loaded_by", [(2, 2), (2, 1), (1, 2), (2, 4), (4, 1)])
def test_any_number_of_ranks_loads_what_another_saved(
    ranks: RankPool, tmp_path: Path, saved_by: int, loaded_by: int
) -> None:
    saved = ranks(saved_by, save_trained, str(tmp_path), 3, 10 * saved_by + loaded_by)[0]
    assert sum("/exp_avg_sq" in name for name in saved) == 5  # all but the unused parameter
    for state, extra, name in ranks(loaded_by, load_latest, str(tmp_path)):
        assert_same(state, saved)
        assert (extra, name) == ({"tokens": 51, "rank": 0, "step": 3}, "step-3")
    assert (tmp_path / "step-3/recipe.toml").read_text() == "rank = 0"


def resume_damaged(rank: int, directory: str) -> tuple[str | None, str, str]:
    """What `latest` means, and what is said of step 2, resumed from by its name and loaded."""
    model, optimizer = build(1000 + rank)
    manager = CheckpointManager(directory, keep=2)
    found = manager.resume_from("latest")
    said = []
    for use in (lambda: manager.resume_from(f"{directory}/step-2"), lambda: manager.load(f"{directory}/step-2", model)):
        with pytest.raises(CheckpointError) as caught:
            use()
        said.append(str(caught.value))
    return found.name if found else None, said[0], said[1]


@pytest.mark.parametrize("name", ["__0_0.distcp", "__1_0.distcp", "recipe.toml"])
def test_a_damaged_file_is_seen_by_all_ranks(ranks: RankPool, tmp_path: Path, name: str) -> None:
    for step in (1, 2):
        ranks(2, save_trained, str(tmp_path), step, step)
    file = tmp_path / "step-2" / name
    content = bytearray(file.read_bytes())
    content[len(content) // 3] ^= 4
    file.write_bytes(content)
    first, second = ranks(2, resume_damaged, str(tmp_path))
    assert first == second and first[0] == "step-1"
    why = f"{name} is damaged: its checksum is not the one that was saved"
    assert first[1].startswith(f"checkpoint.resume = '{tmp_path}/step-2' is damaged: {why}; name another")
    assert first[2] == f"checkpoint {tmp_path}/step-2: {why}"


class Table(nn.Module):
    """One stage of a pipeline: a tensor-parallel matrix of its own, and a replicated table that all stages share."""

    def __init__(self, stage: int, mesh) -> None:
        super().__init__()
        own = distribute_tensor(torch.randn(4, 6), mesh, [Shard(1)], src_data_rank=None)
        table = distribute_tensor(torch.arange(3.0), mesh, [Replicate()], src_data_rank=None)
        self.register_parameter(f"stage_{stage}", nn.Parameter(own))
        self.table = nn.Parameter(table)


def save_pipeline(rank: int, directory: str) -> dict[str, Tensor]:
    stage = rank // 2
    torch.manual_seed(stage)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "tp"))["tp"]
    model = Table(stage, mesh)
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    CheckpointManager(directory, keep=1).save(1, model, optimizer, {}, blocking=True)
    return full_state(model, optimizer)


def load_whole(rank: int, directory: str) -> dict[str, Tensor]:
    model = nn.Module()
    model.stage_0, model.stage_1 = nn.Parameter(torch.zeros(4, 6)), nn.Parameter(torch.zeros(4, 6))
    model.table = nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.AdamW(model.parameters())
    CheckpointManager(directory, keep=1).load(Path(directory) / "step-1", model, optimizer)
    return full_state(model, optimizer)


def test_pipeline_stages_that_share_a_table_load_into_one_model(ranks: RankPool, tmp_path: Path) -> None:
    saved = ranks(4, save_pipeline, str(tmp_path))
    assert_same(ranks(1, load_whole, str(tmp_path))[0], saved[0] | saved[2])


def save_twice_slowly(rank: int, directory: str) -> list[bool]:
    """Rank 1 writes only when told; meanwhile the training's own collectives must not wait for the save."""
    go = {f"step-{step}.tmp": threading.Event() for step in (1, 2)}
    write_data = FileSystemWriter.write_data

    def late_write(self, *args):
        assert rank == 0 or go[Path(self.path).name].wait(30)
        return write_data(self, *args)

    Writer.write_data = late_write  # type: ignore[method-assign]
    try:
        model, optimizer = build(5)
        manager = CheckpointManager(directory, keep=5)
        visible = []
        for step in (1, 2):
            train(model, optimizer, 1)
            state = full_state(model, optimizer)
            manager.save(step, model, optimizer, {})
            train(model, optimizer, 3)
            visible.append((Path(directory) / f"step-{step}").exists())
            dist.barrier()
            go[f"step-{step}.tmp"].set()
        manager.wait()
        manager.load(f"{directory}/step-2", model, optimizer)
        assert_same(full_state(model, optimizer), state)
    finally:
        Writer.write_data = write_data  # type: ignore[method-assign]
    return visible


def test_training_goes_on_during_a_slow_save(ranks: RankPool, tmp_path: Path) -> None:
    assert ranks(2, save_twice_slowly, str(tmp_path)) == [[False, False]] * 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-1", "step-2"]


def fail_on_one_rank(rank: int, directory: str) -> list[str]:
    """Messages seen by this rank: rank 1 cannot write, rank 0 cannot add the files, rank 1 has a buffer too many."""
    model, optimizer = build(6)
    manager = CheckpointManager(directory, keep=2)
    manager.save(1, model, optimizer, {}, blocking=True)
    messages = []

    def no_space(self, *args):
        raise OSError(28, "No space left on device")

    write_data = FileSystemWriter.write_data
    if rank == 1:
        Writer.write_data = no_space  # type: ignore[method-assign]
    manager.save(2, model, optimizer, {})
    for call in (manager.latest, lambda: manager.save(3, model, optimizer, {}, {"file/x": "", "file": ""})):
        try:
            call()
            manager.wait()
        except CheckpointError as error:
            messages.append(str(error))
        Writer.write_data = write_data  # type: ignore[method-assign]
    if rank == 1:
        model.register_buffer("extra_buffer", torch.ones(1))
    try:
        manager.load(f"{directory}/step-1", model, optimizer)
    except CheckpointError as error:
        messages.append(str(error))
    manager.save(4, build(7)[0], None, {}, blocking=True)
    return messages


def test_a_failure_of_one_rank_is_the_same_line_on_all_and_harms_nothing(ranks: RankPool, tmp_path: Path) -> None:
    first, second = ranks(2, fail_on_one_rank, str(tmp_path))
    assert first == second
    assert len(first) == 3 and not any("\n" in line for line in first)
    assert "step-2 was not saved: OSError: [Errno 28] No space left on device (rank 1)" in first[0]
    assert "step-3 was not saved: IsADirectoryError" in first[1]
    assert first[2] == f"checkpoint {tmp_path}/step-1: it has no 'model.extra_buffer'"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-1", "step-4"]


def die_during_save(rank: int, directory: str, victim: int, moment: str) -> None:
    """The victim is killed while step 2 is being written: with data half on disk, or before the index is."""
    model, optimizer = build(8)
    manager = CheckpointManager(directory, keep=1)
    original = getattr(Writer, moment)

    def die(self, *args, **kwargs):
        if rank == victim:
            if moment == "write_data":
                original(self, *args, **kwargs)
                file = next(Path(directory).glob(f"step-2.tmp/__{rank}_*"))
                os.truncate(file, file.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self, *args, **kwargs)

    setattr(Writer, moment, die)
    manager.save(2, model, optimizer, {})
    manager.wait()


@pytest.mark.parametrize("victim, moment", [(1, "write_data"), (0, "finish")])
def test_a_rank_killed_during_a_save_leaves_the_last_checkpoint(
    ranks: RankPool, tmp_path: Path, caplog: pytest.LogCaptureFixture, victim: int, moment: str
) -> None:
    saved = ranks(2, save_trained, str(tmp_path), 1, 30)[0]
    with pytest.raises(RankError, match=f"rank {victim} of 2: died with exit code -9"):
        ranks(2, die_during_save, str(tmp_path), victim, moment)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-1", "step-2.tmp"]
    assert find_latest(tmp_path) == tmp_path / "step-1"
    skipped = f"skipping incomplete checkpoint {tmp_path}/step-2.tmp: its save never finished; step-1 is taken instead"
    assert [r.getMessage() for r in caplog.records if r.name.startswith("torchlinearmoe")] == [skipped]
    state, _, name = ranks(2, load_latest, str(tmp_path))[0]
    assert name == "step-1"
    assert_same(state, saved)
    again = ranks(2, save_trained, str(tmp_path), 2, 31)[0]
    assert_same(ranks(2, load_latest, str(tmp_path))[0][0], again)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-1", "step-2"]
