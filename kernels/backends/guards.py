"""Which backend may not take which call on which machine, and why.

Two kinds of reasons. A call that a backend cannot compute, or computes wrongly, is refused always. A call that it
computes in a way nobody asked for is refused only to "auto"; whoever names the backend gets it.
"""

import functools
import importlib.metadata
import importlib.util
import re
from dataclasses import dataclass

import torch

from torchlinearmoe.kernels.backends.call import DELTA, LINEAR, Call

Version = tuple[int, ...]


@dataclass(frozen=True)
class Machine:
    """What decides between backends besides the call itself."""

    capability: tuple[int, int]
    """CUDA compute capability of the current device; (0, 0) without one."""
    triton: Version
    """Installed Triton; () without one."""
    packages: frozenset[str]
    """Those of the packages below that can be imported."""
    deterministic: bool
    """torch.use_deterministic_algorithms is on."""


@dataclass(frozen=True)
class Package:
    """Where a backend comes from and what it computes."""

    modules: tuple[str, ...]
    """Top-level modules that must be importable."""
    install: str
    operators: frozenset[str]
    inexact: bool = True
    """It rounds float32 to TF32, and is tuned by timings, which differ from run to run."""


PACKAGES = {
    "fla": Package(
        ("fla", "triton", "einops"),
        "pip install fla-core",
        frozenset((*LINEAR, *DELTA, "dplr_rule", "slot_attention", "ssd")),
    ),
    "mamba_ssm": Package(
        ("mamba_ssm", "triton", "einops"), "pip install --no-build-isolation mamba-ssm", frozenset(("ssd",))
    ),
    "triton": Package(
        ("triton",), "pip install triton", frozenset(("identity", "constant", "scalar", "ssd")), inexact=False
    ),
}


@dataclass(frozen=True)
class Defect:
    """A combination of versions under which a backend refuses an operator or computes it wrongly."""

    backend: str
    operators: frozenset[str]
    capability: tuple[Version, Version]
    """From (inclusive) to (exclusive)."""
    triton: tuple[Version, Version]
    """From (inclusive) to (exclusive)."""
    backward_only: bool
    reason: str
    way_out: str
    channels: int = 2**30
    """Only calls with keys of at most so many channels."""


DEFECTS = (
    Defect(
        backend="fla",
        operators=frozenset(("scalar", "gated_delta", "ssd")),
        capability=((9, 0), (10, 0)),
        triton=((3, 4, 0), (3, 7, 1)),
        backward_only=True,
        reason="Triton 3.4.0 to 3.7.0 miscompiles its backward pass on Hopper GPUs "
        "(https://github.com/fla-org/flash-linear-attention/issues/640)",
        way_out="install Triton 3.7.1 or newer, or use 'auto' or 'torch'",
    ),
    Defect(
        backend="fla",
        operators=frozenset(("identity", "constant", "delta")),
        capability=((9, 0), (10, 0)),
        triton=((3, 4, 0), (3, 7, 1)),
        backward_only=True,
        # Seen with Triton 3.6.0, 32 channels of keys and 64 of values, under some of the tuner's configurations.
        reason="the same backward pass reads outside its tensors for keys of at most 32 channels on Hopper GPUs",
        way_out="install Triton 3.7.1 or newer, or use 'auto' or 'torch'",
        channels=32,
    ),
)


def refusal(backend: str, call: Call, machine: Machine, *, auto: bool) -> str | None:
    """Why `backend`, a key of `PACKAGES`, must not take `call`, as "reason; way out"; None when it may.

    With `auto` a defect of the backward pass also bars calls without gradients, so that a model is evaluated by the
    kernels that train it.
    """
    package = PACKAGES[backend]
    if call.operator not in package.operators:
        return f"it computes {', '.join(sorted(package.operators))}; use 'auto' or 'torch'"
    if call.device != "cuda":
        return f"it needs a CUDA device, the tensors are on the {call.device}; use 'auto' or 'torch'"
    missing = [name for name in package.modules if name not in machine.packages]
    if missing:
        return f"{', '.join(missing)} cannot be imported; {package.install}, or use 'auto' or 'torch'"
    if call.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"it does not take {_name(call.dtype)}; use 'auto' or 'torch'"
    operator = _lowered(backend, call)
    if call.channels > 256 and operator in (*DELTA, "dplr_rule"):
        return "its delta rule takes keys of at most 256 channels; use 'auto' or 'torch'"
    for defect in DEFECTS:
        if (
            defect.backend == backend
            and operator in defect.operators
            and call.channels <= defect.channels
            and defect.capability[0] <= machine.capability < defect.capability[1]
            and defect.triton[0] <= machine.triton < defect.triton[1]
            and (call.gradients or auto or not defect.backward_only)
        ):
            return f"{defect.reason}; {defect.way_out}"
    if auto and package.inexact and call.dtype == torch.float32:
        return f"its matrix products would round float32 to TF32; name '{backend}' to accept that"
    if auto and package.inexact and machine.deterministic:
        return f"its tuning may differ from run to run, training.deterministic is on; name '{backend}' to accept that"
    return None


def _lowered(backend: str, call: Call) -> str:
    """The operator whose kernels compute `call`: fla's plain delta rule refuses float32, its gated one takes it."""
    if backend == "fla" and call.operator == "delta" and call.dtype == torch.float32:
        return "gated_delta"
    return call.operator


def this_machine() -> Machine:
    """The machine as it is now; versions and the device are looked up once."""
    return Machine(_capability(), _triton(), _importable(), torch.are_deterministic_algorithms_enabled())


@functools.cache
def _capability() -> tuple[int, int]:
    return torch.cuda.get_device_capability() if torch.cuda.is_available() else (0, 0)


@functools.cache
def _importable() -> frozenset[str]:
    names = {name for package in PACKAGES.values() for name in package.modules}
    return frozenset(name for name in names if importlib.util.find_spec(name) is not None)


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


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
