"""What a user sees when something cannot be done: one line that names the field or file and the way out."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable


class UserError(ValueError):
    """Something a user can mend. The message is one line that names the field or file and the way out; the commands
    print it without a traceback."""

    def __init__(self, message: str) -> None:
        # What a user wrote may hold line breaks and comes back in the message.
        super().__init__(" ".join(message.splitlines()))


class RecipeError(UserError):
    """A recipe that cannot be run. The message is one line and names the field, the value and the legal ones."""


def nearest(word: str, legal: Iterable[str]) -> str:
    """The closest legal word as `did you mean 'x'?`, else the list of legal words."""
    words = sorted(legal)
    close = difflib.get_close_matches(str(word), words, n=1, cutoff=0.6)
    if close:
        return f"did you mean '{close[0]}'?"
    return "legal: " + ", ".join(words)


def divisors(*numbers: int) -> str:
    """What divides all of `numbers`, as a list to read: the legal degrees of an axis."""
    common = math.gcd(*numbers)
    return ", ".join(str(n) for n in range(1, common + 1) if common % n == 0)
