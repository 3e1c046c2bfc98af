"""A model as lm-eval's `LM`: what a task asks becomes ids, questions and prompts; see `scoring` and `continuing`.

As lm-eval's `hf` model does: nothing stands before a context but the token that the tokenizer's own files put before a
text; an empty context is the token that starts documents; what is longer than the model's `max_length` loses its
beginning; a document for rolling perplexity is cut into windows that do not overlap, after the start token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from lm_eval.api.instance import Instance  # pyright: ignore[reportMissingImports]
from lm_eval.api.model import TemplateLM  # pyright: ignore[reportMissingImports]
from lm_eval.models.utils import normalize_gen_kwargs  # pyright: ignore[reportMissingImports]
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window  # pyright: ignore[reportMissingImports]
from torch import Tensor

from torchlinearmoe.data.tokenizer import Tokenizer
from torchlinearmoe.errors import UserError
from torchlinearmoe.generation import GREEDY, Sampling
from torchlinearmoe.harness.continuing import continue_texts
from torchlinearmoe.harness.scoring import Question, Scorer
from torchlinearmoe.models.decoder import Decoder

MAX_GENERATED = 256
"""Tokens of a continuation where the task says nothing, as in lm-eval."""


class LinearMoELM(TemplateLM):
    """A decoder and its tokenizer, for `lm_eval.simple_evaluate(model=...)`.

    ends: ids that end a generated text, beside the tokenizer's end of text. Over several ranks, each with the whole
    model, lm-eval gives each of them its share of the requests.
    """

    def __init__(
        self,
        model: Decoder,
        tokenizer: Tokenizer,
        *,
        ends: Sequence[int] = (),
        batch_tokens: int = 8192,
        max_length: int | None = None,
        name: str = "",
    ) -> None:
        super().__init__()
        self.scorer = Scorer(model, batch_tokens, max_length)
        self.ids = tokenizer
        self.ends = {tokenizer.end_of_text, *ends}
        self.name = name
        self._device = model.embed.weight.device
        if dist.is_initialized():
            self._rank, self._world_size = dist.get_rank(), dist.get_world_size()

    @property
    def eot_token_id(self) -> int:
        return self.ids.end_of_text

    @property
    def prefix_token_id(self) -> int:
        return self.ids.start

    @property
    def max_length(self) -> int:
        """Tokens that are read at most; lm-eval notes it."""
        return self.scorer.max_length

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval writes into its results of the model."""
        parameters = sum(parameter.numel() for parameter in self.scorer.model.parameters())
        dtype = str(self.scorer.model.embed.weight.dtype)
        return {"model": "torchlinearmoe", "checkpoint": self.name, "model_num_parameters": parameters, "dtype": dtype}

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        begin = self.ids.begin_of_text
        return [*([begin] if begin is not None and add_special_tokens is not False else []), *self.ids.encode(string)]

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        questions = [Question(tuple(context), tuple(continuation)) for _, context, continuation in requests]
        scores = self.scorer.score(questions)
        for (texts, _, _), score in zip(requests, scores):
            self.cache_hook.add_partial("loglikelihood", texts, score)
        return scores

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        windows = [self._windows(request.args[0]) for request in requests]
        scores = iter(self.scorer.score([question for questions in windows for question in questions]))
        totals = [sum(next(scores)[0] for _ in questions) for questions in windows]
        for request, total in zip(requests, totals):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def _windows(self, text: str) -> list[Question]:
        ids, start = self.ids.encode(text), self.prefix_token_id
        rolling = get_rolling_token_windows(ids, prefix_token=start, max_seq_len=self.max_length, context_len=1)
        return [Question(tuple(context), tuple(new)) for context, new in map(make_disjoint_window, rolling)]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        asked: list[tuple[Any, ...]] = [request.args for request in requests]
        groups: dict[str, list[int]] = {}
        for index, (_, given) in enumerate(asked):
            groups.setdefault(repr(given), []).append(index)
        texts = [""] * len(requests)
        for indices in groups.values():
            options: dict[str, Any] = dict(normalize_gen_kwargs(asked[indices[0]][1], MAX_GENERATED))
            longest = self.max_length - options["max_gen_toks"]
            if longest < 1:
                raise UserError(
                    f"max_gen_toks = {options['max_gen_toks']}: must be below the {self.max_length} tokens that the "
                    "model reads (model.max_length); give less with --gen-kwargs max_gen_toks=N"
                )
            found = continue_texts(
                self.scorer.model,
                self.ids,
                [self._prompt(asked[index][0])[-longest:] for index in indices],
                options["max_gen_toks"],
                stops=[stop for stop in options["until"] if stop],
                ends=self.ends,
                sampling=_sampling(options),
                batch_tokens=self.scorer.batch_tokens,
            )
            for index, text in zip(indices, found):
                texts[index] = text
                self.cache_hook.add_partial("generate_until", asked[index], text)
        return texts

    def _prompt(self, text: str) -> list[int]:
        return self.tok_encode(text) or [self.prefix_token_id]

    def all_gather(self, tensor: Tensor) -> Tensor:
        """What every rank gives, one after the other."""
        parts = [torch.empty_like(tensor) for _ in range(self.world_size)]
        dist.all_gather(parts, tensor)
        return torch.stack(parts) if tensor.dim() == 0 else torch.cat(parts)

    def gather_object(self, obj: Any, dst: int = 0) -> list[Any] | None:
        """What every rank gives, on rank `dst`."""
        parts = [None] * self.world_size if self.rank == dst else None
        dist.gather_object(obj, parts, dst=dst)
        return parts

    def barrier(self) -> None:
        dist.barrier()


def _sampling(options: dict[str, Any]) -> Sampling:
    temperature = float(options.get("temperature", 0.0))
    if not options["do_sample"] or not temperature:
        return GREEDY
    return Sampling(temperature=temperature, top_k=int(options.get("top_k", 0)), top_p=float(options.get("top_p", 1.0)))
