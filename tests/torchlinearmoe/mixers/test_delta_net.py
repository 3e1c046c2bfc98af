"""What the delta rule's mixers have in common: eigenvalues, gradients at silenced keys, refusals."""

from __future__ import annotations

import pytest
import torch
from mixer_cases import Case, make_stack, random_inputs, small_model

from torchlinearmoe.documents import Documents
from torchlinearmoe.errors import RecipeError
from torchlinearmoe.mixers.delta_mixer import DeltaMixer
from torchlinearmoe.mixers.delta_net import DeltaNet, Options


@pytest.mark.parametrize("name", ["delta_net", "gated_delta_net", "kda"])
@pytest.mark.parametrize("negative", [False, True])
def test_transitions_have_negative_eigenvalues_only_when_asked_for(name: str, negative: bool):
    """Whatever the inputs, 1 - b stays within [0, 1] or reaches below zero."""
    mixer = make_stack(Case(name, {"negative_eigenvalues": negative})).layers[0]
    assert isinstance(mixer, DeltaMixer)
    beta = mixer.strength(mixer.project(30 * random_inputs(50))["b"]).detach()
    assert float(beta.min()) >= 0 and bool((1 - beta).min() < -0.5) == negative
    assert float(beta.max()) <= (2 if negative else 1)


@pytest.mark.parametrize("name", ["delta_net", "gated_delta_net", "kda"])
def test_constant_inputs_that_silence_the_keys_leave_finite_gradients(name: str):
    stack = make_stack(Case(name, {}), dtype=torch.float32)
    x_TD = torch.zeros(70, 64, requires_grad=True)
    y_TD, _ = stack(x_TD, stack.context(Documents.packed([0, 70])))
    y_TD.square().sum().backward()
    assert x_TD.grad is not None and bool(x_TD.grad.isfinite().all())
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in stack.parameters())


@pytest.mark.parametrize(
    "wrong, message",
    [
        (
            {"heads": 2, "head_dim": 32, "value_heads": 3},
            "mixer.delta_net.value_heads = 3: must be a multiple of the 2",
        ),
        ({"expand_k": 0.01}, "mixer.delta_net.expand_k = 0.01: must make whole channels"),
        ({"expand_v": 0.01}, "mixer.delta_net.expand_v = 0.01: must make whole channels"),
        ({"gate_activation": "sigmoid"}, "mixer.delta_net.gate_activation = 'sigmoid': there is no gate; set "),
    ],
)
def test_refuses_in_one_line(wrong, message):
    with pytest.raises(RecipeError) as error:
        DeltaNet.check(Options(**wrong), small_model())
    assert str(error.value).startswith(message) and "\n" not in str(error.value)
