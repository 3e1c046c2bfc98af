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
    parameters = [p for p, _ in members]

    def prepare() -> tuple[Launch, list]:
        slots = [optimizer.slot(*member) for member in members]
        states = [optimizer.state[p] for p in parameters]
        return Launch(parameters, states, slots), states

    launch, states = prepare()
    assert launch.fits(parameters, states) and not launch.fits(parameters[:1], states[:1])
    assert not launch.fits(parameters[::-1], states[::-1])
    model.weight.data = model.weight.data.clone()
    assert not launch.fits(parameters, states)
    launch, states = prepare()
    states[0]["exp_avg"] = torch.zeros_like(states[0]["exp_avg"])  # as loading a checkpoint does
    assert not launch.fits(parameters, states)
    launch, states = prepare()
    assert launch.fits(parameters, states)
    again, _ = prepare()
    assert again.fits(parameters, states) and not launch.fits(parameters, states), "step counts are the newest one's"
