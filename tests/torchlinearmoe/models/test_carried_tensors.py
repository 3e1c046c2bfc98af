"""Tensors that travel from layer to layer pass through layers of other mixers, in training and in decoding."""

from __future__ import annotations

import torch
from decoder_cases import random_tokens, relative, small_model
from torch.nn import functional as F

from torchlinearmoe.documents import Documents

HYBRID = {"mixers": ["softmax_attention", "rwkv7", "gla", "rwkv7", "softmax_attention", "gla", "rwkv7"]}
LENGTHS = (1, 40, 25, 4)


def test_a_hybrid_trains_and_every_layer_takes_part():
    model, tokens = small_model(HYBRID, dtype=torch.float32), random_tokens(2, 24)
    documents, labels = Documents.batch(2, 24), tokens.roll(-1, 1).flatten()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(15):
        loss = model(tokens.flatten(), labels=labels, documents=documents) / labels.numel()
        optimizer.zero_grad()
        loss.backward()
        for name, parameter in model.named_parameters():
            if ".mixer." in name:
                assert parameter.grad is not None and bool(parameter.grad.norm() > 0), name
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]


def test_packed_documents_of_a_hybrid_equal_documents_alone_in_outputs_and_gradients():
    model, tokens = small_model(HYBRID), random_tokens(1, sum(LENGTHS))
    borders = F.pad(torch.tensor(LENGTHS).cumsum(0), (1, 0)).int()
    packed = model(tokens, cu_seqlens=borders)
    alone = torch.cat([model(part) for part in tokens.split(LENGTHS, 1)], 1)
    assert relative(packed.detach(), alone.detach()) < 1e-10
    weights = torch.randn(packed.shape, generator=torch.Generator().manual_seed(3)).double()
    parameters = dict(model.layers.named_parameters())
    gradients = [torch.autograd.grad((y * weights).sum(), list(parameters.values())) for y in (packed, alone)]
    for name, actual, expected in zip(parameters, *gradients):
        assert float((actual - expected).norm()) < 1e-9 * max(float(expected.norm()), 1e-6), name


def test_prompts_then_steps_of_a_hybrid_equal_the_parallel_forward():
    lengths, more = [70, 0, 1, 33], 3
    model, tokens = small_model(HYBRID), random_tokens(4, 70 + more)
    with torch.no_grad():
        expected = model(tokens)
        logits, state = model.prefill(tokens[:, :70], model.init_state(4, max_length=80), lengths)
        for n, length in enumerate(lengths):
            assert relative(logits[n, :length], expected[n, :length]) < 1e-10 or not length
        for i in range(more):
            following = torch.stack([tokens[n, length + i] for n, length in enumerate(lengths)])
            logits, state = model.step(following, state)
            wanted = torch.stack([expected[n, length + i] for n, length in enumerate(lengths)])
            assert relative(logits, wanted) < 1e-10, i
