"""The table that the matrix of layouts prints, a pytest plugin: tests leave `cell` properties, workers' tests too."""

from collections.abc import Iterator
from typing import Any

import pytest

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


TABLE = Table()


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Called where the table is printed, also for what a worker ran."""
    if report.when == "call":
        properties: list[tuple[str, Any]] = report.user_properties
        for name, cell in properties:
            if name == "cell":
                TABLE.add(*cell)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if TABLE.cells:
        terminalreporter.section("largest relative errors: of losses and first gradients, of last gradients")
        for line in TABLE.lines():
            terminalreporter.line(line)
