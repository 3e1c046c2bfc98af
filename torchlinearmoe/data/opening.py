"""How the data begin, in a few words: a prompt to try a model with that was trained on them."""

from __future__ import annotations

from itertools import takewhile

from torchlinearmoe.data.chat_template import END, ChatTemplate
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


def opening_of_messages(stream: Conversations, tokenizer: Tokenizer, template: ChatTemplate) -> str:
    """The first words of the first message of a user; empty where there is none."""
    end = tokenizer.decode([template.end_id(tokenizer)])
    before, after = (part.replace(END, end) for part in template.around["user"])
    start, stop = stream.store.offsets[stream.documents[0] :][:2].tolist()
    text = tokenizer.decode(stream.store.tokens[start + 1 : stop].tolist())
    content = text.partition(before)[2] if before else text
    return _first_words(content.partition(after)[0] if after else content)


def _first_words(text: str) -> str:
    """At most CHARACTERS of a text in one line, whole words where they fit."""
    words = " ".join(text.replace("\ufffd", "").split())
    if len(words) <= CHARACTERS:
        return words
    return words[: CHARACTERS + 1].rpartition(" ")[0] or words[:CHARACTERS]
