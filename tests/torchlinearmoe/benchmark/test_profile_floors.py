"""Floors against numbers counted by hand."""

import dataclasses

import pytest
import torch

from torchlinearmoe.benchmark.floors import Work, softmax_twin, step_work, update_bytes
from torchlinearmoe.benchmark.rates import Rates, measure_rates
from torchlinearmoe.models.decoder import Decoder
from torchlinearmoe.models.flops import training_flops_per_token
from torchlinearmoe.recipe import resolve

MODEL = {
    "family": "qwen2",
    "mixer": "hgrn2",
    "layout": "LN",
    "hidden_size": 64,
    "num_layers": 2,
    "num_heads": 2,
    "num_kv_heads": 1,
    "head_dim": 32,
    "vocab_size": 100,
    "max_length": 64,
}
MOE = {"num_experts": 4, "top_k": 2, "hidden_size": 48, "shared_hidden_size": 0}


def _model(**moe) -> Decoder:
    recipe = resolve({"model": MODEL, "moe": {**MOE, **moe}, "training": {"steps": 1}}).model
    with torch.device("meta"):
        return Decoder(recipe)


def test_the_work_of_two_layers_and_a_head():
    work = step_work(_model(), tokens=10, length=5, itemsize=2, optimizer_bytes=77.0)
    hgrn2 = 2 * (4 * 64 * 64)
    softmax = 2 * (64 * 64 + 2 * 64 * 32 + 64 * 64)
    routed = 2 * (4 * 64 + 2 * 3 * 64 * 48)
    assert work["matmul"] == Work(10 * 3 * (hgrn2 + softmax + 2 * routed))
    assert work["recurrence"].flops == 10 * 3 * 2 * (4 * 32 * 32 + 64 * (32 + 32))
    assert work["recurrence"].bytes == 10 * 2 * (3 * (3 * 64) + 2 * 64)
    assert work["attention"].flops == 10 * 3 * 4 * 2 * 32 * 3  # three tokens seen in the mean of 5
    assert work["attention"].bytes == 10 * 2 * (3 * (64 + 2 * 32) + 2 * 64)
    assert work["moe"] == Work(bytes=10 * 2 * 2 * 64 * (5 * 2 + 4))
    assert work["other"] == Work(bytes=10 * 2 * 2 * (16 * 64 + 8 * 2 * 48))
    assert work["head"] == Work(10 * 3 * 2 * 64 * 100)
    assert work["optimizer"] == Work(bytes=77.0)


def test_flops_of_all_categories_are_the_models():
    for moe in ({}, {"shared_hidden_size": 24}, {"num_experts": 0}):
        model = _model(**moe)
        work = step_work(model, tokens=7, length=16, itemsize=4, optimizer_bytes=0.0)
        flops = sum(part.flops for part in work.values())
        assert flops == pytest.approx(7 * training_flops_per_token(model, 16), rel=1e-12)


def test_a_shared_expert_is_one_more_hidden_width_and_moves_nothing():
    plain, shared = (step_work(_model(**moe), 1, 5, 2, 0.0) for moe in ({}, {"shared_hidden_size": 24}))
    assert shared["moe"] == plain["moe"]
    assert shared["other"].bytes - plain["other"].bytes == 2 * 2 * 8 * 24


def test_the_softmax_twin_has_the_recipes_shape_and_no_recurrence():
    model = _model()
    twin = softmax_twin(model.recipe)
    assert all(p.is_meta for p in twin.parameters())
    work, twins = step_work(model, 10, 5, 2, 0.0), step_work(twin, 10, 5, 2, 0.0)
    assert twins["recurrence"] == Work() and twins["attention"] == work["attention"].times(2)
    assert twins["head"] == work["head"] and twins["moe"] == work["moe"]


def test_bytes_of_an_update():
    weight = torch.zeros(10, dtype=torch.bfloat16)
    rest, moment = torch.zeros(10, dtype=torch.int16), torch.zeros(10)
    assert update_bytes([(weight, (rest, moment, moment))]) == 10 * (2 + 2 + 2 * (2 + 2 + 4 + 4))
    assert update_bytes([(weight, (None, weight, weight))]) == 10 * (2 + 2 + 2 * (2 + 2 + 2))


def test_a_floor_is_the_longer_of_flops_and_bytes():
    rates = Rates(flops=10.0, bytes=2.0)
    assert Work(30.0, 4.0).seconds(rates) == 3.0
    assert Work(30.0, 8.0).seconds(rates) == 4.0


def test_rates_are_measured():
    rates = measure_rates(torch.device("cpu"))
    assert all(1e6 < value < 1e16 for value in dataclasses.astuple(rates))
