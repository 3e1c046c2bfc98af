"""What is known so far: `outcome.json` in each model's folder, and of all of them `curves.json` and `curves.md`."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from torchlinearmoe.curves.cases import Case
from torchlinearmoe.curves.text import PACKAGE
from torchlinearmoe.errors import UserError
from torchlinearmoe.models.decoder import Decoder
from torchlinearmoe.plotting.run import Run, read_run
from torchlinearmoe.recipe.schema import ModelRecipe

OUTCOME, FAILED = "outcome.json", "failed.txt"
FILE, TABLE, PICTURE = "curves.json", "curves.md", "curves.png"
FORMAT = 1
VALIDATION = "validation_loss"


@dataclass(frozen=True)
class Outcome:
    """What became of a model."""

    label: str
    mixer: str
    theirs: bool
    parameters: int
    """Beside the embedding and the head."""
    curve: list[tuple[int, float]]
    """(tokens, held-out loss in nats a token)."""
    tokens_per_second: float
    """The median of the logged steps."""
    lr: float
    diverged: bool
    seconds: float
    """In all, what it took to build and compile included."""

    @property
    def loss(self) -> float:
        """Held-out, in the end."""
        return float("inf") if self.diverged or not self.curve else self.curve[-1][1]


def is_done(case: Case) -> bool:
    """Whether the case's outcome is known."""
    return (case.folder / OUTCOME).exists()


def measured(case: Case, diverged: bool, seconds: float) -> Outcome:
    """The outcome of a run that has ended, from its metrics."""
    try:
        run = read_run(case.folder)
    except UserError:  # it ended before a step was logged
        run = Run(case.folder, [])
    tokens, losses = run.series(VALIDATION)
    rates = sorted(run.series("tokens_per_second")[1])
    return Outcome(
        label=case.label,
        mixer=case.mixer,
        theirs=case.theirs,
        parameters=parameters(case.recipe.model),
        curve=[(round(at), loss) for at, loss in zip(tokens, losses)],
        tokens_per_second=rates[len(rates) // 2] if rates else 0.0,
        lr=case.recipe.optimizer.lr,
        diverged=diverged,
        seconds=round(seconds, 1),
    )


def parameters(model: ModelRecipe) -> int:
    """Beside the embedding and the head."""
    with torch.device("meta"):
        decoder = Decoder(model)
    heads = (decoder.embed.weight, decoder.head.weight)
    return sum(p.numel() for p in decoder.parameters()) - sum(w.numel() for w in heads if w is not None)


def write_outcome(case: Case, outcome: Outcome) -> None:
    """All or nothing."""
    _write(case.folder / OUTCOME, json.dumps(asdict(outcome), indent=1) + "\n")


def read_outcomes(cases: Iterable[Case]) -> list[Outcome]:
    """Those that are known, the best first. Raises UserError for a file that is something else."""
    found = []
    for case in cases:
        file = case.folder / OUTCOME
        if not file.exists():
            continue
        try:
            told = json.loads(file.read_text())
            found.append(Outcome(**{**told, "curve": [(at, loss) for at, loss in told["curve"]]}))
        except (ValueError, TypeError, KeyError):
            raise UserError(f"{file}: is not what a run writes; remove it, and the model is trained again") from None
    return sorted(found, key=lambda outcome: outcome.loss)


def write_results(outcomes: Sequence[Outcome], folder: Path) -> list[str]:
    """`curves.json` and `curves.md`; returns the table's lines."""
    lines = table(outcomes)
    models = [asdict(outcome) for outcome in outcomes]
    _write(folder / FILE, json.dumps({"format": FORMAT, "text": PACKAGE, "models": models}, indent=1) + "\n")
    _write(folder / TABLE, "\n".join(lines) + "\n")
    return lines


def table(outcomes: Sequence[Outcome]) -> list[str]:
    """Rows in Markdown: held-out loss early, half way and in the end; of flash-linear-attention's beside ours."""
    ours = {outcome.mixer: outcome.loss for outcome in outcomes if outcome.label == outcome.mixer}
    rows = [
        "| model | parameters beside embeddings | loss at a tenth | at half | in the end | of ours | tokens/s |",
        "|---|---|---|---|---|---|---|",
    ]
    for outcome in outcomes:
        last = outcome.curve[-1][0] if outcome.curve else 0
        early, half = (_at(outcome, last * share) for share in (0.1, 0.5))
        known = ours.get(outcome.mixer) if outcome.theirs else None
        beside = f"{100 * (outcome.loss / known - 1):+.2f} %" if known else ""
        ended = "diverged" if outcome.diverged else f"{outcome.loss:.4f}"
        rows.append(
            f"| {outcome.label} | {outcome.parameters / 1e6:.1f} M | {early} | {half} | {ended} | {beside} "
            f"| {outcome.tokens_per_second:,.0f} |"
        )
    return rows


def _at(outcome: Outcome, tokens: float) -> str:
    """The first loss from so many tokens on."""
    found = [loss for at, loss in outcome.curve if at >= tokens * (1 - 1e-6)]
    return f"{found[0]:.4f}" if found else ""


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        aside.write_text(text, encoding="utf-8")
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)
