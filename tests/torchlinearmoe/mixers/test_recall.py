"""What mixers recall: nine of ten answers with four pairs; the delta rule more than its keys have channels."""

import pytest
from recall import train_recall

from torchlinearmoe import MIXERS

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("mixer", MIXERS)
def test_every_mixer_recalls_four_pairs(mixer: str):
    assert train_recall(mixer, pairs=4, symbols=8, steps=800, batch=32, lr=5e-3, enough=0.93) >= 0.9


def test_delta_net_recalls_more_pairs_than_its_keys_have_channels():
    """Twelve pairs, keys of eight channels: linear attention adds up what clashes, the delta rule corrects it."""

    def accuracy(mixer: str) -> float:
        options = {"pairs": 12, "symbols": 12, "steps": 170, "batch": 32, "lr": 1.2e-2, "heads": 2, "head_dim": 8}
        return train_recall(mixer, seed=1, **options)

    assert accuracy("delta_net") > accuracy("linear_attention") + 0.1
