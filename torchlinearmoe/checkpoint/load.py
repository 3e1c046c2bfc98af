"""Loading a checkpoint into a model and its optimizers, whatever layout either has.

Everything that can be wrong is found before the first tensor is touched: each rank compares the checkpoint's index with
what it holds, the ranks exchange what they found, and all raise the same line. After that only the disk can fail.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import CheckpointException, Metadata
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.optim import Optimizer

from torchlinearmoe.checkpoint.folder import damage, one_line, read_extra, read_state
from torchlinearmoe.checkpoint.nonfinite import nonfinite_names, tell_nonfinite
from torchlinearmoe.checkpoint.state import (
    MODEL,
    OPTIMIZER,
    OptimizerTargets,
    as_optimizers,
    as_parts,
    model_entries,
    model_tensors,
)
from torchlinearmoe.checkpoint.storage import (
    CheckpointError,
    CheckpointReader,
    expect_one_process,
    missing_data,
    read_metadata,
)
from torchlinearmoe.optim.masters import write_master


class _Report(NamedTuple):
    """What one rank found: the first problem, or the checkpoint keys that it will load."""

    problem: str | None
    keys: set[str]


def load_model_weights(path: str | Path, model: nn.Module) -> dict[str, Any]:
    """Load the weights of the checkpoint ``path`` into ``model`` in place, in this process alone; no optimizer.

    Returns:
        The ``extra`` of the checkpoint, with its ``step``.

    Raises:
        CheckpointError: ``path`` is not a complete checkpoint, or a key or shape differs (one line, naming it).
    """
    return load(path, model, None, group=None)


def check_fits(path: str | Path, model: nn.Module) -> None:
    """Raise CheckpointError unless the checkpoint ``path`` is complete and fits ``model``, which may be meta."""
    metadata = read_metadata(Path(path))
    try:
        if missing := missing_data(Path(path), metadata):
            raise CheckpointError(missing)
        targets = _model_targets([model], metadata)
        if surplus := _surplus(metadata, set(targets), with_optimizer=False):
            raise CheckpointError(surplus)
    except CheckpointError as error:
        raise CheckpointError(f"checkpoint {path}: {error}") from None


def load(
    path: str | Path,
    model: nn.Module | Sequence[nn.Module],
    optimizer: Optimizer | Sequence[Optimizer] | None,
    *,
    group: dist.ProcessGroup | None,
    compared: bool = False,
) -> dict[str, Any]:
    """Load the checkpoint ``path`` in place; every rank of ``group`` calls it, None is one process by itself.

    Args:
        model: the model, or the parts of it that this rank holds; parameters may be DTensors of any layout.
        optimizer: its optimizer or optimizers, fresh or used; None loads weights only.
        compared: its files were compared with their checksums a moment ago.

    Returns:
        The ``extra`` of the checkpoint, with its ``step``.

    Raises:
        CheckpointError: on every rank, with the same line naming the key, shape or file that is missing or differs.
    """
    path, parts, optimizers = Path(path), as_parts(model), as_optimizers(optimizer)
    targets: dict[str, Tensor] = {}
    metadata, moments, found = None, None, None
    try:
        metadata = read_metadata(path)
        if missing := missing_data(path, metadata):
            raise CheckpointError(missing)
        targets = _model_targets(parts, metadata)
        if optimizers:
            without = read_state(path).without_optimizer_state
            if without is None:
                raise CheckpointError(
                    "it was saved without optimizer state; start from it with checkpoint.init_from instead"
                )
            moments = OptimizerTargets(parts, optimizers, metadata, without)
            targets |= moments.tensors
        share = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
        if not compared and (changed := damage(path, *share)):
            raise CheckpointError(changed)
    except CheckpointError as error:
        found = str(error)
    reports = _exchange(_Report(found, set(targets)), group)
    if problem := _first_problem(reports, metadata, with_optimizer=bool(optimizers)):
        prefix = f"checkpoint {path}: "
        raise CheckpointError(problem if problem.startswith(prefix) else prefix + problem)
    assert metadata is not None

    if group is None:
        expect_one_process()
    try:
        dcp.load(
            targets,
            storage_reader=CheckpointReader(path, metadata),
            planner=DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
            process_group=group,
            no_dist=group is None,
        )
    except CheckpointException as error:  # a BaseException
        raise CheckpointError(f"checkpoint {path}: {describe_failure(error)}") from None
    for part in parts:  # where it was not loaded in place: halves, and a name that several parts have
        for key, entry in model_entries(part).items():
            write_master(entry, targets[key])
    if moments:
        moments.hand_over()
    weights = {key: tensor for key, tensor in targets.items() if key.startswith(MODEL)}
    bad = nonfinite_names(weights, group)
    if group is None or dist.get_rank(group) == 0:
        tell_nonfinite(f"checkpoint {path}", bad, sum(key.startswith(MODEL) for key in metadata.state_dict_metadata))
    return read_extra(path)


def describe_failure(error: BaseException) -> str:
    """One line for a failed save or load: of a failure on several ranks, the first one."""
    if isinstance(error, CheckpointException) and error.failures:
        rank, (cause, _) = min(error.failures.items(), key=lambda item: item[0])
        return f"{one_line(cause)} (rank {rank})"
    return str(error) if isinstance(error, CheckpointError) else one_line(error)


def _model_targets(parts: Iterable[nn.Module], metadata: Metadata) -> dict[str, Tensor]:
    """The model's tensors by checkpoint key, after comparing them with the index."""
    targets: dict[str, Tensor] = {}
    for part in parts:
        targets |= model_tensors(part)
    for key, tensor in targets.items():
        entry = metadata.state_dict_metadata.get(key)
        if not isinstance(entry, TensorStorageMetadata):
            raise CheckpointError(f"it has no '{key}'")
        if entry.size != tensor.shape:
            raise CheckpointError(f"'{key}' has shape {list(entry.size)}, the model's has {list(tensor.shape)}")
    return targets


def _exchange(report: _Report, group: dist.ProcessGroup | None) -> list[_Report]:
    if group is None:
        return [report]
    reports: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(reports, report, group=group)
    return reports


def _first_problem(reports: Sequence[_Report], metadata: Metadata | None, *, with_optimizer: bool) -> str | None:
    """The problem of the lowest rank that has one, else what the checkpoint holds and no rank asks for."""
    for report in reports:
        if report.problem:
            return report.problem
    assert metadata is not None
    return _surplus(metadata, set[str]().union(*(report.keys for report in reports)), with_optimizer=with_optimizer)


def _surplus(metadata: Metadata, wanted: set[str], *, with_optimizer: bool) -> str | None:
    """What the checkpoint holds and nobody wants."""
    prefixes = (MODEL, OPTIMIZER) if with_optimizer else (MODEL,)
    unwanted = sorted(key for key in metadata.state_dict_metadata if key.startswith(prefixes) and key not in wanted)
    if unwanted:
        more = f" and {len(unwanted) - 1} more" if len(unwanted) > 1 else ""
        return f"it holds '{unwanted[0]}'{more}, which the {unwanted[0].split('.')[0]} has not"
    return None
