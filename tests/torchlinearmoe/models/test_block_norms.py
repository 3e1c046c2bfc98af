"""Norms before, behind and in the stream, and weighted sums, as the formulas say them; decoded and compiled."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from decoder_cases import random_tokens, relative, small_model, small_recipe
from torch import Tensor

from torchlinearmoe.documents import Documents
from torchlinearmoe.errors import RecipeError
from torchlinearmoe.mixers.base import Context
from torchlinearmoe.models.decoder import Decoder
from torchlinearmoe.parallel.compile import compile_regions

HYBRID: dict[str, Any] = {"mixer": "gated_delta_net", "layout": "LN", "num_layers": 4}
SCALES: dict[str, Any] = {"linear_scales": [1.5, 0.75], "attention_scales": [3.0, 1.25], "ffn_scales": [0.5, 2.0]}
CASES: dict[str, dict[str, Any]] = {
    "behind": {"norm_placement": "post"},
    "in the stream": {"norm_placement": "stream"},
    "behind in softmax layers": {"attention_norm_placement": "post"},
    "before in softmax layers": {"norm_placement": "stream", "attention_norm_placement": "pre"},
    "weighted before": SCALES,
    "weighted behind": {"norm_placement": "post", **SCALES},
    "weighted in the stream": {"norm_placement": "stream", **SCALES},
}
every_case = pytest.mark.parametrize("case", CASES)


def plainly(model: Decoder, tokens: Tensor, changes: dict[str, Any]) -> Tensor:
    """Logits of one document, the sums and norms of every layer written out."""
    documents = Documents.packed([0, len(tokens)], row_length=None)
    context = Context(documents, documents.whole_positions, model.shared_outputs())
    scales = {**dict.fromkeys(SCALES, (1, 1)), **changes}
    x = model.embed(tokens)
    for index, layer in enumerate(model.layers.values()):
        block: Any = layer
        softmax = index % 2 == 1
        placement = (softmax and changes.get("attention_norm_placement")) or changes.get("norm_placement", "pre")
        mixed = scales["attention_scales" if softmax else "linear_scales"]
        for norm, f, (a, b) in (
            (block.mixer_norm, lambda y, layer=block: layer.mixer(y, context)[0], mixed),
            (block.ffn_norm, lambda y, layer=block: layer.ffn(y), scales["ffn_scales"]),
        ):
            if placement == "pre":
                x = a * x + b * f(norm(x))
            elif placement == "post":
                x = a * x + b * norm(f(x))
            else:
                n = norm(x)
                x = a * n + b * f(n)
    return model.project(model.norm(x))


@every_case
def test_a_layer_is_its_formula_and_decodes_to_it(case: str) -> None:
    model, tokens = small_model({**HYBRID, **CASES[case]}), random_tokens(2, 30)
    with torch.no_grad():
        found = model(tokens)
        for row, text in zip(found, tokens, strict=True):
            assert relative(row, plainly(model, text, CASES[case])) < 1e-12
        state = model.init_state(2)
        logits, state = model.prefill(tokens[:, :20], state)
        assert relative(logits, found[:, :20]) < 1e-10
        for step in range(20, 30):
            logits, state = model.step(tokens[:, step], state)
            assert relative(logits, found[:, step]) < 1e-10
        assert relative(found, small_model(HYBRID)(tokens)) > 1e-2


@pytest.mark.parametrize("case", ["behind in softmax layers", "weighted in the stream"])
def test_compiled_layers_have_the_gradients_of_eager_ones(case: str) -> None:
    tokens, labels = random_tokens(40), random_tokens(40, seed=1)
    documents = Documents.packed([0, 15, 40], row_length=None)
    gradients = []
    for compiled in (False, True):
        model = small_model({**HYBRID, **CASES[case]}, moe={"backend": "loop"})
        if compiled:
            compile_regions(model, "aot_eager")
        loss = model(tokens, documents=documents, labels=labels)
        gradients.append(torch.autograd.grad(loss, list(model.parameters())))
    for mine, theirs in zip(*gradients, strict=True):
        assert relative(mine, theirs) < 1e-10


@pytest.mark.parametrize("key", SCALES)
def test_weights_of_nothing_are_refused(key: str) -> None:
    with pytest.raises(RecipeError, match=rf"model.{key} = \[1.0, 0.0\]: both must be positive"):
        small_recipe({**HYBRID, key: [1, 0]})


@pytest.mark.parametrize(
    ("layout", "given", "needs"),
    [
        ("L", "model.attention_scales=[2,1]", "layers of softmax attention"),
        ("L", "model.attention_norm_placement=post", "layers of softmax attention"),
        ("N", "model.linear_scales=[2,1]", "layers of a linear mixer"),
    ],
)
def test_what_no_layer_reads_is_refused_on_the_command_line(layout: str, given: str, needs: str) -> None:
    from torchlinearmoe.recipe.parse import parse_overrides, resolve

    with pytest.raises(RecipeError, match=f"not read; it needs {needs}"):
        resolve({"model": {"layout": layout}, "training": {"steps": 1}}, parse_overrides([given]))
