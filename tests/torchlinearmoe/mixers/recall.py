"""Multi-query associative recall (Arora et al. 2023, arXiv 2312.04927) at a size for the CPU.

A sequence lists `pairs` of a key and its value, then asks for every key in another order; the label of an asked key is
its value. Knowing which values were listed but not whose they are scores 1 / pairs.
"""

from dataclasses import fields

import torch
from torch import Tensor

from torchlinearmoe import MIXERS, build_model
from torchlinearmoe.documents import Documents
from torchlinearmoe.recipe import resolve

IGNORED = -100


def draw(batch: int, pairs: int, symbols: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Tokens and labels [B, 4 pairs]; keys are 0 .. symbols - 1, values symbols .. 2 symbols - 1."""
    keys = torch.rand(batch, symbols, generator=generator).argsort(-1)[:, :pairs]
    values = symbols + torch.rand(batch, symbols, generator=generator).argsort(-1)[:, :pairs]
    order = torch.rand(batch, pairs, generator=generator).argsort(-1)
    asked, answers = keys.gather(1, order), values.gather(1, order)
    tokens = torch.cat([torch.stack([keys, values], -1).flatten(1), torch.stack([asked, answers], -1).flatten(1)], 1)
    labels = torch.full_like(tokens, IGNORED)
    labels[:, 2 * pairs :: 2] = answers
    return tokens, labels


def train_recall(
    mixer: str,
    *,
    pairs: int,
    steps: int,
    seed: int = 0,
    enough: float = 1.0,
    width: int = 64,
    symbols: int = 16,
    batch: int = 64,
    lr: float = 3e-3,
    **options: object,
) -> float:
    """Accuracy on fresh sequences after at most `steps` of training, ending early at `enough`."""
    names = {entry.name for entry in fields(MIXERS[mixer].Options)}
    table = {"conv": 4, **options} if "conv" in names else dict(options)
    recipe = resolve(
        {
            "model": {
                "mixer": mixer,
                "layout": "L",
                "num_layers": 2,
                "init_std": 0.64 * width**-0.5,  # at width 1024 the customary 0.02
                "hidden_size": width,
                "num_heads": 2,
                "num_kv_heads": 2,
                "ffn_hidden_size": 2 * width,
                "vocab_size": 2 * symbols,
            },
            "moe": {"num_experts": 0},
            "mixer": {mixer: table},
            "training": {"steps": 1},
        }
    )
    model = build_model(recipe.model, seed=seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    generator = torch.Generator().manual_seed(seed)
    documents = Documents.batch(batch, 4 * pairs)
    accuracy = 0.0
    for step in range(1, steps + 1):
        tokens, labels = draw(batch, pairs, symbols, generator)
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, step / 25) * (1 - 0.9 * step / steps)
        loss = model(tokens.flatten(), labels=labels.flatten(), documents=documents) / (batch * pairs)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 25 == 0 or step == steps:
            accuracy = _accuracy(model, pairs, symbols, generator)
            if accuracy >= enough:
                break
    return accuracy


@torch.no_grad()
def _accuracy(model: torch.nn.Module, pairs: int, symbols: int, generator: torch.Generator) -> float:
    model.eval()
    tokens, labels = draw(256, pairs, symbols, generator)
    right = model(tokens).argmax(-1) == labels
    model.train()
    return right[labels != IGNORED].float().mean().item()
