"""Prompts to tokens: read the prompts with the chunked kernels, then one token a step.

    prompts   [ a b c d ]     prefill, in pieces of a bounded number of logits
              [ e f ]
    step 1    [ g ]  [ h ]    every sequence a token, from a state that linear layers keep at one size
    step 2    [ i ]  None     a sequence that has stopped yields None until all have

Shapes: B sequences, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import torch
from torch import Tensor, nn

from torchlinearmoe.errors import UserError
from torchlinearmoe.generation.sampling import GREEDY, Sampling, choose
from torchlinearmoe.mixers.base import Carry, Mixer
from torchlinearmoe.models.decoder import Decoder, DecodeState
from torchlinearmoe.module import traits

PREFILL_LOGITS = 2**27
"""Logits of one piece of the prompts: prefill gives them for every position, of which only the last is used."""


class Generation(Iterator[list[int | None]]):
    """The running generation of B sequences; each item is the next token of every sequence, None where it has stopped.

    The prompts are read when the first item is asked for. `state` is where the sequences stand.
    """

    def __init__(
        self,
        model: Decoder,
        prompts: Sequence[Sequence[int]],
        max_tokens: int,
        sampling: Sampling,
        stop: Collection[int],
        vocab_size: int | None,
    ) -> None:
        self._check(model, prompts, max_tokens)
        self.model = model.eval()
        self.sampling = sampling
        self.stop = stop
        self.vocab_size = vocab_size or model.recipe.vocab_size
        self.left = max_tokens
        self.prompts = [list(prompt) for prompt in prompts]
        self.running = [True] * len(prompts)
        longest = max(len(prompt) for prompt in prompts)
        device = model.embed.weight.device
        self.state: DecodeState = model.init_state(len(prompts), max_length=longest + max_tokens)
        self._generator = torch.Generator(device).manual_seed(sampling.seed) if sampling.temperature else None
        self._tokens: Tensor | None = None

    @staticmethod
    def _check(model: Decoder, prompts: Sequence[Sequence[int]], max_tokens: int) -> None:
        if not prompts or not all(len(prompt) for prompt in prompts):
            raise UserError("prompts: every prompt needs at least one token")
        ids = range(model.recipe.vocab_size)
        if wrong := next((token for prompt in prompts for token in prompt if token not in ids), None):
            raise UserError(f"prompts: {wrong} is no id; they go from 0 to {ids[-1]}")
        if max_tokens < 1:
            raise UserError(f"max_tokens = {max_tokens}: must be at least 1")
        longest, room = max(len(prompt) for prompt in prompts), model.recipe.max_length
        if longest + max_tokens > room and grows(model):
            raise UserError(
                f"max_tokens = {max_tokens}: with a prompt of {longest} tokens the softmax layers need room for "
                f"{longest + max_tokens}, but model.max_length = {room}; at most {max(room - longest, 0)} fit"
            )

    @torch.inference_mode()
    def __next__(self) -> list[int | None]:
        if self.left == 0 or not any(self.running):
            raise StopIteration
        if self._tokens is None:
            logits_BV, self.state = read_prompts(self.model, self.prompts, self.state)
        else:
            logits_BV, self.state = self.model.step(self._tokens, self.state)
        tokens = choose(logits_BV[:, : self.vocab_size], self.sampling, self._generator)
        self._tokens = tokens
        self.left -= 1
        chosen = tokens.tolist()
        self.running = [go and token not in self.stop for go, token in zip(self.running, chosen)]
        if not any(self.running):
            raise StopIteration
        return [token if go else None for go, token in zip(self.running, chosen)]


def read_prompts(model: Decoder, prompts: Sequence[Sequence[int]], state: DecodeState) -> tuple[Tensor, DecodeState]:
    """Read B prompts of unequal lengths from `state` on; logits after the last token of each, [B, V], and the state.

    No more than `PREFILL_LOGITS` logits are there at once.
    """
    device = model.embed.weight.device
    batch, longest = len(prompts), max(len(prompt) for prompt in prompts)
    width = max(1, PREFILL_LOGITS // (batch * model.recipe.vocab_size))
    last_BV: Tensor | None = None
    for start in range(0, longest, width):
        pieces = [list(prompt[start : start + width]) for prompt in prompts]
        lengths = [len(piece) for piece in pieces]
        padded = [piece + [0] * (max(lengths) - len(piece)) for piece in pieces]
        tokens = torch.tensor(padded, dtype=torch.int64, device=device)
        logits_BTV, state = model.prefill(tokens, state, lengths)
        if last_BV is None:
            last_BV = logits_BTV.new_zeros(batch, logits_BTV.shape[-1])
        for row, length in enumerate(lengths):
            if length:
                last_BV[row] = logits_BTV[row, length - 1]
    assert last_BV is not None
    return last_BV, state


def generate(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    *,
    sampling: Sampling = GREEDY,
    stop: Collection[int] = (),
    vocab_size: int | None = None,
) -> Generation:
    """Go on from `prompts`, lists of ids of unequal lengths, together; iterate over the result for the tokens.

    Each item is a list of B entries: the next token of every sequence, None once it has stopped. A sequence stops at
    any of `stop` (not part of the output) or after `max_tokens`. Ids from `vocab_size` on, the padding of a vocabulary,
    are never chosen. The model is put into eval mode.

    Raises UserError for an empty prompt, for `max_tokens` below 1, and where softmax layers have no room for a prompt
    and `max_tokens` (model.max_length); linear layers have no bound.
    """
    return Generation(model, prompts, max_tokens, sampling, stop, vocab_size)


def grows(model: Decoder) -> bool:
    """Whether any layer keeps an entry for every token."""
    mixers = [module for module in model.modules() if isinstance(module, Mixer)]
    return any(spec.carry is Carry.APPEND for mixer in mixers for spec in mixer.state_spec().values())


def state_bytes(state: DecodeState) -> int:
    """Memory of all layers' states, in bytes; softmax layers count the room they have."""
    return sum(value.numel() * value.element_size() for layer in state.layers for value in layer.values())


def cast_weights(module: nn.Module, dtype: torch.dtype) -> None:
    """Cast the parameters of `module` to `dtype` in place, all but those inside modules marked `keep_fp32`.

    Those are the decays, routers and lower bounds that training computes in float32 as well. Buffers keep their types.
    """
    if traits(module).keep_fp32:
        return
    for parameter in module.parameters(recurse=False):
        parameter.data = parameter.data.to(dtype)
    for child in module.children():
        cast_weights(child, dtype)
