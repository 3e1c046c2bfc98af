"""How the data begin, in a few words: a prompt to try a model with that was trained on them."""

from __future__ import annotations

from itertools import takewhile

from torchlinearmoe.data.chat_template import Template
from torchlinearmoe.data.conversations import Conversations
from torchlinearmoe.data.splits import TokenStream
from torchlinearmoe.data.tokenizer import Tokenizer

TOKENS = 60
"""Looked at, of a text."""
CHARACTERS = 40
"""Of a prompt."""


def opening_of_text(stream: TokenStream, tokenizer: Tokenizer) -> str:
    """The first words of the first document; empty where it has none."""
    ids = stream.read(1, min(len(stream), TOKENS)).tolist()
    markers = (tokenizer.start, tokenizer.end_of_text)
    return _first_words(tokenizer.decode(takewhile(lambda token: token not in markers, ids)))


def opening_of_messages(stream: Conversations, tokenizer: Tokenizer, template: Template) -> str:
    """The first words of the first message of a user; empty where there is none."""
    before, after = template.around_user(tokenizer)
    if not before and not after:
        return ""
    ids = stream.ids(0)
    text = tokenizer.decode(ids[1:] if ids[0] == tokenizer.start else ids)
    content = text.partition(before)[2] if before else text
    return _first_words(content.partition(after)[0] if after else content)


def _first_words(text: str) -> str:
    """At most CHARACTERS of a text in one line, whole words where they fit."""
    words = " ".join(text.replace("\ufffd", "").split())
    if len(words) <= CHARACTERS:
        return words
    return words[: CHARACTERS + 1].rpartition(" ")[0] or words[:CHARACTERS]
