"""`recipes/slurm.sh`, with commands of Slurm that write down how they are called."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "recipes" / "slurm.sh"
SCONTROL = """#!/bin/bash
echo "$@" >> "$CALLS/scontrol"
[ "$1" = requeue ] || printf 'node7\\nnode8\\n'
"""
SRUN = """#!/bin/bash
trap 'sleep 0.2; echo saved > "$CALLS/saved"; exit 143' TERM
printf '%s\\n' "$@" > "$CALLS/srun.tmp" && mv "$CALLS/srun.tmp" "$CALLS/srun"
for _ in $(seq "$TICKS"); do sleep 0.05; done
exit "$STATUS"
"""


def start(calls: Path, *arguments: str, ticks: int = 0, status: int = 0) -> subprocess.Popen[str]:
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        path = calls / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)
    slurm = {
        "SLURM_JOB_ID": "41234",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_NODELIST": "node[7-8]",
        "SLURM_GPUS_ON_NODE": "4",
    }
    environment = {"PATH": f"{calls / 'bin'}:{os.environ['PATH']}", "CALLS": str(calls), **slurm}
    environment |= {"TICKS": str(ticks), "STATUS": str(status)}
    return subprocess.Popen(["bash", str(SCRIPT), *arguments], env=environment, text=True, stderr=subprocess.PIPE)


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 20
    while not path.exists():
        assert time.monotonic() < deadline, f"{path.name} did not come"
        time.sleep(0.01)


def requeues(calls: Path) -> list[str]:
    return [line for line in (calls / "scontrol").read_text().splitlines() if line.startswith("requeue")]


def test_every_node_runs_one_torchrun_that_meets_the_others_on_the_first(tmp_path: Path) -> None:
    assert start(tmp_path, "my recipe.toml", "--training.steps=3").wait(20) == 0
    words = (tmp_path / "srun").read_text().splitlines()
    assert words[words.index("torchrun") :] == [
        "torchrun",
        "--nnodes=2",
        "--nproc_per_node=4",
        "--rdzv_backend=c10d",
        "--rdzv_endpoint=node7:21234",
        "--rdzv_id=41234",
        "--max-restarts=3",
        "-m",
        "torchlinearmoe.train",
        "my recipe.toml",
        "--training.steps=3",
    ]
    assert requeues(tmp_path) == []


def test_before_the_time_limit_the_run_saves_and_is_queued_again(tmp_path: Path) -> None:
    job = start(tmp_path, "recipe.toml", ticks=400)
    wait_for(tmp_path / "srun")
    job.send_signal(signal.SIGUSR1)
    assert job.wait(20) == 0
    assert (tmp_path / "saved").exists(), "the job ended before the training had"
    assert requeues(tmp_path) == ["requeue 41234"]


@pytest.mark.parametrize("status", [0, 1])
def test_a_run_that_ends_by_itself_is_not_queued_again(tmp_path: Path, status: int) -> None:
    assert start(tmp_path, "recipe.toml", status=status).wait(20) == status
    assert requeues(tmp_path) == []


def test_without_a_recipe_the_usage_is_told(tmp_path: Path) -> None:
    job = start(tmp_path)
    assert job.wait(20) == 2
    assert job.stderr is not None and job.stderr.read().startswith("usage: sbatch recipes/slurm.sh RECIPE")
    assert not (tmp_path / "srun").exists()


def test_the_header_asks_for_the_signal_and_for_leave_to_requeue() -> None:
    header = [line for line in SCRIPT.read_text().splitlines() if line.startswith("#SBATCH")]
    assert {"#SBATCH --requeue", "#SBATCH --ntasks-per-node=1", "#SBATCH --open-mode=append"} <= set(header)
    assert any(line.startswith("#SBATCH --signal=B:USR1@") for line in header)
