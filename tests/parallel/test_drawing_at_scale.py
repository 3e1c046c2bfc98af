"""On 1,024 pretended ranks each draws the initial values of its own share, and every expert is drawn by one of them."""

import math
import random
from collections import Counter

import pytest
import torch
from torch.distributed.tensor import DTensor

from torchlinearmoe import initialize as init
from torchlinearmoe.parallel.apply import lay_out_model
from torchlinearmoe.parallel.mesh import Meshes, resolve_degrees
from torchlinearmoe.planning.world import pretended_world
from torchlinearmoe.recipe import resolve

WORLD, LAYERS, EXPERTS = 1024, 2, 512
RECIPE = resolve(
    {
        "model": {
            "mixer": "hgrn2",
            "layout": "LN",
            "num_layers": LAYERS,
            "hidden_size": 256,
            "num_heads": 16,
            "num_kv_heads": 16,
            "vocab_size": 8192,
        },
        "moe": {"num_experts": EXPERTS, "top_k": 2, "hidden_size": 16, "shared_hidden_size": 0, "shared_gate": False},
        "training": {"steps": 1, "sequence_length": 512, "device": "cpu"},
        "parallel": {"pipeline": 2, "context": 2, "tensor": 4, "expert": 128},
    }
)
"""A stage has 512 ranks, 128 of which have four experts each, and four copies of those share them."""


def drawn_by(rank: int, monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """The blocks that a rank draws, as (parameter, block); none that it has no part of."""
    keys: list[str] = []
    generator = init._generator

    def recording(key: str, device: torch.device) -> torch.Generator:
        keys.append(key)
        return generator(key, device)

    with pretended_world(WORLD, rank), monkeypatch.context() as patch:
        patch.setattr(init, "_generator", recording)
        parts = lay_out_model(RECIPE, Meshes(resolve_degrees(RECIPE.parallel, WORLD), "cpu"), torch.float32)
        for part in parts:
            part.to_empty(device="cpu")
            init.initialize(part, 0)
            drawn = Counter(key.rpartition("/")[0] for key in keys)
            for name, parameter in part.named_parameters():
                assert isinstance(parameter, DTensor)
                local, rows = parameter.to_local(), 1 if parameter.dim() == 3 else init.ROWS
                most = math.ceil((len(local) - 1) / rows) + 1 if local.numel() else 0
                assert drawn.pop(f"0/{name}", 0) <= most, name
            assert not drawn
    return Counter(keys)


@pytest.mark.parametrize("number", [24, pytest.param(WORLD, marks=pytest.mark.distributed_full)])
def test_ranks_draw_their_share_and_nothing_twice(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    experts: Counter[str] = Counter()
    for rank in random.Random(number).sample(range(WORLD), number):
        drawn = drawn_by(rank, monkeypatch)
        assert set(drawn.values()) == {1}
        mine = [key for key in drawn if ".experts." in key]
        assert mine
        experts.update(mine)
    assert set(experts.values()) == {1}
    matrices = len({key.rpartition("/")[0] for key in experts})
    assert len(experts) == (matrices * EXPERTS if number == WORLD else matrices // LAYERS * number)
