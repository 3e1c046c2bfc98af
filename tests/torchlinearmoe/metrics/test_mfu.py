"""Peaks by device name, and the utilisation made of them."""

import pytest
import torch

from torchlinearmoe.metrics import mfu, peak_flops
from torchlinearmoe.metrics.mfu import peak_flops_by_name


@pytest.mark.parametrize(
    "name, tflops",
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA H20", 148),
        ("NVIDIA B200", 2250),
        ("NVIDIA L40S", 362),
        ("NVIDIA L40", 181),
        ("NVIDIA L4", 121),
        ("NVIDIA A10", 125),
        ("NVIDIA GeForce RTX 4090", 165),
        ("Tesla V100-SXM2-16GB", None),
        ("NVIDIA A1000", None),
    ],
)
def test_devices_are_known_by_the_whole_words_of_their_name(name, tflops):
    assert peak_flops_by_name(name, torch.bfloat16) == (tflops and tflops * 1e12)


def test_float32_counts_its_own_peak_and_tf32_another():
    name = "NVIDIA H100 80GB HBM3"
    assert peak_flops_by_name(name, torch.float32) == 67e12
    assert peak_flops_by_name(name, torch.float32, tf32=True) == 494e12
    assert peak_flops_by_name(name, torch.float64) is None


def test_recipe_goes_before_the_table_and_a_cpu_has_no_peak():
    assert peak_flops("cpu", torch.float32) is None
    assert peak_flops("cpu", torch.bfloat16, peak_tflops=2.5) == 2.5e12


def test_utilisation_is_the_needed_over_the_possible():
    assert mfu(1e5, 2e9, 1e15) == pytest.approx(0.2)
    assert mfu(8e5, 2e9, 1e15, devices=8) == pytest.approx(0.2)
    assert mfu(1e5, 2e9, None) is None
