"""A stand-in for Triton's driver: kernels are compiled for a GPU that is not there, and not run.

What a launch would do is done (specialisation, compilation, the check of shared memory); tensors are on the CPU and
their contents stay as they are.
"""

from __future__ import annotations

import subprocess
import tempfile
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from unwritten import unwritten


@dataclass
class FakeGPU:
    """One of the CUDA capability `capability` (90 for 9.0) with so many bytes of shared memory a block."""

    capability: int
    shared: int
    compiled: list[str] = field(default_factory=list)
    """Names of the kernels, as often as they were compiled."""
    faults: dict[str, list[str]] | None = None
    """Given a dict: what each kernel reads that nothing wrote, by the same names."""
    resources: dict[str, str] | None = None
    """Given a dict: what each kernel takes, as cuobjdump says, by name and its place in `compiled`."""

    def install(self) -> FakeGPU:
        """Make Triton's runtime of this process take it for its driver."""
        triton.runtime.driver.set_active(self)  # pyright: ignore[reportArgumentType]
        return self

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> str:
        return "cpu"

    def map_python_to_cpp_type(self, name: str) -> str:
        return name

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        return lambda *arguments, **options: None

    @property
    def utils(self) -> SimpleNamespace:
        return SimpleNamespace(
            load_binary=self._load,
            unload_module=lambda module: None,
            get_device_properties=lambda device: {"max_shared_mem": self.shared, "multiprocessor_count": 132},
        )

    def _load(self, name: str, binary: bytes, shared: int, device: int) -> tuple[int, int, int, int, int]:
        assert len(binary) > 0
        if self.faults is not None and (found := unwritten(binary)):
            self.faults[f"{name} {len(self.compiled)}"] = found
        if self.resources is not None:
            self.resources[f"{name} {len(self.compiled)}"] = _resources(binary)
        self.compiled.append(name)
        return 1, 1, 128, 0, 1024


def _resources(binary: bytes) -> str:
    """The line with registers, stack and local memory: "REG:18 STACK:0 SHARED:0 LOCAL:0 ..."."""
    with tempfile.NamedTemporaryFile() as file:
        file.write(binary)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return next(line.strip() for line in said.splitlines() if "REG:" in line)
