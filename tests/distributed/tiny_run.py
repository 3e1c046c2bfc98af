"""Tiny training runs for tests: a corpus, recipes, and a trainer inside the ranks of the harness.

A run here is the real `Trainer`, from recipe to `metrics.jsonl`, on a model of a few thousand parameters. Values that
start where they hide errors (scales at one, biases and bounds at zero) are moved first, by the same amount on every
layout.
"""

import hashlib
import json
import random
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.distributed.tensor import DTensor

from torchlinearmoe.benchmark.multi.unsettle import unsettle

Settings = dict[str, dict[str, Any]]


class Result(NamedTuple):
    """What a run left behind, on every rank."""

    lines: list[dict[str, Any]]
    """metrics.jsonl."""
    gradients: dict[str, Tensor]
    """Whole gradients of the first step taken, before clipping, by parameter; of this rank's pipeline stages."""
    state: dict[str, Tensor]
    """Whole parameters and buffers at the end; of this rank's pipeline stages."""
    rows: dict[int, list[str]]
    """A hash of every packed sequence that this rank saw, by step."""
    stopped: int | None
    """What `Trainer.run` returned."""
    graphs: int
    """Graphs that torch.compile made."""
    graph_breaks: list[str]
    """Why it made more than one of a region."""

    def column(self, key: str) -> list[float]:
        """A figure of every logged step."""
        return [line[key] for line in self.lines if key in line]


def every_run(cases: Iterable[str], *chosen: str, slow: Sequence[str] = ()) -> list[Any]:
    """All cases for `parametrize`; those that are neither chosen nor slow run with `-m distributed_full` only."""
    names = list(cases)
    assert {*chosen, *slow} <= set(names)
    marks = dict.fromkeys(names, [pytest.mark.distributed_full])
    marks |= dict.fromkeys(slow, [pytest.mark.slow]) | dict.fromkeys(chosen, [])
    return [pytest.param(name, marks=marks[name]) for name in names]


