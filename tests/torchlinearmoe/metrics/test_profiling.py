"""Traces and snapshots on demand."""

import gzip
import json

import pytest
import torch

from torchlinearmoe.metrics import MemorySnapshot, StepProfiler


def run(folder, window, steps, rank=0):
    with StepProfiler(folder, window, rank=rank) as profiler:
        for step in steps:
            profiler.begin(step)
            with torch.profiler.record_function(f"work-{step}"):
                torch.ones(4).sum()


def recorded(path):
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    return sorted({event["name"] for event in events if str(event.get("name")).startswith("work-")})


@pytest.mark.parametrize(
    "steps, first, last",
    [(range(1, 8), 3, 4), (range(4, 8), 4, 4), (range(1, 4), 3, 3)],
    ids=["whole window", "resumed inside", "ended inside"],
)
def test_trace_holds_the_steps_of_the_window_and_no_other(tmp_path, steps, first, last):
    run(tmp_path / "profile", (3, 4), steps, rank=2)
    (path,) = (tmp_path / "profile").iterdir()
    assert path.name == f"trace-rank2-steps-{first}-{last}.json.gz"
    assert recorded(path) == [f"work-{step}" for step in range(first, last + 1)]


@pytest.mark.parametrize("window, steps", [((), range(1, 4)), (None, range(1, 4)), ((3, 4), range(5, 8))])
def test_nothing_is_written_unless_asked_for(tmp_path, window, steps):
    run(tmp_path / "profile", window, steps)
    with MemorySnapshot(tmp_path / "profile", None, device="cpu") as snapshot:
        snapshot.begin(1)
    assert not (tmp_path / "profile").exists()


@pytest.mark.parametrize("window", [(3,), (4, 3), (0, 2), (1, 2, 3)])
def test_window_that_is_none_is_refused(tmp_path, window):
    with pytest.raises(ValueError, match=r"metrics.profile_steps = \[.*\]: must be \[first, last\]"):
        StepProfiler(tmp_path, window)


def test_snapshot_on_a_cpu_is_refused_by_its_key(tmp_path):
    with pytest.raises(ValueError, match=r"metrics.memory_snapshot_step = 3: needs a CUDA device, this run is on cpu"):
        MemorySnapshot(tmp_path, 3, device="cpu")
    with pytest.raises(ValueError, match=r"metrics.memory_snapshot_step = 0: must be at least 1"):
        MemorySnapshot(tmp_path, 0, device="cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("steps, written", [(range(1, 6), True), (range(1, 4), True), (range(4, 6), False)])
def test_snapshot_is_written_after_its_step(tmp_path, steps, written):
    with MemorySnapshot(tmp_path, 3, device="cuda") as snapshot:
        for step in steps:
            snapshot.begin(step)
            assert not list(tmp_path.iterdir()) or step > 3
            torch.ones(1024, device="cuda")
    assert [path.name for path in tmp_path.iterdir()] == ["memory-rank0-step-3.pickle"] * written


@pytest.mark.gpu
def test_snapshot_is_written_when_memory_runs_out(tmp_path):
    with pytest.raises(torch.OutOfMemoryError), MemorySnapshot(tmp_path, 3, device="cuda") as snapshot:
        snapshot.begin(1)
        torch.empty(2**50, dtype=torch.uint8, device="cuda")
    assert [path.name for path in tmp_path.iterdir()] == ["memory-rank0-step-1.pickle"]
