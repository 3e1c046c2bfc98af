"""A full disk is told in one line, wherever it is met, and what fills it makes room for the next start."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from commands import ROOT, write_recipe
from tiny_run import Settings, settings, write_corpus

SMALL: Settings = {
    "model": {"layout": "L", "num_layers": 2},
    "training": {"steps": 6},
    "checkpoint": {"interval": 2},
    "metrics": {"tensorboard": True},
}


def mounts() -> bool:
    """Whether a small disk can be made here, in a namespace of its own."""
    if shutil.which("unshare") is None:
        return False
    return (
        subprocess.run(["unshare", "-rm", "mount", "-t", "tmpfs", "tmpfs", "/mnt"], capture_output=True).returncode == 0
    )


pytestmark = [pytest.mark.slow, pytest.mark.skipif(not mounts(), reason="no file system can be mounted here")]


class Disk:
    """A folder that is a disk of its own while a script runs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "disk"
        self.folder.mkdir()
        corpus = write_corpus(folder)
        cache = {"data": {"cache": str(self.folder / "cache")}}
        self.recipe = write_recipe(settings(corpus, self.folder / "run", SMALL, cache), folder / "recipe.toml")

    def run(self, size: str, script: str) -> subprocess.CompletedProcess[str]:
        """A shell script on a disk of `size`, in which `train` is the command."""
        train = f'train() {{ {sys.executable} -m torchlinearmoe.train {self.recipe} "$@"; }}'
        environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
        environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        mounted = f"mount -t tmpfs -o size={size} tmpfs {self.folder} && cd {self.folder} && {script}"
        return subprocess.run(
            ["unshare", "-rm", "sh", "-c", f"{train}; {mounted}"],
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
        )


@pytest.fixture
def disk(tmp_path: Path) -> Disk:
    return Disk(tmp_path)


TOKENS = "cannot write tokens to '{disk}/cache': No space left on device; make room there, or set data.cache"
FOLDER = "training.output_dir = '{disk}/run': No space left on device; make room or mend it, then start again; last "
SAVE = "checkpoint {disk}/run/checkpoints/%s was not saved: OSError: [Errno 28] No space left on device (rank 0); last "


@pytest.mark.parametrize(
    "size, told",
    [
        pytest.param("12k", TOKENS, id="tokens"),
        pytest.param("40k", FOLDER + "complete checkpoint: none", id="recipe"),
        pytest.param("52k", FOLDER + "complete checkpoint: none", id="events"),
        pytest.param(
            "612k", SAVE % "step-2" + "complete checkpoint: none; make room or mend it, then start again", id="save"
        ),
        pytest.param(
            "2712k",
            SAVE % "step-6" + "complete checkpoint: step-4; make room or mend it, then start again",
            id="last save",
        ),
    ],
)
def test_a_full_disk_is_one_line(disk: Disk, size: str, told: str) -> None:
    done = disk.run(size, "train")
    assert done.returncode == 1
    assert done.stderr == f"error: {told.format(disk=disk.folder)}\n"


def test_what_a_killed_save_left_makes_room_for_the_next_start(disk: Disk) -> None:
    """The disk is filled by it to the last byte, and there is no room for the lock either."""
    left = "run/checkpoints/step-4.tmp"
    fill = f"mkdir -p {left} && cat /dev/zero > {left}/__0_0.distcp 2> /dev/null; rm -f run/run.lock;"
    done = disk.run("4m", f"train --training.steps=2 && {fill} df . --output=avail | tail -1 && train")
    assert done.returncode == 0, done.stderr
    assert any(line.strip() == "0" for line in done.stdout.splitlines()), "there was no room at all"
    assert "resumed from" in done.stdout and "step 6/6" in done.stdout and "Traceback" not in done.stderr
