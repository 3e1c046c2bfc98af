"""The command: `python -m torchlinearmoe.generate CHECKPOINT --prompt TEXT`."""

from __future__ import annotations

import argparse
import codecs
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from torchlinearmoe.commands import Failure, add_device_options, device_and_dtype, failures_on_one_line

if TYPE_CHECKING:
    from torchlinearmoe.data.tokenizer import Tokenizer
    from torchlinearmoe.generation import Generation


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the continuation of one or several prompts; returns the exit status."""
    parser = _parser()
    options = parser.parse_args(arguments)
    with failures_on_one_line():
        try:
            return _generate(options)
        except KeyboardInterrupt:
            print(flush=True)
            return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m torchlinearmoe.generate",
        description="Continue a text with the model of a training checkpoint. Linear layers decode from a state of "
        "constant size; softmax layers keep the past, up to model.max_length.",
    )
    add = parser.add_argument
    add("checkpoint", help="folder of a checkpoint, or of a run for its newest one, e.g. runs/quickstart")
    add(
        "--prompt",
        action="append",
        metavar="TEXT",
        help="text to continue, '-' for standard input; several are decoded together; left out: a new document",
    )
    add("--chat", action="store_true", help="each prompt is a message to a finetuned model, written in its template")
    add("--system", default="", metavar="TEXT", help="with --chat, the system message before it")
    add("--max-tokens", type=int, default=200, metavar="N", help="longest continuation, in tokens (default 200)")
    add("--stop", action="append", default=[], metavar="TEXT", help="end before this text; may be given several times")
    add(
        "--temperature",
        type=float,
        default=0.0,
        metavar="X",
        help="draw from softmax(logits / X); default 0: greedy",
    )
    add("--greedy", action="store_true", help="take the most probable token, whatever --temperature says")
    add("--top-k", type=int, default=0, metavar="K", help="draw among the K most probable tokens (default 0: all)")
    add(
        "--top-p",
        type=float,
        default=1.0,
        metavar="P",
        help="draw among the tokens that make up P (default 1)",
    )
    add("--seed", type=int, default=0, help="seed of the draws (default 0)")
    add_device_options(parser)
    add("--hide-prompt", action="store_true", help="write the continuation without the prompt before it")
    return parser


def _generate(options: argparse.Namespace) -> int:
    import torch

    from torchlinearmoe.checkpoint.model import checkpoint_tokenizer, find_checkpoint, load_model
    from torchlinearmoe.generation import Sampling, cast_weights, generate

    temperature = 0.0 if options.greedy else options.temperature
    sampling = Sampling(temperature=temperature, top_k=options.top_k, top_p=options.top_p, seed=options.seed)
    texts = _prompts(options.prompt)
    if "" in options.stop:
        raise Failure("--stop: the text is empty; leave it out")
    device, dtype = device_and_dtype(options)
    options.checkpoint = find_checkpoint(options.checkpoint)
    with torch.device(device):
        model = load_model(options.checkpoint)
    cast_weights(model, dtype)
    tokenizer = checkpoint_tokenizer(options.checkpoint)
    prompts, stop = _encode(options, tokenizer, texts)
    generation = generate(
        model,
        prompts,
        options.max_tokens,
        sampling=sampling,
        stop=stop,
        vocab_size=tokenizer.vocab_size,
    )
    shown = ["" if options.hide_prompt or options.chat else text for text in texts]
    try:
        _write(generation, tokenizer, shown, options.stop)
    except BrokenPipeError:
        # The reader has gone; nothing can be written any more, not even when Python closes the stream.
        sys.stdout = None
    return 0


def _encode(options: argparse.Namespace, tokenizer: Tokenizer, texts: list[str]) -> tuple[list[list[int]], set[int]]:
    """The ids of every prompt, and those that end a continuation."""
    from torchlinearmoe.checkpoint.model import checkpoint_template, ends_of_text
    from torchlinearmoe.data.messages import Message

    ends = ends_of_text(options.checkpoint, tokenizer)
    if not options.chat:
        if options.system:
            raise Failure("--system: only a conversation has a system message; add --chat")
        return [[tokenizer.start, *tokenizer.encode(text)] for text in texts], ends
    if options.prompt is None:
        raise Failure("--chat: give the message with --prompt")
    template = checkpoint_template(options.checkpoint)
    before = [Message("system", options.system)] if options.system else []
    prompts = [template.prompt([*before, Message("user", text)], tokenizer) for text in texts]
    return prompts, ends | {template.end_id(tokenizer)}


def _prompts(given: list[str] | None) -> list[str]:
    if given is None:
        return [""]
    texts = [sys.stdin.read().removesuffix("\n") if text == "-" else text for text in given]
    if not all(texts):
        raise Failure("--prompt: the text is empty; leave --prompt out to begin a new document")
    return texts


class _Text:
    """The text of one sequence as its tokens come, up to a stop string; a token may end inside a character."""

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str]) -> None:
        from torchlinearmoe.generation.stops import StopText

        self._tokenizer, self._until = tokenizer, StopText(stops)
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def add(self, token: int) -> str:
        return self._until.add(self._decoder.decode(self._tokenizer.decode_bytes([token])))

    @property
    def done(self) -> bool:
        """A stop string has come."""
        return self._until.done

    def end(self) -> str:
        return self._until.add(self._decoder.decode(b"", final=True)) + self._until.end()


def _write(generation: Generation, tokenizer: Tokenizer, shown: list[str], stops: Sequence[str] = ()) -> None:
    """One sequence as it comes, several one after another when all are done; a line of figures to stderr."""
    from torchlinearmoe.generation import state_bytes
    from torchlinearmoe.generation.decode import grows

    streaming = len(shown) == 1
    texts = [_Text(tokenizer, stops) for _ in shown]
    written = list(shown)
    tokens, first, begin = 0, None, time.perf_counter()
    if streaming:
        print(shown[0], end="", flush=True)
    for chosen in generation:
        first = first or time.perf_counter()
        for row, token in enumerate(chosen):
            if token is None:
                continue
            tokens += 1
            piece = texts[row].add(token)
            if texts[row].done:
                generation.running[row] = False
            written[row] += piece
            if streaming and piece:
                print(piece, end="", flush=True)
    end = time.perf_counter()
    tails = [text.end() for text in texts]
    if streaming:
        print(tails[0], flush=True)
    else:
        print("\n\n".join(text + tail for text, tail in zip(written, tails)), flush=True)

    prompt_tokens = sum(len(prompt) for prompt in generation.prompts)
    # The first token of every sequence comes out of reading the prompts.
    reading = (first or end) - begin
    rate = max(tokens - len(shown), 0) / max(end - begin - reading, 1e-9)
    size = state_bytes(generation.state)
    kind = f"room for {generation.state.max_length} tokens" if grows(generation.model) else "the same at any length"
    print(
        f"{prompt_tokens} prompt tokens in {reading:.2f} s, {tokens} tokens at {rate:.1f} tokens/s, "
        f"state {size} bytes ({kind})",
        file=sys.stderr,
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(main())
