"""Tasks asked while a model trains: their figures stand in the run's metrics, and the run is as it was without them."""

from __future__ import annotations

import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from harness import RankPool
from tiny_run import Settings, build, every_run, parameters_of, read_lines, settings, unsettle, write_corpus
from tiny_run import whole as gathered

from torchlinearmoe.data.tokenizer import load_tokenizer
from torchlinearmoe.errors import RecipeError, UserError
from torchlinearmoe.harness.training import Evaluation, _random_state_kept, figures
from torchlinearmoe.harness.whole import whole_model
from torchlinearmoe.recipe import EvaluationRecipe, resolve

LAYOUTS: dict[str, tuple[int, Settings]] = {
    "data 2": (2, {}),
    "pipeline 2": (2, {"parallel": {"pipeline": 2}}),
    "tensor 2 x expert 2": (2, {"parallel": {"tensor": 2, "expert": 2}}),
    "context 2 x data 2, checkpointed": (
        4,
        {"parallel": {"context": 2, "expert": 4}, "training": {"activation_checkpointing": "full"}},
    ),
}
SMALL: Settings = {
    "model": {"layout": "LN", "num_layers": 2, "num_kv_heads": 2, "init_std": 0.2, "tie_embeddings": True}
}


def same_as_its_parts(rank: int, tables: Settings) -> bool:
    """What was put together has the values of every part."""
    trainer = build(tables)
    for part in trainer.parts:
        unsettle(part)
    recipe, meshes = trainer.recipe.model, trainer.meshes
    model = whole_model(recipe, trainer.parts, meshes.pipeline_group, trainer.device, trainer.dtype)
    found = dict(model.named_parameters())
    for name, parameter in parameters_of(trainer.parts):
        torch.testing.assert_close(found[name].detach(), gathered(parameter), rtol=0, atol=0)
    return not model.training and all(torch.isfinite(value).all() for value in model.state_dict().values())


@pytest.mark.parametrize("layout", every_run(LAYOUTS, *list(LAYOUTS)[:3], slow=list(LAYOUTS)[3:]))
def test_every_rank_has_the_whole_model(ranks: RankPool, tmp_path: Path, layout: str) -> None:
    size, changes = LAYOUTS[layout]
    assert all(ranks(size, same_as_its_parts, settings(write_corpus(tmp_path), tmp_path / "run", SMALL, changes)))


def trained(rank: int, tables: Settings) -> list[dict[str, Any]]:
    trainer = build(tables)
    trainer.run()
    return read_lines(trainer.folder) if rank == 0 else []


@pytest.mark.parametrize("size", [1, 2])
def test_evaluations_stand_in_the_metrics_and_change_no_loss(ranks: RankPool, tmp_path: Path, size: int) -> None:
    pytest.importorskip("lm_eval", reason="the extra eval is not installed")
    corpus = write_corpus(tmp_path)
    short: Settings = {**SMALL, "training": {"steps": 5}, "metrics": {"interval": 2}}
    asked: Settings = {"evaluation": {"tasks": ["local_next_verse", "local_text"], "interval": 3, "limit": 2}}
    (plain, *_) = ranks(size, trained, settings(corpus, tmp_path / "plain", short))
    (found, *_) = ranks(size, trained, settings(corpus, tmp_path / "asked", short, asked))
    losses = [[line["loss"] for line in lines if "loss" in line] for lines in (plain, found)]
    assert losses[0] == losses[1]
    names = {"local_next_verse/acc", "local_next_verse/acc_norm", "local_text/byte_perplexity"}
    at = [line for line in found if "evaluation/local_text/byte_perplexity" in line]
    assert [line["step"] for line in at] == [3, 5] and all("loss" in line for line in at[1:])
    for line in at:
        assert {f"evaluation/{name}" for name in names} < line.keys()
        assert line["evaluation/local_text/byte_perplexity"] > 1
    assert not any("evaluation" in key for line in plain for key in line)


def test_without_lm_eval_a_run_ends_before_it_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UserError) as told:
        Evaluation(EvaluationRecipe(tasks=("local",)), load_tokenizer())
    assert str(told.value).startswith("evaluation.tasks needs lm-eval") and "torchlinearmoe[eval]" in str(told.value)


def test_generators_go_on_as_if_nobody_had_drawn() -> None:
    def draws() -> list[float]:
        return [random.random(), float(np.random.rand()), torch.rand(()).item()]

    def seed() -> None:
        random.seed(3), np.random.seed(3), torch.manual_seed(3)

    seed()
    expected = draws()
    seed()
    with _random_state_kept():
        torch.manual_seed(9), np.random.seed(9), random.seed(9)
        draws()
    assert draws() == expected


def test_figures_are_named_by_task_metric_and_filter() -> None:
    found = figures({"arc": {"alias": "arc", "acc,none": 0.5, "acc_stderr,none": "N/A", "match,strict": 1}})
    assert found == {"evaluation/arc/acc": 0.5, "evaluation/arc/match.strict": 1.0}


@pytest.mark.parametrize(
    "table, told",
    [
        ({"tasks": [""]}, "evaluation.tasks = ['']: a name is empty"),
        ({"tasks": ["local"], "limit": 0}, "evaluation.limit = 0.0: must be positive"),
        ({"tasks": ["local"], "num_fewshot": -1}, "evaluation.num_fewshot = -1"),
        ({"tasks": ["local"], "interval": -1}, "evaluation.interval = -1"),
        ({"tasks": ["local"], "batch_tokens": 0}, "evaluation.batch_tokens = 0"),
    ],
    ids=str,
)
def test_what_cannot_be_asked_is_refused(table: dict[str, Any], told: str) -> None:
    with pytest.raises(RecipeError) as refused:
        resolve({"evaluation": table, "training": {"steps": 1}})
    assert told in str(refused.value)
