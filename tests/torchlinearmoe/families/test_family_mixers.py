"""Every family takes every mixer, and every family's own attention: a model of both layers at the debug size.

A new family or mixer is found through the registries.
"""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from torchlinearmoe import FAMILIES, MIXERS, build_model
from torchlinearmoe.models.decoder import Decoder
from torchlinearmoe.models.layer_mixers import layer_mixers
from torchlinearmoe.optim.build import build_optimizer
from torchlinearmoe.recipe import resolve

CELLS = [(family, mixer) for family in FAMILIES for mixer in MIXERS.names()]
VOCAB = 61


def _model(family: str, mixer: str) -> Decoder:
    """Two layers in float64, the mixer's and the family's attention, away from neutral initial values."""
    model = {"family": family, "mixer": mixer, "layout": "LN", "num_layers": 2, "vocab_size": VOCAB}
    recipe = resolve({"model": model, "training": {"steps": 1}}).model
    assert layer_mixers(recipe)[1] == FAMILIES[family].attention
    decoder = build_model(recipe).double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return decoder


@pytest.mark.parametrize(("family", "mixer"), CELLS)
def test_a_step_lowers_the_loss_and_the_model_is_causal_and_keeps_documents_apart(family: str, mixer: str):
    model, lengths = _model(family, mixer), (9, 1, 14)
    tokens = torch.randint(0, VOCAB, (1, 24), generator=torch.Generator().manual_seed(7))
    borders = F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).int()
    with torch.no_grad():
        packed = model(tokens, cu_seqlens=borders)
        alone = torch.cat([model(part) for part in tokens.split(lengths, 1)], 1)
        torch.testing.assert_close(packed, alone, rtol=1e-9, atol=1e-10)
        changed = tokens.clone()
        changed[0, 15] = (changed[0, 15] + 1) % VOCAB
        other = model(changed, cu_seqlens=borders)
        torch.testing.assert_close(other[:, :15], packed[:, :15], rtol=1e-9, atol=1e-10)
        assert bool((other[0, 15:] - packed[0, 15:]).abs().amax(-1).gt(1e-6).all())

    def loss() -> torch.Tensor:
        return F.cross_entropy(model(tokens)[0, :-1], tokens[0, 1:])

    optimizer = build_optimizer(model, name="adamw", lr=1e-3, weight_decay=0.0)
    before = loss()
    before.backward()
    optimizer.step()
    with torch.no_grad():
        assert loss() < before - 1e-3