def write_corpus(folder: Path, documents: int = 60) -> Path:
    """A JSONL file of short and long documents, so that packed sequences hold several and documents are cut."""
    chooser = random.Random(5)
    words = ["".join(chooser.choices("abcdefghijklmnopqrstuvwxyz", k=chooser.randint(1, 7))) for _ in range(60)]
    texts = (" ".join(chooser.choices(words, k=chooser.choice([2, 5, 20, 60]))) for _ in range(documents))
    path = folder / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def settings(corpus: Path, output: Path, *changes: Settings) -> Settings:
    """A recipe as nested tables: sparse, packed, everything logged; `changes` win, later ones over earlier ones."""
    base: Settings = {
        "model": {
            "mixer": "hgrn2",
            "layout": "LLLN",
            "hidden_size": 32,
            "num_layers": 4,
            "num_heads": 2,
            "num_kv_heads": 1,
            "vocab_size": 1024,
        },
        "moe": {
            "num_experts": 4,
            "top_k": 2,
            "hidden_size": 16,
            "shared_hidden_size": 16,
            "shared_gate": True,
            "balance_coefficient": 0.05,
            "z_loss_coefficient": 0.01,
        },
        "data": {"paths": [str(corpus)], "cache": str(corpus.parent / "cache"), "validation_fraction": 0.05},
        "training": {
            "steps": 10,
            "sequence_length": 48,
            "micro_batch_size": 1,
            "tokens_per_step": 4 * 48,
            "dtype": "float32",
            "device": "cpu",
            "output_dir": str(output),
        },
        "optimizer": {"lr": 1e-3, "min_lr": 1e-4, "warmup_steps": 2},
        "metrics": {"interval": 1, "tensorboard": False},
        "checkpoint": {"interval": 0},
    }
    for change in changes:
        for section, table in change.items():
            merged = {**base.get(section, {}), **table}
            base[section] = {key: value for key, value in merged.items() if value is not None}
    return base


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, a copy; every rank takes part."""
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()


def parameters_of(parts: Iterable[nn.Module]) -> Iterator[tuple[str, nn.Parameter]]:
    """Every parameter of the parts of a model, by its name in the whole model."""
    for part in parts:
        yield from part.named_parameters()


@contextmanager
def in_float64(wanted: bool = True) -> Iterator[None]:
    """Trainers built inside compute in float64, which no recipe offers."""
    from torchlinearmoe import trainer

    usual = trainer.choose_dtype
    if wanted:
        trainer.choose_dtype = lambda *_: torch.float64
    try:
        yield
    finally:
        trainer.choose_dtype = usual


@contextmanager
def watched(gradients: dict[str, Tensor], rows: dict[int, list[str]]) -> Iterator[None]:
    """Fill `gradients` with the whole gradients of the first step inside, and `rows` with the data of every step."""
    from torchlinearmoe import trainer

    norm, train_step = trainer.gradient_norm, trainer.Trainer.train_step

    def norm_watched(parts: Any, *args: Any, **kwargs: Any) -> Tensor:
        if not gradients:
            for name, parameter in parameters_of(parts):
                assert parameter.grad is not None, name
                gradients[name] = whole(parameter.grad)
        return norm(parts, *args, **kwargs)

    def train_step_watched(self: Any, batches: list[Any], received: int | None = None) -> Any:
        pairs = torch.cat([torch.stack((b.tokens, b.labels)).view(2, -1, b.row_length) for b in batches], 1)
        rows[self.step + 1] = [hashlib.sha256(row.numpy().tobytes()).hexdigest() for row in pairs.transpose(0, 1)]
        return train_step(self, batches, received)

    trainer.gradient_norm, trainer.Trainer.train_step = norm_watched, train_step_watched
    try:
        yield
    finally:
        trainer.gradient_norm, trainer.Trainer.train_step = norm, train_step


def build(tables: Settings) -> Any:
    """The trainer of a recipe on the ranks that exist."""
    from torchlinearmoe.parallel.mesh import resolve_degrees, tokens_per_step
    from torchlinearmoe.recipe import resolve
    from torchlinearmoe.run_folder import with_tokens_per_step
    from torchlinearmoe.trainer import Trainer

    recipe = resolve(tables)
    degrees = resolve_degrees(recipe.parallel, dist.get_world_size())
    recipe = with_tokens_per_step(recipe, tokens_per_step(recipe.training, degrees))
    return Trainer(recipe, degrees, torch.device("cpu"))


def run(rank: int, tables: Settings, moved: bool = True) -> Result:
    """Train a recipe to its end, from moved values or from where its folder stands."""
    gradients: dict[str, Tensor] = {}
    rows: dict[int, list[str]] = {}
    counters.clear()
    trainer = build(tables)
    if moved:
        for part in trainer.parts:
            unsettle(part)
    with watched(gradients, rows):
        stopped = trainer.run()
    state = {name: whole(value) for part in trainer.parts for name, value in part.state_dict().items()}
    dist.barrier()
    graphs, breaks = counters["stats"]["unique_graphs"], list(counters["graph_break"])
    return Result(read_lines(trainer.folder), gradients, state, rows, stopped, graphs, breaks)


def read_lines(folder: str | Path) -> list[dict[str, Any]]:
    """metrics.jsonl of a run's folder."""
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


def assert_same_training(
    found: Result, expected: Result, tolerance: float = 1e-5, *, cancelling: tuple[str, ...] = ()
) -> None:
    """Losses and gradient norms of every step, and the first step's gradients, agree to a relative `tolerance`.

    cancelling: parameters of few numbers whose gradients are sums of all tokens' terms, which cancel: three times it.
    """
    for key in ("loss", "grad_norm", "lr", "tokens", "validation_loss"):
        assert found.column(key) == pytest.approx(expected.column(key), rel=tolerance), key
    assert found.gradients.keys() == expected.gradients.keys()
    for name, gradient in expected.gradients.items():
        assert gradient.norm() > 0, f"{name} has no gradient: nothing is shown"
        distance = (found.gradients[name] - gradient).norm() / gradient.norm()
        limit = 3 * tolerance if name.endswith(cancelling) else tolerance
        assert distance < limit, f"gradient of {name}: {distance:.1e}"
