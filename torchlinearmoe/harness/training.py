"""Tasks asked of a model while it trains: of a copy of it, with the run's random state put back afterwards."""

from __future__ import annotations

import io
import random
from collections.abc import Collection, Iterator
from contextlib import contextmanager, redirect_stderr

import numpy as np
import torch

from torchlinearmoe.data.tokenizer import Tokenizer
from torchlinearmoe.harness.asking import ask, check_lm_eval
from torchlinearmoe.harness.tasks import Tasks
from torchlinearmoe.models.decoder import Decoder
from torchlinearmoe.recipe import EvaluationRecipe


class Evaluation:
    """What `[evaluation]` says, ready to be asked. Raises UserError where lm-eval is missing, or a task."""

    def __init__(self, recipe: EvaluationRecipe, tokenizer: Tokenizer) -> None:
        check_lm_eval("evaluation.tasks")
        self.recipe = recipe
        self.tasks = Tasks(recipe.tasks, tokenizer, "evaluation.tasks:")

    def ask(self, model: Decoder, tokenizer: Tokenizer, ends: Collection[int] = ()) -> dict[str, float]:
        """`evaluation/TASK/METRIC` of every task; nothing on other ranks than the first. Every rank calls it.

        model: whole, on each rank; tokenizer: with documents that start as in training; ends: see `LinearMoELM`.
        """
        from torchlinearmoe.harness.lm import LinearMoELM

        recipe = self.recipe
        self.tasks.tokenizer = tokenizer
        asked = LinearMoELM(model, tokenizer, ends=sorted(ends), batch_tokens=recipe.batch_tokens)
        with _random_state_kept(), redirect_stderr(io.StringIO()):  # its bars would run through the run's own
            results = ask(asked, self.tasks, num_fewshot=recipe.num_fewshot, limit=recipe.limit)
        return {} if results is None else figures(results["results"])


def figures(results: dict[str, dict[str, object]]) -> dict[str, float]:
    """lm-eval's results by task and metric, flat; without errors of means.

    >>> figures({"arc": {"alias": "arc", "acc,none": 0.5, "acc_stderr,none": 0.1, "match,strict": 1}})
    {'evaluation/arc/acc': 0.5, 'evaluation/arc/match.strict': 1.0}
    """
    found = {}
    for task, values in results.items():
        for key, value in values.items():
            metric, _, kind = key.partition(",")
            if isinstance(value, (int, float)) and kind and not metric.endswith("_stderr"):
                found[f"evaluation/{task}/{metric}{'' if kind == 'none' else f'.{kind}'}"] = float(value)
    return found


@contextmanager
def _random_state_kept() -> Iterator[None]:
    """Every generator that lm-eval seeds or draws from is as it was afterwards."""
    plain, numbers = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[torch.cuda.current_device()] if torch.cuda.is_initialized() else []):
            yield
    finally:
        random.setstate(plain)
        np.random.set_state(numbers)
