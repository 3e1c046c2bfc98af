"""Who decays."""

import pytest
import torch
from torch import nn

from torchlinearmoe.module import Module
from torchlinearmoe.optim import parameter_groups


class Decay(Module):
    no_weight_decay = ("A_log",)

    def __init__(self):
        super().__init__()
        self.A_log = nn.Parameter(torch.randn(4, 8))
        self.projection = nn.Parameter(torch.randn(8, 8))


class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.norm = nn.RMSNorm(8)
        self.linear = nn.Linear(8, 8)
        self.experts = nn.ParameterDict({"weight": torch.randn(3, 8, 4), "up_bias": torch.randn(3, 4)})
        self.decay = Decay()
        self.inner = nn.Sequential(Decay())
        self.frozen = nn.Linear(8, 8).requires_grad_(False)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embedding.weight


def names_by_decay(model, weight_decay=0.1):
    names = {id(p): name for name, p in model.named_parameters()}
    return {
        group["weight_decay"]: sorted(names[id(p)] for p in group["params"])
        for group in parameter_groups(model, weight_decay)
    }


def test_matrices_and_embeddings_decay_the_rest_does_not():
    assert names_by_decay(Toy(), 0.25) == {
        0.25: sorted(["embedding.weight", "linear.weight", "experts.weight", "decay.projection", "inner.0.projection"]),
        0.0: sorted(["norm.weight", "linear.bias", "experts.up_bias", "decay.A_log", "inner.0.A_log"]),
    }


class Pair(Module):
    """Two layers, of which the second is exempt."""

    no_weight_decay = ("second.weight",)

    def __init__(self):
        super().__init__()
        self.first, self.second = (nn.Linear(3, 3, bias=False) for _ in range(2))


def test_a_module_may_exempt_parameters_of_those_in_it():
    assert names_by_decay(Pair()) == {0.1: ["first.weight"], 0.0: ["second.weight"]}


def test_shared_parameter_is_exempt_when_any_owner_exempts_it():
    model = Pair()
    model.second.weight = model.first.weight
    assert names_by_decay(model) == {0.0: ["first.weight"]}


def test_an_exempt_parameter_that_is_not_there_is_an_error():
    model = Pair()
    del model.second
    with pytest.raises(AttributeError, match="second"):
        parameter_groups(model, 0.1)


def test_every_trainable_parameter_is_in_exactly_one_group():
    model = Toy()
    grouped = [id(p) for group in parameter_groups(model, 0.1) for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters() if p.requires_grad)
