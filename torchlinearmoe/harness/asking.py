"""A model asked by lm-eval's own `simple_evaluate`."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from torchlinearmoe.errors import UserError
from torchlinearmoe.harness.tasks import Tasks

if TYPE_CHECKING:
    from torchlinearmoe.harness.lm import LinearMoELM


def check_lm_eval(who: str) -> None:
    """Raise UserError where there is no lm-eval, which `who` needs."""
    try:
        import lm_eval  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        missing = error.name or "lm_eval"
        raise UserError(
            f"{who} needs lm-eval ({missing} is not installed); pip install lm-eval, or the extra "
            "'torchlinearmoe[eval]'"
        ) from None


def ask(
    model: LinearMoELM,
    tasks: Tasks,
    *,
    num_fewshot: int | None = None,
    limit: float | None = None,
    gen_kwargs: str | None = None,
    resamplings: int = 0,
    samples: bool = False,
) -> dict[str, Any] | None:
    """lm-eval's results; None on every rank but the first. Every rank calls it.

    limit: questions of each task, below 1 their share; resamplings: for the errors of its means, 0 for none.
    """
    import lm_eval  # pyright: ignore[reportMissingImports]

    # Errors by resampling: tasks start processes for it, which a rank that holds a GPU must not.
    os.environ.setdefault("DISABLE_MULTIPROC", "1")
    simple_evaluate: Any = lm_eval.simple_evaluate  # its decorator hides what it takes
    return simple_evaluate(
        model=model,
        tasks=tasks.made(),
        task_manager=tasks.manager,
        num_fewshot=num_fewshot,
        limit=int(limit) if limit and limit >= 1 else limit,
        gen_kwargs=gen_kwargs,
        bootstrap_iters=resamplings,
        log_samples=samples,
    )
