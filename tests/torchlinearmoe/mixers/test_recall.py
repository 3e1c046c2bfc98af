"""Every mixer learns to recall: with four pairs, nine answers of ten are right where chance is one of four."""

import pytest
from recall import train_recall

from torchlinearmoe import MIXERS


@pytest.mark.parametrize("mixer", MIXERS)
def test_every_mixer_recalls_four_pairs(mixer: str):
    assert train_recall(mixer, pairs=4, symbols=8, steps=800, enough=0.95) >= 0.9
