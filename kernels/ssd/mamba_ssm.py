"""mamba-ssm's state space dual scan (written against 2.3.2).

Segments travel as an index per token, which knows no states: where states go in or out, they become padded rows. A
padding token has step 0: it neither decays nor writes.

Legend: T tokens, H heads, G groups, K state dim, V head dim, N segments.
"""

import functools
import importlib
import importlib.util
import sys
import types
from collections.abc import Callable

import torch
from torch import Tensor

from torchlinearmoe.kernels.operator import NARROW, Backend, outside_graphs
from torchlinearmoe.kernels.rows import rows_of
from torchlinearmoe.segments import Segments

CHUNK_SIZE = 256


@outside_graphs
def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    segments: Segments,
    initial_state: Tensor | None,
    want_final: bool,
) -> tuple[Tensor, Tensor | None]:
    """As `definition.ssd`."""
    tokens = [x, dt.float(), B.to(x.dtype), C.to(x.dtype)]
    rows = rows_of(segments) if initial_state is not None or want_final else None
    tokens = [part[None] if rows is None else rows.split(part) for part in tokens]
    x, dt, B, C = (part.contiguous() for part in tokens)
    initial = None if initial_state is None or rows is None else rows.select(initial_state).mT.contiguous()
    found = _load()(
        x,
        dt,
        A.float(),
        B,
        C,
        CHUNK_SIZE,
        initial_states=initial,
        seq_idx=segments.ids.to(torch.int32)[None].contiguous() if rows is None else None,
        return_final_states=want_final,
    )
    y, final = found if want_final else (found, None)
    if rows is None:
        return y[0], None
    return rows.join(y), None if final is None else rows.restore(final.float().mT, initial_state)


@functools.cache
def _load() -> Callable:
    """The scan. The package imports its CUDA extension at once, which the scan does not need: without the extension
    an empty package stands in, for the rest of the process."""
    try:
        importlib.import_module("mamba_ssm")
    except ImportError:
        spec = importlib.util.find_spec("mamba_ssm")
        assert spec is not None and spec.submodule_search_locations is not None
        stub = types.ModuleType("mamba_ssm")
        stub.__spec__ = spec
        stub.__path__ = list(spec.submodule_search_locations)
        sys.modules["mamba_ssm"] = stub
    return importlib.import_module("mamba_ssm.ops.triton.ssd_combined").mamba_chunk_scan_combined


BACKEND = Backend(
    "mamba_ssm",
    ssd,
    ("ssd",),
    order=20,
    dtypes=NARROW,
    devices=frozenset(("cuda",)),
    needs=("mamba_ssm", "triton", "einops"),
    install="pip install --no-build-isolation mamba-ssm",
    exact=False,
)
