"""One model: trained by the trainer, as a user's run is, and what came of it."""

from __future__ import annotations

import fcntl
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout

import torch

from torchlinearmoe.curves.cases import Case
from torchlinearmoe.curves.peer import train_peer
from torchlinearmoe.curves.results import FAILED, Outcome, is_done, measured, write_outcome
from torchlinearmoe.parallel.mesh import resolve_degrees
from torchlinearmoe.run_lock import locked
from torchlinearmoe.runtime import choose_device, process_group
from torchlinearmoe.trainer import Diverged, Trainer

LOG, CLAIM = "train.log", "claim"


def learn(case: Case, keep: bool = False) -> Outcome | None:
    """Train a model and write its outcome down; what its run says goes to `train.log`.

    `keep` keeps its checkpoint. Returns None where a signal stopped it: it goes on from there. What else goes wrong is
    raised, and told in the folder too, so that no other process tries again.
    """
    begun = time.perf_counter()
    training = case.recipe.training
    device = choose_device(training)
    diverged = False
    try:
        with (case.folder / LOG).open("w") as log, redirect_stdout(log), process_group(device), locked(case.folder):
            if case.theirs:
                train_peer(case.recipe, device)
            else:
                try:
                    if Trainer(case.recipe, resolve_degrees(case.recipe.parallel, 1), device).run():
                        return None
                except Diverged:
                    diverged = True
    except Exception as error:
        (case.folder / FAILED).write_text(f"{type(error).__name__}: {error}\n")
        raise
    finally:
        if training.compile:
            torch.compiler.reset()  # its caches hold the models of all runs, and give up after some
    if not keep:
        shutil.rmtree(case.folder / "checkpoints", ignore_errors=True)
    outcome = measured(case, diverged, time.perf_counter() - begun)
    write_outcome(case, outcome)
    return outcome


@contextmanager
def claimed(case: Case) -> Iterator[bool]:
    """Whether the case is this process's to train: not done, not failed, and no other process is at it."""
    case.folder.mkdir(parents=True, exist_ok=True)
    with (case.folder / CLAIM).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield not is_done(case) and not (case.folder / FAILED).exists()
