"""Where a text ends that is shown as it comes: before the first of some strings, none of which is shown in part."""

from __future__ import annotations

from collections.abc import Sequence


class StopText:
    """A text that comes in pieces. What might be the beginning of a stop string is held back until it is not.

    >>> text = StopText(["END"])
    >>> [text.add(piece) for piece in ("one E", "N", "E two EN", "D three")], text.done
    (['one ', '', 'ENE two ', ''], True)
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self.stops = [stop for stop in stops if stop]
        self.done = False
        """A stop string has come; what follows is no part of the text."""
        self._held = ""

    def add(self, piece: str) -> str:
        """What of the text is certain now and was not before."""
        if self.done:
            return ""
        self._held += piece
        places = [self._held.index(stop) for stop in self.stops if stop in self._held]
        if places:
            self.done = True
            return self._held[: min(places)]
        longest = max(
            (n for stop in self.stops for n in range(1, len(stop)) if self._held.endswith(stop[:n])), default=0
        )
        cut = len(self._held) - longest
        certain, self._held = self._held[:cut], self._held[cut:]
        return certain

    def end(self) -> str:
        """The rest, when nothing more comes."""
        return "" if self.done else self._held
