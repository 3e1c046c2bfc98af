"""The table that the matrix of layouts prints."""

from collections.abc import Iterator

LONGEST = 16
"""Letters of a cell; longer texts go below."""


class Table:
    """What was found, by row and column."""

    def __init__(self) -> None:
        self.cells: dict[tuple[str, str], str] = {}

    def add(self, row: str, column: str, text: str) -> None:
        """Put `text` into a cell."""
        self.cells[row, column] = text

    def lines(self) -> Iterator[str]:
        """A line a row; long texts below, by number."""
        rows, columns = (list(dict.fromkeys(key[i] for key in self.cells)) for i in (0, 1))
        notes: dict[str, int] = {}
        texts = [["", *columns]]
        for row in rows:
            found = (self.cells.get((row, column), "") for column in columns)
            short = (t if len(t) <= LONGEST else f"({notes.setdefault(t, len(notes) + 1)})" for t in found)
            texts.append([row, *short])
        widths = [max(map(len, column)) for column in zip(*texts)]
        for line in texts:
            yield "  ".join(text.ljust(width) for text, width in zip(line, widths)).rstrip()
        for text, number in notes.items():
            yield f"({number}) {text}"
