"""What mixers recall: nine of ten answers with four pairs; the delta rule more than its keys have channels."""

import pytest
from recall import train_recall

from torchlinearmoe import MIXERS


@pytest.mark.parametrize("mixer", MIXERS)
def test_every_mixer_recalls_four_pairs(mixer: str):
    assert train_recall(mixer, pairs=4, symbols=8, steps=800, enough=0.95) >= 0.9


def test_delta_net_recalls_more_pairs_than_its_keys_have_channels():
    """Twelve pairs, keys of eight channels: linear attention adds up what clashes, the delta rule corrects it."""

    def mean(mixer: str) -> float:
        options = {"pairs": 12, "symbols": 12, "steps": 170, "batch": 32, "lr": 1.2e-2, "heads": 2, "head_dim": 8}
        return sum(train_recall(mixer, seed=seed, **options) for seed in range(3)) / 3

    assert mean("delta_net") > mean("linear_attention") + 0.1
