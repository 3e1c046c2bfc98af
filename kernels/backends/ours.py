"""Our own backends: "torch", the chunk-parallel forms, and "reference", the definitions."""

import torch
from torch import Tensor

from torchlinearmoe.kernels.backends.call import States
from torchlinearmoe.kernels.chunked import delta as chunked_delta
from torchlinearmoe.kernels.chunked import delta_channels
from torchlinearmoe.kernels.chunked import dplr as chunked_dplr
from torchlinearmoe.kernels.chunked import gsa as chunked_gsa
from torchlinearmoe.kernels.chunked import quadratic as chunked_quadratic
from torchlinearmoe.kernels.chunked.diagonal import linear_diagonal
from torchlinearmoe.kernels.chunked.layout import make_layout
from torchlinearmoe.kernels.chunked.scalar import linear_scalar
from torchlinearmoe.kernels.reference import delta as delta_definition
from torchlinearmoe.kernels.reference import dplr as dplr_definition
from torchlinearmoe.kernels.reference import gsa as gsa_definition
from torchlinearmoe.kernels.reference import linear as linear_definition
from torchlinearmoe.kernels.reference import quadratic as quadratic_definition

CHUNK_SIZE = 64


def torch_linear(q, k, v, log_decay, bonus, scale, states: States):
    layout = _layout(q, states)
    if log_decay is not None and log_decay.dim() == 4:
        return linear_diagonal(q, k, v, log_decay, bonus, scale, states.initial, states.want_final, layout)
    return linear_scalar(q, k, v, log_decay, scale, states.initial, states.want_final, layout)


def torch_delta(q, k, v, beta, log_decay, scale, states: States):
    layout = _layout(q, states)
    if log_decay is not None and log_decay.dim() == 4:
        return delta_channels.delta_rule(q, k, v, beta, log_decay, scale, states.initial, states.want_final, layout)
    return chunked_delta.delta_rule(q, k, v, beta, log_decay, scale, states.initial, states.want_final, layout)


def torch_dplr(q, k, v, a, b, log_decay, lower_bound, scale, states: States):
    layout = _layout(q, states)
    return chunked_dplr.dplr_rule(q, k, v, a, b, log_decay, scale, states.initial, states.want_final, layout)


def torch_quadratic(q, k, v, kind, scale, normalize, eps, states: States):
    layout = _layout(q, states, chunked_quadratic.CHUNK_SIZE)
    return chunked_quadratic.quadratic_attention(
        q, k, v, kind, scale, normalize, eps, states.initial, states.want_final, states.cu_seqlens, layout
    )


def torch_slots(q, k, v, s, log_decay, scale, keys: States, values: States):
    layout = _layout(q, keys)
    return chunked_gsa.slot_attention(
        q, k, v, s, log_decay, scale, keys.initial, values.initial, keys.want_final, layout
    )


def _layout(q: Tensor, states: States, chunk_size: int | None = None):
    with_states = states.initial is not None or states.want_final
    size = CHUNK_SIZE if chunk_size is None else chunk_size
    return make_layout(q.shape[0], q.shape[1], size, states.cu_seqlens, states.document_ids, with_states)


def reference_linear(q, k, v, log_decay, bonus, scale, states: States):
    return linear_definition.linear_recurrence(
        q, k, v, log_decay, bonus=bonus, scale=scale, **_reference_states(states, q)
    )


def reference_delta(q, k, v, beta, log_decay, scale, states: States):
    return delta_definition.delta_rule(q, k, v, beta, log_decay, scale=scale, **_reference_states(states, q))


def reference_dplr(q, k, v, a, b, log_decay, lower_bound, scale, states: States):
    return dplr_definition.dplr_rule(q, k, v, a, b, log_decay, scale=scale, **_reference_states(states, q))


def reference_quadratic(q, k, v, kind, scale, normalize, eps, states: States):
    options = _reference_states(states, q)
    return quadratic_definition.quadratic_attention(
        q, k, v, kind=kind, scale=scale, normalize=normalize, eps=eps, **options
    )


def reference_slots(q, k, v, s, log_decay, scale, keys: States, values: States):
    options = _reference_states(keys, q)
    if keys.initial is not None:
        options["initial_state"] = (keys.initial, values.initial)
    return gsa_definition.slot_attention(q, k, v, s, log_decay, scale=scale, **options)


def _reference_states(states: States, q: Tensor) -> dict:
    cu_seqlens = states.cu_seqlens
    if cu_seqlens is None and states.document_ids is not None:
        lengths = torch.unique_consecutive(states.document_ids, return_counts=True)[1]
        cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    return {"initial_state": states.initial, "output_final_state": states.want_final, "cu_seqlens": cu_seqlens}
