"""Figures of the experts' load."""

import math

import pytest
import torch

from torchlinearmoe.metrics import load_figures


def test_balanced_load_in_any_unit():
    for unit in (7, 0.125):
        assert load_figures(torch.full((3, 8), unit)) == pytest.approx(
            {
                "expert_load_max": 1.0,
                "expert_load_min": 1.0,
                "expert_load_max_mean": 1.0,
                "expert_load_entropy": 1.0,
                "experts_unused": 0,
            }
        )


def test_one_layer_collapsed_and_one_half_used():
    load = torch.tensor([[12, 0, 0, 0], [5, 5, 0, 0]])
    assert load_figures(load) == pytest.approx(
        {
            "expert_load_max": 4.0,
            "expert_load_min": 0.0,
            "expert_load_max_mean": 3.0,
            "expert_load_entropy": (0 + math.log(2) / math.log(4)) / 2,
            "experts_unused": 5,
        }
    )


def test_large_counts_stay_exact_and_a_silent_layer_counts_as_balanced():
    load = torch.tensor([[2**40, 3 * 2**40], [0, 0]])
    figures = load_figures(load)
    assert (figures["expert_load_max"], figures["expert_load_min"], figures["experts_unused"]) == (1.5, 0.5, 0)
