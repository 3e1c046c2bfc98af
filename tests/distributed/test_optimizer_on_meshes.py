"""The optimizer over parameters on different meshes takes the steps of one process."""

import pytest
import torch
from harness import RankPool
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor

from torchlinearmoe.optim import build_optimizer, step_if_finite

LAYOUTS: dict[str, tuple[tuple[int, ...], str, list[Placement]]] = {
    "dense": ((9, 5), "flat", [Shard(0)]),
    "expert": ((4, 3, 8), "grid", [Shard(1), Shard(0)]),
    "norm": ((8,), "grid", [Shard(0), Replicate()]),
}
NORMS = (1.0, float("nan"), 1.0)  # the middle step is skipped


def train(rank: int, distributed: bool, states: str) -> tuple[dict[str, torch.Tensor], list[float]]:
    meshes = {}
    if distributed:
        grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("efsdp", "ep"))
        meshes = {"grid": grid, "flat": grid._flatten("flat")}

    def spread(name: str, tensor: torch.Tensor) -> torch.Tensor:
        _, mesh, placements = LAYOUTS[name]
        return distribute_tensor(tensor, meshes[mesh], placements) if distributed else tensor

    generator = torch.Generator().manual_seed(23)
    model = nn.ParameterDict(
        {name: nn.Parameter(spread(name, torch.randn(s, generator=generator))) for name, (s, _, _) in LAYOUTS.items()}
    )
    optimizer = build_optimizer(model, lr=0.05, weight_decay=0.2, states=states, seed=5)
    skipped = []
    for norm in NORMS:
        for name, parameter in model.items():
            parameter.grad = spread(name, torch.randn(parameter.shape, generator=generator))
        skipped.append(step_if_finite(optimizer, torch.tensor(norm)).item())
    whole = {
        name: p.full_tensor().detach() if isinstance(p, DTensor) else p.detach().clone() for name, p in model.items()
    }
    return whole, skipped


@pytest.mark.parametrize("states", ["float32", "bfloat16"])
def test_steps_on_mixed_meshes_equal_those_of_one_process(ranks: RankPool, states: str):
    """Moments in bfloat16 too: what is rounded up by chance does not depend on who holds it."""
    expected, expected_skips = train(0, False, states)
    assert expected_skips == [0.0, 1.0, 0.0]
    for whole, skipped in ranks(4, train, True, states):
        assert skipped == expected_skips
        for name, tensor in whole.items():
            torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-6)
