"""A prepared launch is used again only while everything lies where it did."""

import torch
from torch import nn

from torchlinearmoe.optim import build_optimizer
from torchlinearmoe.optim.launches import Launch


def test_a_launch_is_made_anew_where_something_moved():
    model = nn.Linear(8, 4)
    optimizer = build_optimizer(model, lr=0.1)
    (decayed, undecayed) = optimizer.param_groups
    members = [(p, group) for group in (decayed, undecayed) for p in group["params"]]

    def prepare() -> tuple[Launch, list]:
        slots = [optimizer.slot(*member) for member in members]
        states = [optimizer.state[p] for p, _ in members]
        return Launch(members, states, slots), states

    launch, states = prepare()
    assert launch.fits(members, states) and not launch.fits(members[:1], states[:1])
    assert not launch.fits(members[::-1], states[::-1])
    model.weight.data = model.weight.data.clone()
    assert not launch.fits(members, states)
    for entry in ("exp_avg", "exp_avg_sq", "step"):
        launch, states = prepare()
        states[0][entry] = torch.zeros_like(states[0][entry])  # as loading a checkpoint does
        assert not launch.fits(members, states), entry
    launch, states = prepare()
    decayed["weight_decay"] = 0.9
    assert not launch.fits(members, states)
    launch, states = prepare()
    again, _ = prepare()
    assert again.fits(members, states) and not launch.fits(members, states), "step counts are the newest one's"
