"""Questions made from the text that ships, chapters of the New Testament that training with defaults holds out.

    next verse   four verses of a chapter, then: which of four comes next? The others are of other chapters.
    last word    some verses and the next one up to its last word: which word? (As LAMBADA, Paperno et al. 2016.)
    text         whole chapters, for perplexity

The same questions for every model: a document is held out by the hash of its text, as in training.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from typing import Any

from torchlinearmoe.data.sources import find_sources, read_documents
from torchlinearmoe.data.store import document_key

FRACTION = 0.05
"""Held out by hash: what `data.validation_fraction` = 0.05 or more leaves out of training."""
VERSES = 4
"""Of a context."""
SEED = 0


def held_out_chapters() -> list[str]:
    """The texts, in their order."""
    bound = int(FRACTION * 2**64)
    return [text for text in read_documents(find_sources().files) if document_key(text) < bound]


def text_documents() -> list[dict[str, Any]]:
    """`text` of every chapter held out."""
    return [{"text": text} for text in held_out_chapters()]


def next_verse_documents() -> list[dict[str, Any]]:
    """`context`, `choices` and the place of the right one, `answer`."""
    chance = random.Random(SEED)
    chapters = [list(_verses(text)) for text in held_out_chapters()]
    documents = []
    for number, verses in enumerate(chapters):
        others = [verse for other, found in enumerate(chapters) if other != number for verse in found]
        for start in range(0, len(verses) - VERSES, VERSES):
            right = verses[start + VERSES]
            answer = chance.randrange(4)
            choices = chance.sample(others, 3)
            choices.insert(answer, right)
            documents.append(
                {"context": "\n".join(verses[start : start + VERSES]), "choices": choices, "answer": answer}
            )
    return documents


def last_word_documents() -> list[dict[str, Any]]:
    """`context`, which ends before a space, and `word`."""
    documents = []
    for text in held_out_chapters():
        verses = list(_verses(text))
        for end in range(VERSES, len(verses), 2):
            before, space, last = verses[end].rpartition(" ")
            word = re.match(r"[A-Za-z]{3,}", last)
            if space and word:
                lines = [*verses[end - VERSES : end], before]
                documents.append({"context": "\n".join(lines), "word": word.group()})
    return documents


def _verses(text: str) -> Iterator[str]:
    """A chapter's lines, less its title."""
    return (line for line in text.splitlines()[1:] if line.strip())
