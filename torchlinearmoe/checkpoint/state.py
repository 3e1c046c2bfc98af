"""Which tensors a checkpoint holds, and under which names.

    model.<parameter or buffer>                     model.layers.0.mixer.q_proj.weight
    optimizer.<parameter>.<entry of its state>      optimizer.layers.0.mixer.q_proj.weight.exp_avg

Names are those of the plain model, so they do not depend on sharding, wrappers, pipeline stages, or the grouping and
order of parameters in the optimizer. Hyper-parameters (lr, betas, weight decay) are not saved: the recipe has them.

A parameter that never got a gradient has no optimizer state; a checkpoint lists such parameters, so that on load a
missing state is told from an absent one.

A rank of a pipeline holds several model parts. They share one namespace; two parts that hold the same name (a table
shared between layers) hold equal values.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from torchlinearmoe.checkpoint.storage import CheckpointError
from torchlinearmoe.optim.masters import local_part, read_master

MODEL, OPTIMIZER = "model.", "optimizer."
_WRAPPERS = ("_checkpoint_wrapped_module.", "_orig_mod.")


def as_parts(model: nn.Module | Sequence[nn.Module]) -> list[nn.Module]:
    """``model`` as a list of model parts."""
    return [model] if isinstance(model, nn.Module) else list(model)


def as_optimizers(optimizer: Optimizer | Sequence[Optimizer] | None) -> list[Optimizer]:
    """``optimizer`` as a list."""
    if optimizer is None:
        return []
    return [optimizer] if isinstance(optimizer, Optimizer) else list(optimizer)


def plain_name(name: str) -> str:
    """``name`` of a parameter or buffer without what activation checkpointing and compilation put into it."""
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def model_entries(part: nn.Module) -> dict[str, Tensor]:
    """The parameters and persistent buffers of ``part`` by checkpoint key, themselves.

    What is saved under a key is the entry's master, see ``read_master``.
    """
    entries: dict[str, Tensor] = {}
    for name, value in part.state_dict(keep_vars=True).items():
        if not isinstance(value, Tensor):
            raise CheckpointError(f"model state '{name}' is a {type(value).__name__}; only tensors are saved")
        entries[MODEL + plain_name(name)] = value
    return entries


def model_tensors(part: nn.Module) -> dict[str, Tensor]:
    """What is saved of the model by checkpoint key. A master made of halves is a copy, all else shares memory."""
    return {key: read_master(entry) for key, entry in model_entries(part).items()}


def optimized_parameters(
    parts: Sequence[nn.Module], optimizers: Sequence[Optimizer]
) -> Iterator[tuple[str, nn.Parameter, Optimizer, dict[str, Any]]]:
    """Every parameter that the optimizers update: (name, parameter, its optimizer, its parameter group)."""
    names: dict[Tensor, str] = {}
    for part in parts:
        for name, parameter in part.named_parameters():
            names[parameter] = plain_name(name)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                assert parameter in names, "the optimizer holds a parameter of another model"
                yield names[parameter], parameter, optimizer, group


def optimizer_tensors(
    parts: Sequence[nn.Module], optimizers: Sequence[Optimizer]
) -> tuple[dict[str, Tensor], list[str]]:
    """The optimizers' state by checkpoint key, not copied, and the names of the parameters that have none.

    Raises:
        CheckpointError: an entry is neither a tensor of its parameter's shape nor a tensor without dimensions; the
            layout of any other is not known.
    """
    tensors: dict[str, Tensor] = {}
    without: list[str] = []
    for name, parameter, optimizer, _ in optimized_parameters(parts, optimizers):
        state = optimizer.state.get(parameter)
        if not state:
            without.append(name)
            continue
        for entry, value in state.items():
            if not isinstance(value, Tensor) or value.shape not in (parameter.shape, torch.Size()):
                raise CheckpointError(f"optimizer state '{entry}' of '{name}' is neither per element nor a number")
            tensors[f"{OPTIMIZER}{name}.{entry}"] = value
    return tensors, without


class OptimizerTargets:
    """Fresh optimizer state to load a checkpoint into, given to the optimizers only when the load has succeeded.

    Attributes:
        tensors: what to load, by checkpoint key.
    """

    def __init__(
        self, parts: Sequence[nn.Module], optimizers: Sequence[Optimizer], metadata: Metadata, without: Sequence[str]
    ) -> None:
        saved: dict[str, dict[str, TensorStorageMetadata]] = {}
        for key, entry in metadata.state_dict_metadata.items():
            if key.startswith(OPTIMIZER) and isinstance(entry, TensorStorageMetadata):
                name, _, state_name = key.removeprefix(OPTIMIZER).rpartition(".")
                saved.setdefault(name, {})[state_name] = entry

        self.tensors: dict[str, Tensor] = {}
        self._states: list[tuple[Optimizer, nn.Parameter, dict[str, str]]] = []
        for name, parameter, optimizer, group in optimized_parameters(parts, optimizers):
            entries = saved.get(name, {})
            if not entries and name not in without:
                raise CheckpointError(f"no optimizer state of '{name}'")
            for state_name, entry in entries.items():
                key = f"{OPTIMIZER}{name}.{state_name}"
                if state_name == "step" or (len(entry.size) == 0 and parameter.dim() > 0):
                    self.tensors[key] = _empty_number(parameter, group, entry)
                elif entry.size == parameter.shape:
                    self.tensors[key] = torch.zeros_like(parameter, dtype=entry.properties.dtype, requires_grad=False)
                else:
                    shapes = f"{list(entry.size)}, not {list(parameter.shape)}"
                    raise CheckpointError(f"optimizer state '{state_name}' of '{name}' has shape {shapes}")
            self._states.append((optimizer, parameter, {s: f"{OPTIMIZER}{name}.{s}" for s in entries}))

    def hand_over(self) -> None:
        """Replace the optimizers' state by the loaded one."""
        given: set[str] = set()
        for optimizer, parameter, keys in self._states:
            optimizer.state.pop(parameter, None)
            for state_name, key in keys.items():
                tensor = self.tensors[key]
                optimizer.state[parameter][state_name] = tensor.clone() if key in given else tensor
                given.add(key)


def _empty_number(parameter: nn.Parameter, group: dict[str, Any], entry: TensorStorageMetadata) -> Tensor:
    """A tensor without dimensions, on the device where the optimizer keeps its step counts."""
    return torch.zeros((), dtype=entry.properties.dtype, device=parameter.device)


class Staging:
    """Copies tensors to the CPU, into memory that it keeps from save to save.

    Memory kept is memory mapped: from an H100, copies after the first ran at 13 GB/s, the first at 1.1 GB/s.
    """

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    @torch.no_grad()
    def copy(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Copies of ``tensors`` as they are now, DTensors with their placements; valid until the next call.

        Of a weight with a rest, its master, one at a time.
        """
        copies: dict[str, Tensor] = {}
        for name, entry in tensors.items():
            tensor = read_master(entry)
            buffer = self._buffers.get(name)
            if buffer is None or _layout(buffer) != _layout(tensor):
                buffer = tensor.detach().to("cpu", copy=True)
            else:
                local_part(buffer).copy_(local_part(tensor))
            copies[name] = buffer
        self._buffers = copies
        return copies


def _layout(tensor: Tensor) -> tuple[Any, ...]:
    spec = (tensor.device_mesh, tensor.placements) if isinstance(tensor, DTensor) else ()
    return (tensor.shape, tensor.stride(), local_part(tensor).shape, tensor.dtype, *spec)
