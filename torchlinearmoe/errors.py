"""What a user sees when a recipe cannot be run: one line that names the field and the way out."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class RecipeError(ValueError):
    """A recipe that cannot be run. The message is one line and names the field, the value and the legal ones."""


def nearest(word: str, legal: Iterable[str]) -> str:
    """The closest legal word as `did you mean 'x'?`, else the list of legal words."""
    words = sorted(legal)
    close = difflib.get_close_matches(str(word), words, n=1, cutoff=0.6)
    if close:
        return f"did you mean '{close[0]}'?"
    return "legal: " + ", ".join(words)
