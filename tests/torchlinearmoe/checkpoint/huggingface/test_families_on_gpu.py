"""Published models in bfloat16 on a GPU, by its kernels: as near to themselves in float64 as transformers is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from published_cases import PUBLISHED, in_float64, make_exact, random_tokens, save
from torch import Tensor

from torchlinearmoe import load_model
from torchlinearmoe.checkpoint.huggingface.importing import import_directory
from torchlinearmoe.generation.decode import cast_weights

pytestmark = pytest.mark.gpu


def off(logits: Tensor, expected: Tensor) -> float:
    """The relative error of most tokens: rounded to bfloat16, some go to another expert."""
    wrong = (logits.double().cpu() - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert bool(wrong.isfinite().all())
    return float(wrong.flatten().median())


@pytest.mark.parametrize("case", PUBLISHED)
def test_half_precision_is_as_near_as_that_of_transformers(case: str, tmp_path: Path) -> None:
    try:
        published = make_exact(case)
    except (AttributeError, ValueError) as error:
        pytest.skip(f"this transformers does not know it: {error}")
    for parameter in published.parameters():
        parameter.data = parameter.data.bfloat16().double()
    import_directory(save(published, tmp_path / "published"), tmp_path / "checkpoint")
    tokens = random_tokens(2, 70)
    with torch.no_grad():
        with in_float64():
            expected = published(tokens).logits
        ours = load_model(tmp_path / "checkpoint").cuda()
        cast_weights(ours, torch.bfloat16)
        found = ours(tokens.cuda())
        prefilled, state = ours.prefill(tokens[:, :60].cuda(), ours.init_state(2))
        steps = [prefilled]
        for step in range(60, 70):
            logits, state = ours.step(tokens[:, step].cuda(), state)
            steps.append(logits.unsqueeze(1))
        theirs = published.to(torch.bfloat16).cuda()(tokens.cuda()).logits
    limit = max(2e-2, 2 * off(theirs, expected))
    assert off(found, expected) < limit
    assert off(torch.cat(steps, 1), expected) < limit
