"""With softmax attention everywhere a size has the published model's parameters, in total and met by a token.

Totals are those of the published weights (the sum over their safetensors files, as the model cards show). Active ones
are from the papers where these give more than two digits; else the published total less the experts not chosen.
"""

from __future__ import annotations

import pytest
import torch

from torchlinearmoe.families import FAMILIES
from torchlinearmoe.models.decoder import Decoder
from torchlinearmoe.planning.layers import count_parameters
from torchlinearmoe.recipe import resolve

PUBLISHED: dict[tuple[str, str], tuple[float, float]] = {
    ("qwen2", "0.5B"): (494_032_768, 494_032_768),
    ("qwen2", "1.5B"): (1_543_714_304, 1_543_714_304),
    ("qwen2", "7B"): (7_615_616_512, 7_615_616_512),
    ("qwen2", "72B"): (72_706_203_648, 72_706_203_648),
    ("qwen2", "A14B"): (57.41e9, 14.25e9),
    ("mixtral", "7B"): (46_702_792_704, 12.9e9),
    ("mixtral", "8x22B"): (140_620_634_112, 39.1e9),
    ("llama3", "1B"): (1_235_814_400, 1_235_814_400),
    ("llama3", "3B"): (3_212_749_824, 3_212_749_824),
    ("llama3", "8B"): (8_030_261_248, 8_030_261_248),
    ("llama3", "70B"): (70_553_706_496, 70_553_706_496),
    ("llama3", "3.1-8B"): (8_030_261_248, 8_030_261_248),
    ("llama3", "3.1-70B"): (70_553_706_496, 70_553_706_496),
    ("deepseek_v2", "A2.4B"): (15_706_484_224, 2.66e9),
    ("deepseek_v2", "A21B"): (235_741_434_880, 21.4e9),
    ("qwen3", "0.6B"): (596_049_920, 596_049_920),
    ("qwen3", "1.7B"): (1_720_574_976, 1_720_574_976),
    ("qwen3", "4B"): (4_022_468_096, 4_022_468_096),
    ("qwen3", "8B"): (8_190_735_360, 8_190_735_360),
    ("qwen3", "14B"): (14_768_307_200, 14_768_307_200),
    ("qwen3", "32B"): (32_762_123_264, 32_762_123_264),
    ("qwen3", "A3B"): (30_532_122_624, 3.35e9),
    ("qwen3", "A22B"): (235_093_634_560, 22.2e9),
    ("qwen3", "A35B"): (480_154_875_392, 35.5e9),
    ("deepseek_v3", "A3B"): (15.96e9, 2.91e9),
    ("deepseek_v3", "A37B"): (671.03e9, 37.55e9),
    ("glm4_moe", "A12B"): (106.85e9, 13.4e9),
    ("glm4_moe", "A32B"): (352.80e9, 33.6e9),
}
HYBRIDS: dict[tuple[str, str], tuple[float, float]] = {
    ("qwen3_next", "A3B"): (80e9, 3.9e9),
    ("qwen3_5_moe", "A3B"): (35e9, 3.45e9),
    ("qwen3_5_moe", "A10B"): (122e9, 9.8e9),
    ("qwen3_5_moe", "A17B"): (397e9, 17.3e9),
    ("kimi_linear", "A3B"): (49.12e9, 3.48e9),
    ("bailing_hybrid", "A5B"): (124e9, 5.1e9 + 157184 * 2560),  # the published active ones are without the embedding
    ("olmo_hybrid", "7B"): (7.43e9, 7.43e9),
    ("minimax", "A46B"): (456e9, 45.9e9 + 2 * 200064 * 6144),  # the paper's active ones are without embeddings
    ("nemotron_h", "4B"): (3.9736e9, 3.9736e9),
    ("nemotron_h", "9B"): (8.89e9, 8.89e9),
    ("nemotron_h", "A3B"): (31.6e9, 3.58e9),
    ("nemotron_h", "A12B"): (120.67e9, 12.77e9),
    ("nemotron_h", "A55B"): (550e9, 55.5e9),
    ("granitemoehybrid", "350M"): (0.340e9, 0.340e9),
    ("granitemoehybrid", "1B"): (1.46e9, 1.46e9),
    ("granitemoehybrid", "3B"): (3.19e9, 3.19e9),
    ("granitemoehybrid", "A0.4B"): (1.334e9, 0.43e9),
    ("granitemoehybrid", "A0.8B"): (3.30e9, 0.88e9),
    ("granitemoehybrid", "A1B"): (6.94e9, 1.465e9),
    ("granitemoehybrid", "A9B"): (32.21e9, 8.80e9),
}
"""Sizes with the published layout, by name and text part alone; totals are rounded to whole billions in the names.
Granite's are sums over its published dimensions, by hand; its cards round them to 350M, 1B, 3B, 7B of 1B and 32B of 9B.
"""
LINEAR_MOE: dict[tuple[str, str], tuple[float, float]] = {
    ("qwen2", "A0.3B"): (2.49e9, 0.64e9),
    ("qwen2", "A1B"): (7.40e9, 1.77e9),
    ("mixtral", "Small"): (2.93e9, 0.81e9),
    ("llama3", "0.3B"): (0.48e9, 0.48e9),
}
"""The presets of Linear-MoE (arXiv 2503.05447), which are models of linear attention: five matrices D x D a layer."""


def _counts(family: str, size: str, **model):
    recipe = resolve({"model": {"family": family, "size": size, **model}, "training": {"steps": 1}}).model
    with torch.device("meta"):
        return count_parameters(Decoder(recipe))


@pytest.mark.parametrize(("family", "size"), PUBLISHED)
def test_softmax_models_have_the_published_parameters(family: str, size: str):
    total, active = PUBLISHED[family, size]
    counts = _counts(family, size, layout="N")
    assert counts.total == total if isinstance(total, int) else counts.total == pytest.approx(total, rel=0.002)
    assert counts.active == pytest.approx(active, rel=0.01)


@pytest.mark.parametrize(("family", "size"), HYBRIDS)
def test_hybrids_have_about_the_parameters_in_their_names(family: str, size: str):
    counts = _counts(family, size)
    assert (counts.total, counts.active) == pytest.approx(HYBRIDS[family, size], rel=0.012)


@pytest.mark.parametrize(("family", "size"), LINEAR_MOE)
def test_linear_models_have_the_parameters_of_their_preset(family: str, size: str):
    counts = _counts(family, size, mixer="linear_attention")
    assert (counts.total, counts.active) == pytest.approx(LINEAR_MOE[family, size], rel=0.01)


def test_every_size_is_compared():
    sizes = {(family, size) for family in FAMILIES for size in FAMILIES[family].presets if size != "debug"}
    assert {*PUBLISHED, *HYBRIDS, *LINEAR_MOE} == sizes
