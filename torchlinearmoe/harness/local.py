"""Tasks of lm-eval that need no network: `local_text`, `local_next_verse`, `local_last_word`; `local` is all three.

local_text         token_perplexity, byte_perplexity, bits_per_byte of held-out chapters
local_next_verse   acc, acc_norm: a quarter is chance
local_last_word    acc (greedy decoding says the word), perplexity of the word
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from torchlinearmoe.data.tokenizer import Tokenizer
from torchlinearmoe.harness import corpus

LOCAL = ("local_text", "local_next_verse", "local_last_word")


class Documents(list[dict[str, Any]]):
    """What lm-eval asks of a data set."""

    @property
    def features(self) -> dict[str, Any]:
        return dict.fromkeys(self[0])


def local_task(name: str, tokenizer: Tokenizer) -> Any:
    """The task of lm-eval that is called `name`, one of LOCAL."""
    from lm_eval.api.task import ConfigurableTask  # pyright: ignore[reportMissingImports]

    logger = logging.getLogger("lm_eval.api.task")
    level = logger.level
    logger.setLevel(logging.ERROR)  # it tells how to give options to the data of any task; ours have none
    try:
        return ConfigurableTask(config=_config(name, tokenizer))
    finally:
        logger.setLevel(level)


def _config(name: str, tokenizer: Tokenizer) -> dict[str, Any]:
    if name == "local_text":

        def perplexities(document: dict[str, Any], results: list[float]) -> dict[str, Any]:
            text, log_p = document["text"], results[0]
            size = (log_p, len(text.encode()))
            tokens = (log_p, len(tokenizer.encode(text)))
            return {"token_perplexity": tokens, "byte_perplexity": size, "bits_per_byte": size}

        return _task(
            name,
            corpus.text_documents,
            output_type="loglikelihood_rolling",
            doc_to_text="",
            doc_to_target="{{text}}",
            process_results=perplexities,
            metric_list=[
                _metric("token_perplexity", "weighted_perplexity", better=False),
                _metric("byte_perplexity", "weighted_perplexity", better=False),
                _metric("bits_per_byte", "bits_per_byte", better=False),
            ],
        )
    if name == "local_next_verse":
        return _task(
            name,
            corpus.next_verse_documents,
            output_type="multiple_choice",
            doc_to_text="{{context}}",
            doc_to_choice="{{choices}}",
            doc_to_target="answer",
            target_delimiter="\n",
            metric_list=[_metric("acc", "mean"), _metric("acc_norm", "mean")],
        )
    assert name == "local_last_word", name
    return _task(
        name,
        corpus.last_word_documents,
        output_type="loglikelihood",
        doc_to_text="{{context}}",
        doc_to_target="{{word}}",
        target_delimiter=" ",
        metric_list=[_metric("acc", "mean"), _metric("perplexity", "perplexity", better=False)],
    )


def _task(name: str, documents: Callable[[], list[dict[str, Any]]], **more: Any) -> dict[str, Any]:
    def dataset(**metadata: Any) -> Any:
        return {"test": Documents(documents())}

    return {"task": name, "custom_dataset": dataset, "test_split": "test", "metadata": {"version": 1.0}, **more}


def _metric(name: str, aggregation: str, better: bool = True) -> dict[str, Any]:
    return {"metric": name, "aggregation": aggregation, "higher_is_better": better}
