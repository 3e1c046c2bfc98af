"""flash-linear-attention's own models of our shapes, on our data in our order.

The model, its layers and its kernels are theirs; the initial values' sizes, the optimizer, its schedule and what is
logged are ours. Masters are float32, products bfloat16. A process tunes each of their operators once, for minutes:
start one process a model.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchlinearmoe.data.loader import build_loader, build_validation_loader
from torchlinearmoe.data.open import open_data
from torchlinearmoe.data.packing import IGNORED, MicroBatch
from torchlinearmoe.data.tokenizer import load_tokenizer
from torchlinearmoe.errors import UserError
from torchlinearmoe.metrics.logger import METRIC_KEYS, MetricsLogger
from torchlinearmoe.metrics.meter import peak_memory_gib
from torchlinearmoe.optim.schedule import scheduled
from torchlinearmoe.recipe.schema import ModelRecipe, Recipe
from torchlinearmoe.run_folder import write_recipe

Peer = tuple[str, Callable[[ModelRecipe], dict[str, Any]]]
"""The stem of their classes, and what their config has besides."""


def _heads(model: ModelRecipe) -> dict[str, Any]:
    return {"num_heads": model.num_heads}


PEERS: dict[str, Peer] = {
    "gla": ("GLA", lambda model: {**_heads(model), "expand_k": 0.5, "expand_v": 1.0}),
    "delta_net": ("DeltaNet", lambda model: {**_heads(model), "expand_k": 1.0, "expand_v": 1.0}),
    "kda": ("KDA", lambda model: {**_heads(model), "head_dim": model.head_dim}),
    "hgrn2": ("HGRN2", lambda model: {"expand_ratio": model.head_dim}),
    "retention": ("RetNet", lambda model: {**_heads(model), "expand_k": 1.0, "expand_v": 2.0}),
}
"""By the mixer whose defaults compute the same."""


def build_peer(mixer: str, model: ModelRecipe) -> nn.Module:
    """Their model in float32, drawn as ours is, on the default device. Raises UserError where there is no fla."""
    try:
        import fla.models as theirs  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UserError(
            f"fla/{mixer}: flash-linear-attention cannot be imported ({error}); pip install flash-linear-attention"
        ) from None
    stem, options = PEERS[mixer]
    config = getattr(theirs, f"{stem}Config")(
        hidden_size=model.hidden_size,
        num_hidden_layers=model.num_layers,
        intermediate_size=model.ffn_hidden_size,
        vocab_size=model.vocab_size,
        max_position_embeddings=model.max_length,
        norm_eps=model.norm_eps,
        initializer_range=model.init_std,
        tie_word_embeddings=False,
        use_cache=False,
        fuse_cross_entropy=False,
        **options(model),
    )
    peer = getattr(theirs, f"{stem}ForCausalLM")(config)
    with torch.no_grad():
        peer.get_input_embeddings().weight.normal_(0.0, model.embed_std)
        for name, weight in peer.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                weight.normal_(0.0, model.init_std / (2 * model.num_layers) ** 0.5)
            elif weight.dim() == 3:  # a short convolution's, [channels, 1, taps]
                weight.uniform_(-(weight.shape[-1] ** -0.5), weight.shape[-1] ** -0.5)
    return peer


def train_peer(recipe: Recipe, device: torch.device) -> None:
    """Train their model of the recipe's mixer and write `metrics.jsonl` as a run does."""
    training, folder = recipe.training, Path(recipe.training.output_dir)
    assert training.tokens_per_step is not None
    write_recipe(recipe, folder)
    torch.manual_seed(training.seed)
    with device:
        model = build_peer(recipe.model.mixer, recipe.model).train()
    fit(model, recipe, device, folder)


def fit(model: nn.Module, recipe: Recipe, device: torch.device, folder: Path) -> None:
    """Train a model that takes `input_ids` [1, T] and `cu_seqlens`, and gives `logits`, as the recipe says."""
    training, metrics = recipe.training, recipe.metrics
    assert training.tokens_per_step is not None
    splits = open_data(recipe.data, load_tokenizer(recipe.data.tokenizer), folder / "cache", folder)
    shape = {"sequence_length": training.sequence_length, "micro_batch_size": training.micro_batch_size}
    alone = {"rank": 0, "ranks": 1, "pin_memory": device.type == "cuda"}
    loader = build_loader(
        splits.train,
        **shape,
        samples_per_step=training.tokens_per_step // training.sequence_length,
        seed=training.seed,
        **alone,
        stop_step=training.total_steps,
    )
    exempt = {name for name, p in model.named_parameters() if p.dim() < 2 or name.endswith("lower_bounds")}
    decayed = [p for name, p in model.named_parameters() if name not in exempt]
    others = [p for name, p in model.named_parameters() if name in exempt]
    options = recipe.optimizer
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": options.weight_decay}, {"params": others, "weight_decay": 0.0}],
        betas=options.betas,
        eps=options.eps,
    )
    logger = MetricsLogger(folder, total_steps=training.total_steps, tensorboard=False)
    begun, since = time.perf_counter(), 0
    with logger:
        for step, batches in enumerate(loader, start=1):
            valid = sum(batch.valid_tokens for batch in batches)
            loss = torch.zeros((), device=device)
            for batch in batches:
                part = _loss(model, batch, device) / valid
                part.backward()
                loss += part.detach()
            norm = nn.utils.clip_grad_norm_(model.parameters(), options.clip_norm or float("inf"))
            for group in optimizer.param_groups:
                group["lr"] = scheduled(recipe, step)
            optimizer.step()
            optimizer.zero_grad()
            since += training.tokens_per_step
            last = step == training.total_steps
            if last or (metrics.validation_interval and step % metrics.validation_interval == 0):
                loss.item()
                paused = time.perf_counter()
                held_out = build_validation_loader(splits.validation, **shape, **alone)
                logger.validation(step, _held_out(model, held_out, device))
                begun += time.perf_counter() - paused
            if last or step % metrics.interval == 0:
                values = {"loss": loss.item(), "grad_norm": norm.item(), "lr": scheduled(recipe, step)}
                values |= {"tokens": step * training.tokens_per_step, "memory_gib": peak_memory_gib(device)}
                values["tokens_per_second"] = since / (time.perf_counter() - begun)
                logger.log(step, {**dict.fromkeys(METRIC_KEYS), **values, "skipped_steps": 0})
                begun, since = time.perf_counter(), 0
            logger.advance(step)


def _loss(model: nn.Module, batch: MicroBatch, device: torch.device) -> Tensor:
    """The summed cross entropy of a micro-batch."""
    batch = batch.to(device)
    borders = torch.tensor(batch.cu_seqlens, dtype=torch.int32, device=device)
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        logits = model(input_ids=batch.tokens.reshape(1, -1), cu_seqlens=borders).logits
    return F.cross_entropy(logits[0].float(), batch.labels.reshape(-1), ignore_index=IGNORED, reduction="sum")


@torch.no_grad()
def _held_out(model: nn.Module, batches: Iterable[MicroBatch], device: torch.device) -> float:
    """Nats a token."""
    model.eval()
    total, tokens = torch.zeros((), device=device, dtype=torch.float64), 0
    for batch in batches:
        total += _loss(model, batch, device)
        tokens += batch.valid_tokens
    model.train()
    return total.item() / tokens
