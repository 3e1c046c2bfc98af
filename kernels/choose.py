"""The one choice between backends, for every operator.

Two kinds of reasons bar a backend. A call that it cannot compute, or computes wrongly, is refused always. A call that
it computes in a way nobody asked for is refused only to "auto"; whoever names the backend gets it.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import logging
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn

from torchlinearmoe.errors import UserError
from torchlinearmoe.kernels.operator import Backend, Call, Operator, Version, legal_names, operators
from torchlinearmoe.segments import Segments

logger = logging.getLogger("torchlinearmoe.kernels")

_chosen: dict[str, tuple[str, str]] = {}
_answers: dict[tuple[Any, ...], tuple[str, str]] = {}
"""What `decide` said, by everything that it depends on: eager calls ask at every layer."""


KernelCall = tuple[Operator, str, Call]
"""An operator, the name that a recipe asks for, and the call."""


@runtime_checkable
class CallsKernels(Protocol):
    """A module that says beforehand what it will call."""

    def kernel_calls(self, device: str, dtype: torch.dtype) -> Iterable[KernelCall]:
        """The calls whose backend the recipe may name; device: its type; dtype: what is computed in."""
        ...


@dataclass(frozen=True)
class Machine:
    """What decides between backends besides the call itself."""

    capability: tuple[int, int]
    """CUDA compute capability of the current device; (0, 0) without one."""
    triton: Version
    """Installed Triton; () without one."""
    missing: frozenset[str]
    """Modules that some backend needs and that cannot be imported."""
    deterministic: bool
    """torch.use_deterministic_algorithms is on."""


def chosen_backends() -> dict[str, tuple[str, str]]:
    """{operator and kind: (backend, reason)} of everything that was chosen so far, as chosen last."""
    return dict(sorted(_chosen.items()))


def choose(operator: Operator, requested: str, call: Call) -> Backend:
    """The backend that computes `call`; `requested` is "auto" or a name. UserError, in one line, where none may."""
    name, refusal = _choose(
        operator.name,
        requested,
        call.kind,
        call.device,
        call.dtype,
        call.channels,
        call.gradients and torch.is_grad_enabled(),
        call.states,
        call.single,
        torch.compiler.is_compiling(),
    )
    if refusal:
        raise UserError(refusal)
    return operator.backends[name]


@torch.compiler.assume_constant_result
def _choose(
    operator_name: str,
    requested: str,
    kind: str,
    device: str,
    dtype: torch.dtype,
    channels: int,
    gradients: bool,
    states: bool,
    single: bool,
    compiling: bool,
) -> tuple[str, str]:
    """A name and "", or "" and the line that says why not.

    The arguments are plain because torch.compile takes the answer for a constant of them.
    """
    facts = (operator_name, requested, kind, device, dtype, channels, gradients, states, single, compiling)
    known = (*facts, torch.are_deterministic_algorithms_enabled(), this_machine)
    if known not in _answers:
        operator, call = operators()[operator_name], Call(kind, device, dtype, channels, gradients, states, single)
        _answers[known] = decide(operator, requested, call, this_machine(), compiling)
    name, reason = _answers[known]
    if not name:
        return "", reason
    _record(operators()[operator_name], kind, single, name, reason)
    return name, ""


def _record(operator: Operator, kind: str, single: bool, name: str, reason: str) -> None:
    label = operator.label(kind) + (", one token" if single else "")
    if _chosen.get(label) != (name, reason):
        _chosen[label] = (name, reason)
        logger.info("%s runs on the %s backend: %s", label, name, reason)


def decide(
    operator: Operator, requested: str, call: Call, machine: Machine, compiling: bool = False
) -> tuple[str, str]:
    """(name, why) of the backend for `call`, or ("", the line that refuses it)."""
    backends = [b for b in operator.find_backends().values() if call.kind in b.kinds and b.single == call.single]
    if requested != "auto" and not call.single:
        return _named(operator, requested, call, machine)
    if compiling and (name := _under_the_compiler(backends, call, machine)):
        return name, "torch.compile fuses it" if operator.backends[name].fused else "an operator of the compiler"
    refusals = []
    for backend in sorted((b for b in backends if b.order is not None), key=_order, reverse=True):
        refusal = refuse(backend, call, machine, auto=True)
        if refusal is None:
            return backend.name, "; ".join(refusals) or ("the only one" if len(backends) == 1 else "preferred")
        # The way out is for those who named the backend.
        refusals.append(f"not {backend.name}: {refusal.partition('; ')[0]}")
    return "", f"{operator.label(call.kind)}: nothing computes it here: {'; '.join(refusals)}"


def _under_the_compiler(backends: list[Backend], call: Call, machine: Machine) -> str:
    """The first that the compiler fuses or that is faster than what it would fuse; "" where there is none."""
    known = sorted((b for b in backends if b.order is not None and (b.fused or b.graphed)), key=_order, reverse=True)
    return next((b.name for b in known if b.fused or refuse(b, call, machine, auto=True) is None), "")


def _named(operator: Operator, name: str, call: Call, machine: Machine) -> tuple[str, str]:
    key, backends = operator.key or operator.name, operator.find_backends()
    legal = legal_names(operator.key) if operator.key else [n for n, b in backends.items() if not b.single]
    if name not in legal:
        return "", f"{key} = {name!r}: legal: {', '.join(legal)}"
    backend = backends.get(name)
    others = [b for b in backends.values() if call.kind in b.kinds and not b.single and b.order is not None]
    last = min(others, key=_order).name
    use = f"use 'auto' or '{last}'"
    if backend is None or call.kind not in backend.kinds:
        computed = sorted(
            other.label(kind)
            for other in operators().values()
            if other.key == operator.key and name in other.find_backends()
            for kind in other.backends[name].kinds
        )
        refusal = f"it computes {', '.join(computed)}; {use}"
    else:
        refusal = refuse(backend, call, machine, auto=False)
        refusal = refusal and (refusal if "; " in refusal else f"{refusal}; {use}")
    return (name, "asked for") if refusal is None else ("", f"{key} = '{name}': cannot compute "
                                                        f"{operator.label(call.kind)}: {refusal}")  # fmt: skip


def _order(backend: Backend) -> int:
    return backend.order or 0


def refuse(backend: Backend, call: Call, machine: Machine, *, auto: bool) -> str | None:
    """Why `backend` must not take `call`, as "reason; way out" or the reason alone; None when it may.

    With `auto` a defect of the backward pass also bars calls without gradients, so that a model is evaluated by the
    kernels that train it.
    """
    if backend.devices is not None and call.device not in backend.devices:
        wanted = "a CUDA device" if backend.devices == {"cuda"} else " or ".join(sorted(backend.devices))
        return f"it needs {wanted}, the tensors are on the {call.device}"
    missing = [name for name in backend.needs if name in machine.missing]
    if missing:
        return f"{', '.join(missing)} cannot be imported; {backend.install}, or use 'auto'"
    if call.dtype not in backend.dtypes:
        return f"it does not take {str(call.dtype).removeprefix('torch.')}"
    if (refusal := backend.refuses(call)) is not None:
        return refusal
    for defect in backend.defects:
        if (
            call.kind in defect.kinds
            and defect.above < call.channels <= defect.channels
            and call.dtype in defect.dtypes
            and defect.capability[0] <= machine.capability < defect.capability[1]
            and defect.triton[0] <= machine.triton < defect.triton[1]
            and (call.gradients or auto or not defect.backward_only)
        ):
            return f"{defect.reason}; {defect.way_out}"
    if auto and not backend.exact and call.dtype == torch.float32:
        return f"its matrix products would round float32 to TF32; name '{backend.name}' to accept that"
    if auto and not backend.exact and machine.deterministic:
        return (
            f"its tuning may differ from run to run, training.deterministic is on; name '{backend.name}' to accept that"
        )
    return None


def check(calls: Iterable[KernelCall], compiling: bool = False) -> list[Backend]:
    """Choose for calls that will be made, ahead of the first: UserError, in one line, for the first that cannot."""
    chosen = []
    for operator, requested, call in calls:
        name, reason = decide(operator, requested, call, this_machine(), compiling)
        if not name:
            raise UserError(reason)
        _record(operator, call.kind, call.single, name, reason)
        chosen.append(operator.backends[name])
    return chosen


def calls_of(model: nn.Module, device: str, dtype: torch.dtype) -> list[KernelCall]:
    """What the modules of `model` will call when they compute on a device of that type in `dtype`."""
    modules = (module for module in model.modules() if isinstance(module, CallsKernels))
    return [call for module in modules for call in module.kernel_calls(device, dtype)]


def check_modules(model: nn.Module, device: str, dtype: torch.dtype, compiling: bool = False) -> None:
    """`check` what the modules of `model` will call."""
    check(calls_of(model, device, dtype), compiling)


def views_of(model: nn.Module, device: str, dtype: torch.dtype) -> tuple[Callable[[Segments], Any], ...]:
    """What makes the views that compiled regions of `model` read, ahead of them: all layers then share one."""
    backends = check(calls_of(model, device, dtype), compiling=True)
    return tuple(dict.fromkeys(backend.prepare for backend in backends if backend.prepare is not None))


def this_machine() -> Machine:
    """The machine as it is now; versions and the device are looked up once."""
    return Machine(_capability(), _triton(), _missing(), torch.are_deterministic_algorithms_enabled())


@functools.cache
def _capability() -> tuple[int, int]:
    return torch.cuda.get_device_capability() if torch.cuda.is_available() else (0, 0)


@functools.cache
def _missing() -> frozenset[str]:
    needed = {name for operator in operators().values() for b in operator.find_backends().values() for name in b.needs}
    return frozenset(name for name in needed if not _is_there(name))


def _is_there(name: str) -> bool:
    """Whether a module can be imported; what it lies in is, if there is any."""
    try:
        return importlib.util.find_spec(name) is not None
    except ImportError:
        return False


@functools.cache
def _triton() -> Version:
    if importlib.util.find_spec("triton") is None:
        return ()
    try:
        text = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:  # built or renamed by the distributor
        text = importlib.import_module("triton").__version__
    return parse_version(text)


def parse_version(text: str) -> Version:
    """The leading numbers of a version: "3.6.0+git1" is (3, 6, 0)."""
    found = re.match(r"\d+(\.\d+)*", text)
    return tuple(int(part) for part in found.group().split(".")) if found else ()
