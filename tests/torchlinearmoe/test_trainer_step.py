"""A step of the trainer is the one a reader would write by hand: cross entropy, balance loss, clipping, AdamW."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from torchlinearmoe import build_model
from torchlinearmoe.data.packing import IGNORED, MicroBatch
from torchlinearmoe.models.decoder import Decoder
from torchlinearmoe.moe.layer import MoE
from torchlinearmoe.moe.totals import StepTotals
from torchlinearmoe.optim import learning_rate
from torchlinearmoe.parallel.mesh import resolve_degrees, tokens_per_step
from torchlinearmoe.recipe import Recipe, resolve
from torchlinearmoe.run_folder import with_tokens_per_step
from torchlinearmoe.runtime import process_group
from torchlinearmoe.trainer import Trainer

LENGTH, STEPS = 40, 4


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    words = [f"word{i}" for i in range(20)]
    texts = [" ".join(words[i % 7 : i % 7 + 2 + i % 11]) for i in range(120)]
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return resolve(
        {
            "model": {"mixer": "hgrn2", "layout": "LN", "num_layers": 2, "hidden_size": 32, "num_heads": 2},
            "moe": {"hidden_size": 16, "balance_coefficient": 0.5, "z_loss_coefficient": 0.1},
            "data": {"paths": [str(corpus)], "validation_fraction": 0.1},
            "training": {
                "steps": STEPS,
                "sequence_length": LENGTH,
                "micro_batch_size": 2,
                "tokens_per_step": 4 * LENGTH,
                "dtype": "float32",
                "device": "cpu",
                "output_dir": str(tmp_path / "run"),
            },
            "optimizer": {"lr": 1e-3, "min_lr": 1e-4, "warmup_steps": 2, "clip_norm": 0.5, "weight_decay": 0.2},
            "metrics": {"tensorboard": False},
        }
    )


@pytest.fixture
def trainer(recipe: Recipe) -> Iterator[Trainer]:
    with process_group(torch.device("cpu")):
        degrees = resolve_degrees(recipe.parallel, 1)
        resolved = with_tokens_per_step(recipe, tokens_per_step(recipe.training, degrees))
        yield Trainer(resolved, degrees, torch.device("cpu"))


def step_by_hand(model: Decoder, optimizer: torch.optim.Optimizer, batches: list[MicroBatch]) -> tuple[float, float]:
    """(mean cross entropy, gradient norm); every sequence at once, the auxiliary losses through the logits."""
    tokens = torch.cat([batch.tokens for batch in batches])
    labels = torch.cat([batch.labels for batch in batches])
    starts = [offset + border for offset, b in zip((0, 2 * LENGTH), batches) for border in b.cu_seqlens[:-1]]
    whole = MicroBatch(tokens, labels, [*starts, len(tokens)], LENGTH, 0)
    logits = model(tokens, documents=whole.documents(), totals=StepTotals(4 * LENGTH, 4))
    loss = F.cross_entropy(logits, labels, ignore_index=IGNORED)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item(), norm.item()


def test_training_is_what_one_would_write_by_hand(trainer: Trainer, recipe: Recipe) -> None:
    model = build_model(recipe.model, recipe.training.seed).train()
    matrices = [p for n, p in model.named_parameters() if p.dim() > 1 and "table" not in n]
    others = [p for n, p in model.named_parameters() if p.dim() == 1 or "table" in n]
    groups = [{"params": matrices, "weight_decay": 0.2}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), eps=1e-8)
    clipped = False
    for step, batches in enumerate(trainer.loader, start=1):
        assert len(batches) == 2
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, total_steps=STEPS, lr=1e-3, min_lr=1e-4, warmup_steps=2)
        expected = step_by_hand(model, optimizer, batches)
        loss, norm, lr = trainer.train_step(batches)
        assert (loss.item(), norm.item()) == pytest.approx(expected, rel=1e-5)
        assert lr == optimizer.param_groups[0]["lr"]
        clipped |= expected[1] > 0.5
    assert clipped and trainer.step == STEPS and trainer.tokens == STEPS * 4 * LENGTH
    for name, parameter in trainer.model.named_parameters():
        torch.testing.assert_close(parameter, model.get_parameter(name), rtol=1e-4, atol=1e-6)


def test_one_rank_is_nothing_to_shard_over(trainer: Trainer) -> None:
    assert not any(isinstance(module, FSDPModule) for module in trainer.model.modules())
    assert not any(isinstance(parameter, DTensor) for parameter in trainer.model.parameters())


def test_a_whole_run_ends_with_a_checkpoint_and_a_word_on_where_it_is(
    trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    monkeypatch.setattr(trainer.metrics, "message", told.append)
    assert trainer.run() is None
    last = trainer.folder / f"checkpoints/step-{STEPS}"
    assert (last / "state.json").is_file()
    assert told[-3:-1] == [f"checkpoint: {last}", f"curves: {trainer.folder}/metrics.jsonl"]
    assert str(last) in told[-1]
    lines = [json.loads(line) for line in (trainer.folder / "metrics.jsonl").read_text().splitlines()]
    epochs = STEPS * 4 / len(trainer.splits.train.samples(LENGTH))
    assert lines[-1]["step"] == STEPS and lines[-1]["epoch"] == pytest.approx(epochs)
    assert 0 < lines[-1]["data_wait"] < lines[-1]["step_time"] and lines[-1]["time"] >= lines[0]["time"] > 1.7e9
    layers = [int(name.split(".")[1]) for name, module in trainer.model.named_modules() if isinstance(module, MoE)]
    assert layers and lines[-1]["moe/layers"] == layers
    assert max(lines[-1]["moe/max_load_by_layer"]) == pytest.approx(lines[-1]["moe/max_load"], rel=1e-3)
