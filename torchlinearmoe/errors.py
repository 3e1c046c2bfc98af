"""What a user sees when something cannot be done: one line that names the field or file and the way out."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable


class UserError(ValueError):
    """Something a user can mend. The message is one line that names the field or file and the way out; the commands
    print it without a traceback."""

    def __init__(self, message: str) -> None:
        # What stands in a file may hold line breaks and escape sequences, and comes back in the message.
        super().__init__(visible(" ".join(message.splitlines())))


class RecipeError(UserError):
    """A recipe that cannot be run. The message is one line and names the field, the value and the legal ones."""


def visible(text: str) -> str:
    r"""The text with what a terminal would obey (escape sequences, other control and format characters) spelled out.

    >>> visible("a\x1b[2Jb\tc")
    'a\\x1b[2Jb\tc'
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text)


def nearest(word: str, legal: Iterable[str]) -> str:
    """All legal words, and before them the closest, if one is close, as `did you mean 'x'?`."""
    words = sorted(legal)
    close = difflib.get_close_matches(str(word)[:100], words, n=1, cutoff=0.6)
    meant = f"did you mean '{close[0]}'? " if close else ""
    return f"{meant}legal: {', '.join(words)}"


def divisors(*numbers: int) -> str:
    """What divides all of `numbers`, as a list to read: the legal degrees of an axis."""
    common = math.gcd(*numbers)
    small = [n for n in range(1, math.isqrt(common) + 1) if common % n == 0]
    return ", ".join(map(str, sorted({*small, *(common // n for n in small)})))
