"""Looking inside a run on demand: a profiler trace over some steps, a snapshot of the GPU memory after one.

Both are entered around the loop and told, before each step, which one begins; neither does anything unless asked.

    with StepProfiler(folder, steps=(10, 12)) as profiler, MemorySnapshot(folder, step=5) as snapshot:
        for step in range(first, last + 1):
            profiler.begin(step)
            snapshot.begin(step)
            ...
"""

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import torch

from torchlinearmoe.errors import UserError

_SNAPSHOT_ENTRIES = 200_000


class StepProfiler:
    """Records steps `steps[0]` to `steps[1]`, both included, with torch.profiler.

    Every rank writes `folder/trace-rank{rank}-steps-{first}-{last}.json.gz`, to be opened in Perfetto or Chrome's
    trace viewer. A run resumed inside the window records the rest of it, and one that ends inside it what there was.

    Raises UserError unless `steps` is empty or None, or two numbers with 1 <= first <= last.
    """

    def __init__(self, folder: str | Path, steps: Sequence[int] | None, *, rank: int = 0) -> None:
        if steps and (len(steps) != 2 or not 1 <= steps[0] <= steps[1]):
            raise UserError(f"metrics.profile_steps = {list(steps)}: must be [first, last] with 1 <= first <= last")
        self._folder = Path(folder)
        self._window = (steps[0], steps[1]) if steps else None
        self._rank = rank
        self._profiler: torch.profiler.profile | None = None
        self._first = self._last = 0  # the steps really recorded

    def begin(self, step: int) -> None:
        """Step `step` is about to begin."""
        if self._window is None:
            return
        inside = self._window[0] <= step <= self._window[1]
        if self._profiler is not None and not inside:
            self._finish()
        if inside:
            if self._profiler is None:
                activities = [torch.profiler.ProfilerActivity.CPU]
                if torch.cuda.is_available():
                    activities.append(torch.profiler.ProfilerActivity.CUDA)
                self._profiler = torch.profiler.profile(activities=activities, record_shapes=True)
                self._profiler.start()
                self._first = step
            self._last = step

    def _finish(self) -> None:
        assert self._profiler is not None
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # the last step's kernels belong to the trace
        self._profiler.stop()
        self._folder.mkdir(parents=True, exist_ok=True)
        name = f"trace-rank{self._rank}-steps-{self._first}-{self._last}.json.gz"
        self._profiler.export_chrome_trace(str(self._folder / name))
        self._profiler = None

    def __enter__(self) -> "StepProfiler":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        if self._profiler is not None:
            self._finish()


class MemorySnapshot:
    """Records the CUDA allocator from the start and writes its state and history when step `step` is over.

    Every rank writes `folder/memory-rank{rank}-step-{step}.pickle`, to be opened at pytorch.org/memory_viz. A run that
    runs out of memory before writes at that moment, which is when one wants it.

    Raises UserError when asked on a device other than CUDA, or for a step below 1.
    """

    def __init__(self, folder: str | Path, step: int | None, *, device: torch.device | str, rank: int = 0) -> None:
        if step is not None and step < 1:
            raise UserError(f"metrics.memory_snapshot_step = {step}: must be at least 1")
        if step is not None and torch.device(device).type != "cuda":
            kind = torch.device(device).type
            raise UserError(f"metrics.memory_snapshot_step = {step}: needs a CUDA device, this run is on {kind}")
        self._folder = Path(folder)
        self._step = step
        self._rank = rank
        self._last = 0
        self._recording = False

    def begin(self, step: int) -> None:
        """Step `step` is about to begin."""
        if self._recording and self._step is not None and step > self._step:
            if self._last == self._step:
                self._write()
            self._stop()  # also when the run was resumed past the step
        self._last = step

    def _write(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        torch.cuda.memory._dump_snapshot(str(self._folder / f"memory-rank{self._rank}-step-{self._last}.pickle"))

    def _stop(self) -> None:
        torch.cuda.memory._record_memory_history(enabled=None)
        self._recording = False

    def __enter__(self) -> "MemorySnapshot":
        if self._step is not None:
            torch.cuda.memory._record_memory_history(max_entries=_SNAPSHOT_ENTRIES)
            self._recording = True
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        if self._recording:
            ended_at_the_step = error is None and self._last == self._step
            if ended_at_the_step or isinstance(error, torch.OutOfMemoryError):
                self._write()
            self._stop()
