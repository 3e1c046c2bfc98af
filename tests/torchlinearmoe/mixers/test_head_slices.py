"""A rank that holds a slice of the heads computes its part of the output: the ranks' outputs add up to the whole.

Slices are cut here by the mixers' own tensor-parallel words, without any process group. Mixers whose norm spans all
heads need a reduction inside and are left to the tests over ranks.
"""

from __future__ import annotations

import copy

import pytest
import torch
from mixer_cases import Case, make_stack, random_inputs, relative
from torch import nn
from torch.distributed.tensor import Shard

from torchlinearmoe.documents import Documents
from torchlinearmoe.mixers.base import Mixer

CASES = [
    Case("lightning_attention", {"norm": "head", "heads": 4, "head_dim": 16, "conv": 2}),
    Case("retention", {"heads": 4, "head_dim": 16}),
    Case("gla", {"heads": 4, "head_dim": 16, "kv_heads": 2, "conv": 3}),
    Case("mamba2", {"heads": 4, "groups": 2, "state": 16}),
    Case("delta_net", {"heads": 4, "head_dim": 16, "gate": True}),
    Case("gated_delta_net", {"heads": 2, "head_dim": 16, "value_heads": 4}),
    Case("kda", {"heads": 2, "head_dim": 16, "value_heads": 4}),
    Case("rwkv7", {"heads": 4, "head_dim": 16}),
    Case("hgrn2", {"heads": 4, "head_dim": 16, "output_norm": "none", "lower_bounds": False}),
    Case("linear_attention", {"heads": 4, "head_dim": 16, "output_norm": "none", "gate_activation": "sigmoid"}),
]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("ranks", [1, 2])
def test_slices_of_heads_add_up(case: Case, ranks: int):
    stack = make_stack(case, num_layers=4)
    (first, whole), x_TD = stack.layers, random_inputs(70)
    context = stack.context(Documents.packed([0, 30, 70]))
    with torch.no_grad():
        carried = first(x_TD, context)[2]
        expected = whole(x_TD, context, None, carried)[0]
        parts = []
        for rank in range(ranks):
            own = slice_of(first, rank, ranks)(x_TD, context)[2]
            parts.append(slice_of(whole, rank, ranks)(x_TD, context, None, own)[0])
    assert relative(torch.stack(parts).sum(0), expected) < 1e-12


def slice_of(whole: Mixer, rank: int, ranks: int) -> Mixer:
    """The heads of one rank."""
    part = copy.deepcopy(whole)
    for name, placement in whole.tensor_parallel().items():
        if not isinstance(placement, Shard):
            continue
        path, _, leaf = name.rpartition(".")
        local = whole.get_parameter(name).detach().chunk(ranks, placement.dim)[rank]
        setattr(part.get_submodule(path), leaf, nn.Parameter(local.clone()))
    if hasattr(part, "first_head"):
        part.first_head = rank * 4 // ranks  # pyright: ignore
    return part
