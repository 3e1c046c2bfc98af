"""Saving while training goes on.

One save, seen from every rank:

    main thread                              saving thread
    -----------                              -------------
    save(): wait for the previous save
            copy the state to the CPU
            start the thread           -->   rank 0 makes step-N.tmp, and says so
    training goes on                         every rank writes, sums and syncs its tensors; rank 0: .metadata
                                             rank 0 adds state.json and the files, syncs, renames to step-N, and says so
    wait() / next save(): join         <--   (rank 0 deletes checkpoints beyond `keep`)

The ranks talk through a gloo group of the manager's own, never through a group of the training. That group has one
user at a time: the saving thread while there is one, else the main thread, which joins the thread first. Every rank
calls the same methods in the same order, so the collectives of all ranks meet in the same order.

Each step that one rank does for all ends with a broadcast of its outcome, and each step that all do ends with an
exchange of failures (torch's distributed checkpoint does that). So a failed save fails on every rank, and every rank
raises it from its next call.
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, TypeVar

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.optim import Optimizer

from torchlinearmoe.checkpoint import folder
from torchlinearmoe.checkpoint.load import describe_failure, load
from torchlinearmoe.checkpoint.state import Staging, as_optimizers, as_parts, model_entries, optimizer_tensors
from torchlinearmoe.checkpoint.storage import CheckpointError, Writer, expect_one_process

T = TypeVar("T")


class CheckpointManager:
    """Saves, finds and loads the checkpoints `step-N` of one folder.

    Made by every rank of the default process group together (it makes a group of its own), or by one process without
    any. As a context manager it finishes the save in flight on the way out.

    Args:
        directory: the folder, shared by all ranks; made by the first save.
        keep: how many of the checkpoints saved last to keep, at least 1.
    """

    def __init__(self, directory: str | Path, keep: int) -> None:
        if keep < 1:
            raise ValueError(f"keep={keep} must be at least 1")
        self.directory = Path(directory)
        self.keep = keep
        self._group: dist.ProcessGroup | None = None
        self._rank = 0
        if dist.is_initialized():
            group = dist.new_group(backend="gloo")
            assert isinstance(group, dist.ProcessGroup)  # all ranks are members
            self._group, self._rank = group, dist.get_rank()
        self._staging = Staging()
        self._thread: threading.Thread | None = None
        self._failure: str | None = None
        self._sound: Path | None = None
        self._damaged: set[Path] = set()

    def __enter__(self) -> "CheckpointManager":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.wait()
        elif self._thread is not None:  # the error on its way out matters more than that of the save
            self._thread.join()

    def save(
        self,
        step: int,
        model: nn.Module | Sequence[nn.Module],
        optimizer: Optimizer | Sequence[Optimizer] | None,
        extra: Mapping[str, Any],
        files: Mapping[str, str | bytes] | None = None,
        *,
        blocking: bool = False,
    ) -> None:
        """Save the state as it is now under `step-N`; the model may change as soon as this returns.

        Waits for a save still in flight. An existing `step-N` is replaced once the new one is complete.

        Args:
            step: optimizer steps taken, the N of the name.
            model: the model, or the parts of it that this rank holds.
            optimizer: its optimizer or optimizers; None saves weights only.
            extra: small state that `load` returns: numbers, strings, lists, dicts. That of rank 0 is kept.
            files: name inside the checkpoint -> contents (recipe, tokenizer). Those of rank 0 are kept.
            blocking: return when the checkpoint is visible.

        Raises:
            CheckpointError: the previous save failed (on every rank), or ``extra`` or ``files`` cannot be kept.
        """
        self.wait()
        files = dict(files or {})
        folder.check_file_names(files)
        extra = folder.snapshot(extra)
        parts, optimizers = as_parts(model), as_optimizers(optimizer)
        moments, without = optimizer_tensors(parts, optimizers)
        tensors = dict(moments)
        for part in parts:
            tensors |= model_entries(part)
        staged = self._staging.copy(tensors)
        stateless = set(without) if optimizers else None
        arguments = (step, staged, stateless, extra, files)
        self._thread = threading.Thread(target=self._write, args=arguments, name="checkpoint", daemon=True)
        self._thread.start()
        if blocking:
            self.wait()

    def wait(self) -> None:
        """Return when no save is in flight: the last one is visible, or its failure is raised here, once.

        Raises:
            CheckpointError: on every rank, if the save failed.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        failure, self._failure = self._failure, None
        if failure is not None:
            raise CheckpointError(failure)

    def latest(self) -> Path | None:
        """The sound checkpoint saved last, or None; the same on every rank.

        The ranks share out the files to compare. Rank 0 logs one line for each checkpoint that is passed over.
        """
        self.wait()
        found = self._on_rank_0(lambda: folder.candidates(self.directory))
        self._sound = folder.newest_sound(found, self._damage, aloud=self._rank == 0)
        return self._sound

    def newest(self) -> Path | None:
        """The complete checkpoint saved last, as this rank sees the folder; nothing is compared or said."""
        with suppress(OSError, CheckpointError):
            return next(iter(folder.candidates(self.directory).complete), None)
        return None

    def clear(self) -> None:
        """Delete what killed runs left behind; no save may be in flight."""
        self.wait()
        self._on_rank_0(lambda: folder.clear(self.directory))

    def resume_from(self, choice: Literal["latest", "never"] | str) -> Path | None:
        """The checkpoint that `checkpoint.resume` means, or None to start fresh; the same on every rank.

        Args:
            choice: ``latest``; ``never``, which refuses a folder that holds checkpoints; or a checkpoint's path.

        Raises:
            CheckpointError: on every rank; ``never`` in a used folder, or a path that is no sound checkpoint.
        """
        if choice == "latest":
            return self.latest()
        self.wait()
        path = self._on_rank_0(lambda: self._choose(choice))
        if path is not None and (why := self._damage(path)):
            raise CheckpointError(
                f"checkpoint.resume = '{choice}' is damaged: {why}; name another, or 'latest' for the newest sound one"
            )
        self._sound = path
        return path

    def load(
        self,
        path: str | Path,
        model: nn.Module | Sequence[nn.Module],
        optimizer: Optimizer | Sequence[Optimizer] | None = None,
    ) -> dict[str, Any]:
        """Load the checkpoint ``path`` in place, saved from any layout; returns its ``extra`` with its ``step``.

        Raises:
            CheckpointError: on every rank, with the same line naming the key, shape or file that is missing or differs.
        """
        self.wait()
        compared, self._sound = Path(path) == self._sound, None
        return load(path, model, optimizer, group=self._group, compared=compared)

    def _damage(self, path: Path) -> str | None:
        """The first of what the ranks find wrong with the files of ``path``, each with its share of them."""
        ranks = 1 if self._group is None else dist.get_world_size(self._group)
        why = next(filter(None, self._gather(folder.damage(path, self._rank, ranks))), None)
        if why is not None:
            self._damaged.add(path)
        return why

    def _choose(self, choice: str) -> Path | None:
        if choice == "never":
            if folder.is_used(self.directory):
                raise CheckpointError(
                    f"checkpoint.resume = 'never' needs an unused folder, but {self.directory} holds checkpoints"
                )
            return None
        path = Path(choice)
        if why := folder.problem(path):
            raise CheckpointError(
                f"checkpoint.resume = '{choice}' is not 'latest', 'never' or a complete checkpoint: {why}"
            )
        return path

    def _write(
        self,
        step: int,
        tensors: dict[str, Tensor],
        stateless: set[str] | None,
        extra: dict[str, Any],
        files: Mapping[str, str | bytes],
    ) -> None:
        """The saving thread, see the top of the file."""
        try:
            temporary, serial = self._on_rank_0(lambda: folder.prepare(self.directory, step))
            if self._group is None:
                expect_one_process()
            writer = Writer(temporary)
            dcp.save(
                tensors,
                storage_writer=writer,
                planner=DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
                process_group=self._group,
                no_dist=self._group is None,
            )
            written = self._gather((stateless, writer.sums))
            without = None if stateless is None else sorted(set[str]().union(*(names or () for names, _ in written)))
            sums = {name: entry for _, found in written for name, entry in found.items()}
            state = folder.State(step, serial, without, extra)
            self._damaged.discard(self._on_rank_0(lambda: folder.publish(temporary, files, state, sums)))
        except BaseException as error:  # torch's CheckpointException is one
            why = describe_failure(error)
            if isinstance(error, (CheckpointError, CheckpointException)):  # all ranks live and know of it
                with suppress(CheckpointError):
                    self._on_rank_0(lambda: folder.clear(self.directory))
            kept = self.newest()
            self._failure = (
                f"checkpoint {self.directory}/step-{step} was not saved: {why}; last complete checkpoint: "
                f"{kept.name if kept else 'none'}; make room or mend it, then start again"
            )
            return
        try:
            self._on_rank_0(lambda: folder.retain(self.directory, self.keep, self._damaged))
        except CheckpointError as error:
            self._failure = f"checkpoint step-{step} was saved, but old ones were not deleted: {error}"

    def _on_rank_0(self, action: Callable[[], T]) -> T:
        """Rank 0 does ``action``; every rank returns its result or raises its failure."""
        outcome: list[Any] = [None, None]
        if self._rank == 0:
            try:
                outcome[0] = action()
            except CheckpointError as error:
                outcome[1] = str(error)
            except Exception as error:
                outcome[1] = folder.one_line(error)
        if self._group is not None:
            dist.broadcast_object_list(outcome, src=0, group=self._group)
        if outcome[1] is not None:
            raise CheckpointError(outcome[1])
        return outcome[0]

    def _gather(self, own: T) -> list[T]:
        """What every rank has; the parts of a pipeline hold different tensors."""
        if self._group is None:
            return [own]
        every: list[Any] = [None] * dist.get_world_size(self._group)
        dist.all_gather_object(every, own, group=self._group)
        return every
