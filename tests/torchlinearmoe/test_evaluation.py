"""Held-out loss by hand, mixers switched off, and the place where a value went bad."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from torchlinearmoe import build_model
from torchlinearmoe.data.packing import IGNORED, MicroBatch, Sample, collate, ignored_sample
from torchlinearmoe.evaluation import counted_hits, first_bad_layer, held_out_loss, silent_mixers
from torchlinearmoe.generation.padded import forward_masked
from torchlinearmoe.models.decoder import Decoder
from torchlinearmoe.moe import MoE
from torchlinearmoe.parallel.inputs import Inputs
from torchlinearmoe.parallel.passes import Loop
from torchlinearmoe.recipe import resolve

CPU = torch.device("cpu")
VOCABULARY = 40


@pytest.fixture
def model() -> Decoder:
    torch.manual_seed(11)
    sizes = {"hidden_size": 32, "num_heads": 2, "num_kv_heads": 1, "vocab_size": VOCABULARY}
    recipe = resolve(
        {
            "model": {"mixer": "gated_delta_net", "layout": "LN", "num_layers": 2, "init_std": 0.2, **sizes},
            "moe": {"num_experts": 4, "top_k": 2, "hidden_size": 16},
            "training": {"steps": 1},
        }
    )
    return build_model(recipe.model)


def batches(count: int = 3) -> Iterator[MicroBatch]:
    """Micro-batches of two rows of 12 with unequal numbers of labels."""
    generator = torch.Generator().manual_seed(12)
    for index in range(count):
        tokens, labels = torch.randint(VOCABULARY, (2, 24), generator=generator)
        labels[: 5 * index] = IGNORED
        yield MicroBatch(tokens, labels, [0, 3, 12, 20, 24], 12, 24 - 5 * index)


def loss_by_hand(model: Decoder, count: int) -> float:
    total, labels = 0.0, 0
    for batch in batches(count):
        cu_seqlens = torch.tensor(batch.cu_seqlens, dtype=torch.int32)
        logits = model(batch.tokens[None], cu_seqlens=cu_seqlens)[0]
        total += F.cross_entropy(logits, batch.labels, ignore_index=IGNORED, reduction="sum").item()
        labels += int((batch.labels != IGNORED).sum())
    return total / labels


def test_the_loss_under_a_capacity_does_not_depend_on_the_micro_batch(model: Decoder) -> None:
    """Samples of 12 tokens, the third one short; like the loader, micro-batches end in samples that do not count."""
    generator = np.random.default_rng(13)
    ids = [generator.integers(VOCABULARY, size=(2, 12)) for _ in range(5)]
    samples = [Sample(inputs, labels, [0, 5]) for inputs, labels in ids]
    samples[2] = Sample(ids[2][0], np.where(np.arange(12) < 7, ids[2][1], IGNORED), [0, 5, 7], 7)

    def loss(size: int) -> float:
        filled_up = samples + [ignored_sample(12, 0)] * (-len(samples) % size)
        return held_out_loss(
            Loop(model), (collate(filled_up[first : first + size]) for first in range(0, len(filled_up), size)), CPU
        )

    dropless = loss(1)
    for module in model.modules():
        if isinstance(module, MoE):
            module.eval_capacity_factor = 0.6
    assert abs(loss(1) - dropless) > 1e-3
    assert [loss(2), loss(4)] == pytest.approx([loss(1)] * 2, rel=1e-6)


def test_prompts_under_a_capacity_do_not_know_of_each_other(model: Decoder) -> None:
    for module in model.modules():
        if isinstance(module, MoE):
            module.eval_capacity_factor = 0.6
    model.eval()
    tokens = torch.randint(VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(14))
    logits, state = model.prefill(tokens, model.init_state(2), [9, 4])
    torch.testing.assert_close(logits[0], model(tokens[:1])[0])
    torch.testing.assert_close(logits[1, :4], model(tokens[1:, :4])[0])
    torch.testing.assert_close(
        logits[1, :4], forward_masked(model, tokens, torch.arange(9) < torch.tensor([[9], [4]]))[1, :4]
    )
    together, _ = model.step(tokens[:, 0], state)
    alone, _ = model.step(tokens[:1, 0], model.prefill(tokens[:1], model.init_state(1))[1])
    torch.testing.assert_close(together[:1], alone)


def test_the_loss_is_a_mean_over_tokens_and_leaves_no_trace(model: Decoder) -> None:
    model.train()
    before = {name: value.clone() for name, value in model.named_buffers()}
    assert held_out_loss(Loop(model), batches(), CPU) == pytest.approx(loss_by_hand(model.eval(), 3), rel=1e-6)
    model.train()
    assert held_out_loss(Loop(model), batches(), CPU, limit=2) == pytest.approx(loss_by_hand(model.eval(), 2), rel=1e-6)
    model.train()
    held_out_loss(Loop(model), batches(), CPU)
    assert model.training and all(module.training for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.named_buffers())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_hits_are_labels_that_greedy_decoding_says(model: Decoder) -> None:
    model.eval()
    right = labels = 0
    found = list(batches())
    for index, batch in enumerate(found):
        cu_seqlens = torch.tensor(batch.cu_seqlens, dtype=torch.int32)
        said = model(batch.tokens[None], cu_seqlens=cu_seqlens)[0].argmax(-1)
        wanted = torch.where((torch.arange(24) % 3 == 0) & (batch.labels != IGNORED), said, batch.labels)
        found[index] = replace(batch, labels=wanted)
        right += int((said == wanted).sum())
        labels += int((wanted != IGNORED).sum())
    loss = held_out_loss(Loop(model), found, CPU)
    before = model.head.kernel, model.head.backend
    with counted_hits(Loop(model), CPU) as counts:
        assert held_out_loss(Loop(model), found, CPU) == pytest.approx(loss, rel=1e-6)
    assert counts.tolist() == [right, labels] and 0 < right < labels
    assert (model.head.kernel, model.head.backend) == before


def test_with_silent_mixers_a_token_knows_of_no_other(model: Decoder) -> None:
    model.eval()
    tokens = torch.randint(VOCABULARY, (1, 9), generator=torch.Generator().manual_seed(13))
    alone = tokens.T.contiguous()  # nine sequences of one token
    heard = model(tokens)
    with silent_mixers(model):
        torch.testing.assert_close(model(tokens)[0], model(alone)[:, 0])
    torch.testing.assert_close(model(tokens), heard, rtol=0, atol=0)
    assert not torch.allclose(heard[0], model(alone)[:, 0], atol=1e-3)


def bad_place(model: Decoder) -> str:
    found = first_bad_layer(Loop(model), [Inputs(b.tokens, b.labels, b.documents()) for b in batches()])
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())
    return found


def test_a_bad_parameter_is_named(model: Decoder) -> None:
    with torch.no_grad():
        model.get_parameter("layers.1.ffn.experts.down")[2, 1, 0] = float("inf")
    assert bad_place(model) == "the parameter layers.1.ffn.experts.down"


@pytest.mark.parametrize(
    "spoilt, named",
    [
        ("layers.0.mixer.v_proj.weight", "the output of layers.0.mixer (gated_delta_net)"),
        ("layers.1.mixer.v_proj.weight", "the output of layers.1.mixer (softmax_attention)"),
        ("layers.0.ffn.experts.gate_up", "the output of layers.0.ffn"),
    ],
)
def test_the_first_layer_whose_output_overflows_is_named(model: Decoder, spoilt: str, named: str) -> None:
    with torch.no_grad():
        model.get_parameter(spoilt).fill_(3e38)
    assert bad_place(model) == named


def test_the_last_layer_whose_gradient_is_bad_is_named(model: Decoder) -> None:
    # A gradient that breaks in layer 1 breaks that of everything before it, too.
    model.layers["1"].ffn_norm.register_full_backward_hook(  # pyright: ignore[reportAttributeAccessIssue]
        lambda module, inputs, outputs: (inputs[0] * float("nan"),)
    )
    assert bad_place(model) == "the gradient of layers.1.mixer.o_proj.weight"


def test_a_sound_model_has_no_bad_place(model: Decoder) -> None:
    assert bad_place(model) == "no single place (the loss alone is not finite)"
