"""What `[data]` names, opened."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torchlinearmoe.data.chat_template import load_template
from torchlinearmoe.data.conversations import open_conversations
from torchlinearmoe.data.prepare import Tell
from torchlinearmoe.data.shared import Decide, alone
from torchlinearmoe.data.splits import Splits, open_splits
from torchlinearmoe.data.tokenizer import Tokenizer
from torchlinearmoe.recipe.schema import DataRecipe


def open_data(
    data: DataRecipe,
    tokenizer: Tokenizer,
    cache: Path,
    run_folder: Path | None = None,
    decide: Decide = alone,
    tell: Tell | None = None,
) -> Splits[Any]:
    """The two splits of a recipe's data, tokenised into `data.cache`, else into `cache`. Raises UserError.

    `run_folder` is where the run writes, `decide` picks the rank that finds and tokenises the data for all; `tell` is
    called with (done, total) in bytes of text meanwhile.
    """
    where: dict[str, Any] = {
        "tokenizer": tokenizer,
        "validation_fraction": data.validation_fraction,
        "begins": data.begin_of_text,
        "cache": data.cache or cache,
        "run_folder": run_folder,
        "decide": decide,
    }
    if data.format == "messages":
        return open_conversations(data.paths, template=load_template(data.chat_template), **where)
    return open_splits(data.paths, split=data.validation_split, tell=tell, **where)
