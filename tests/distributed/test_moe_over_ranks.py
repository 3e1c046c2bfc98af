"""Balance losses, bias updates, statistics and sharded experts over ranks equal those of one process."""

import pytest
import torch
import torch.distributed as dist
from harness import RankPool
from torch import Tensor, nn

from torchlinearmoe.documents import Documents
from torchlinearmoe.moe import MoE, StepTotals, TokenLayout, collect_statistics, counting_pass, update_bias
from torchlinearmoe.moe.experts import Experts
from torchlinearmoe.parallel.local import shadow
from torchlinearmoe.recipe.schema import MoERecipe

S, L, D, E, K = 4, 6, 8, 5, 2


def layer(balance: str, scope: str) -> MoE:
    recipe = MoERecipe(
        num_experts=E,
        top_k=K,
        hidden_size=4,
        shared_hidden_size=0,
        shared_gate=False,
        renormalize=True,
        balance=balance,  # pyright: ignore[reportArgumentType]
        balance_scope=scope,  # pyright: ignore[reportArgumentType]
        balance_coefficient=0.5,
        z_loss_coefficient=0.1,
    )
    torch.manual_seed(1)
    module = MoE(D, recipe, 0.02, 0.02).double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0, 0.5)
    return module


def stream() -> Tensor:
    torch.manual_seed(2)
    return torch.randn(S, L, D, dtype=torch.float64)


def loss_gradient(module: MoE, x_TD: Tensor, row_length: int, parts: int = 1) -> Tensor:
    documents = Documents.batch(parts * len(x_TD) // row_length, row_length)
    y = module(x_TD, totals=StepTotals(S * L, S), documents=documents)
    y.backward(torch.zeros_like(y))
    assert module.router.weight.grad is not None
    return module.router.weight.grad


def summed_gradient(rank: int, scope: str, cut: str, count_first: bool) -> tuple[Tensor, dict[str, float]]:
    group, size = dist.group.WORLD, dist.get_world_size()
    module, x = layer("loss", scope), stream()
    layout = TokenLayout(group)
    row_length = L
    if cut == "rows":  # context parallelism: a span of every row
        x_TD, row_length = x.chunk(size, 1)[rank].reshape(-1, D), L // size
        layout = TokenLayout(group, row_parts=size)
    elif cut == "stream":  # tensor parallelism: a piece of the stream
        x_TD = x.view(-1, D).chunk(size)[rank]
        layout = TokenLayout(group, stream_parts=size, stream_part=rank)
    else:  # data parallelism: rows of one's own
        x_TD = x.chunk(size)[rank].reshape(-1, D)
        layout = TokenLayout(group if scope == "global" else None)
    module.balance.layout = layout
    if count_first:
        with counting_pass(module, group):
            module(x_TD)
        module.balance.layout = TokenLayout()
    gradient = loss_gradient(module, x_TD, row_length, layout.stream_parts)
    dist.all_reduce(gradient)
    return gradient, collect_statistics(torch.nn.ModuleList([module]), group)


@pytest.mark.parametrize(
    "scope, cut, count_first, size",
    [
        ("sequence", "rows", False, 3),
        ("sequence", "stream", False, 3),
        ("sequence", "data", False, 2),
        ("global", "data", False, 2),
        ("global", "stream", True, 3),
    ],
)
def test_losses_do_not_depend_on_the_layout(
    ranks: RankPool, scope: str, cut: str, count_first: bool, size: int
) -> None:
    module = layer("loss", scope)
    expected = loss_gradient(module, stream().view(-1, D), L)
    figures = collect_statistics(torch.nn.ModuleList([module]))
    for gradient, statistics in ranks(size, summed_gradient, scope, cut, count_first):
        torch.testing.assert_close(gradient, expected)
        assert statistics == pytest.approx(figures)


def biased(rank: int) -> Tensor:
    module = layer("bias", "sequence")
    module(stream().chunk(dist.get_world_size())[rank].reshape(-1, D))
    update_bias([module], dist.group.WORLD)
    assert module.router.expert_bias is not None
    return module.router.expert_bias


def test_bias_is_updated_from_the_counts_of_all_ranks(ranks: RankPool) -> None:
    module = layer("bias", "sequence")
    module(stream().view(-1, D))
    update_bias([module])
    assert module.router.expert_bias is not None and module.router.expert_bias.abs().max() > 0
    for bias in ranks(2, biased):
        assert torch.equal(bias, module.router.expert_bias)


def sharded_experts(rank: int, counts: list[int]) -> list[Tensor]:
    """Each rank's experts on its own rows; gradients of the whole parameters."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("ep",))
    module, x_RD, share = experts(), rows(sum(counts)), len(counts) // dist.get_world_size()
    for name, parameter in list(module.named_parameters()):
        setattr(module, name, nn.Parameter(distribute_tensor(parameter.detach(), mesh, [Shard(0)])))
    shadow(module)
    mine = slice(rank * share, (rank + 1) * share)
    start = sum(counts[: mine.start])
    y_RD = module(x_RD[start : start + sum(counts[mine])], torch.tensor(counts[mine]))
    y_RD.square().sum().backward()
    grads = [parameter.grad for parameter in module.parameters()]
    return [y_RD.detach(), *(grad.full_tensor() for grad in grads if isinstance(grad, DTensor))]


def experts() -> Experts:
    torch.manual_seed(3)
    module = Experts(D, 4, 4)
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    return module


def rows(R: int) -> Tensor:
    torch.manual_seed(4)
    return torch.randn(R, D)


def test_sharded_experts_compute_their_own_rows(ranks: RankPool) -> None:
    counts = [3, 0, 2, 4]
    module = experts()
    y_RD = module(rows(9), torch.tensor(counts))
    y_RD.square().sum().backward()
    (first, *grads), (second, *others) = ranks(2, sharded_experts, counts)
    torch.testing.assert_close(torch.cat((first, second)), y_RD.detach())
    expected = [parameter.grad for parameter in module.parameters()]
    torch.testing.assert_close(grads, expected)
    torch.testing.assert_close(others, expected)
