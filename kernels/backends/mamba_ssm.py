"""mamba-ssm's state space dual scan behind `ops.ssd` (written against 2.3.2).

The scan takes the step dt and multiplies both the decay rate and the input by it, as Mamba2 does. A general scalar
decay would have to be divided by the step first, which is unsafe where a decay is near one; so only `ssd`, whose
arguments are Mamba2's own, is offered.

Packed documents travel as an index per token, which knows no states: where states go in or out, documents become
padded rows. A padding token has step 0: it neither decays nor writes.

Legend: R rows, T tokens, H heads, G groups, K state dim, V head dim, N documents.
"""

import functools
import importlib
import importlib.util
import sys
import types
from collections.abc import Callable

import torch
from torch import Tensor

from torchlinearmoe.kernels.backends.borders import find_borders
from torchlinearmoe.kernels.backends.call import States, outside_graphs

CHUNK_SIZE = 256


@outside_graphs
def ssd(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, states: States) -> tuple[Tensor, Tensor | None]:
    """`ops.ssd`; x: [R, T, H, V], dt: [R, T, H], A: [H], B, C: [R, T, G, K]. Returns y and states [N, H, K, V]."""
    tokens = [x, dt.float(), B.to(x.dtype), C.to(x.dtype)]
    with_states = states.initial is not None or states.want_final
    borders = find_borders(states) if with_states else None
    initial = states.initial
    if borders is not None:
        tokens = [borders.rows(part) for part in tokens]
        initial = None if initial is None else borders.select(initial)
    x, dt, B, C = (part.contiguous() for part in tokens)
    found = _load()(
        x,
        dt,
        A.float(),
        B,
        C,
        CHUNK_SIZE,
        initial_states=None if initial is None else initial.float().mT.contiguous(),
        seq_idx=None if with_states else _document_index(states, x),
        return_final_states=states.want_final,
    )
    y, final = found if states.want_final else (found, None)
    y = y if borders is None else borders.flat(y)
    if final is None:
        return y, None
    final = final.float().mT
    return y, final if borders is None else borders.restore(final, states.initial)


def _document_index(states: States, x: Tensor) -> Tensor | None:
    """int32 [1, T]: the document of each token; None for plain rows."""
    ids = states.document_ids
    if ids is None:
        if states.cu_seqlens is None:
            return None
        positions = torch.arange(x.shape[1], device=x.device, dtype=states.cu_seqlens.dtype)
        ids = torch.searchsorted(states.cu_seqlens, positions, right=True)
    return ids.to(torch.int32)[None].contiguous()


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
