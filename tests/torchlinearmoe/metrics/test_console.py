"""What a person sees, in a log file and on a terminal."""

import doctest
import io

import pytest

from torchlinearmoe.metrics import console
from torchlinearmoe.metrics.console import Console, format_figures, format_number, format_seconds


class Terminal(io.StringIO):
    def isatty(self):
        return True


VALUES = {
    "loss": 3.14159,
    "grad_norm": 0.5,
    "lr": 3e-4,
    "tokens": 1_638_400,
    "tokens_per_second": 101_234.0,
    "mfu": 0.4321,
    "memory_gib": 12.34,
    "skipped_steps": 0,
}
LINE = "loss 3.1416 | 101.2K tok/s | MFU 43.2% | grad norm 0.500 | lr 3.00e-04 | 12.3 GiB | 1.64M tokens | left 1h06m"


def test_without_a_terminal_each_step_is_one_plain_line():
    stream = io.StringIO()
    shown = Console(total_steps=200, stream=stream)
    shown.advance(9)
    shown.figures(10, VALUES, 4000.0)
    shown.message("saved")
    shown.close()
    assert stream.getvalue() == f"step 10/200 | {LINE}\nsaved\n"


def test_on_a_terminal_figures_and_messages_are_shown_around_a_bar():
    stream = Terminal()
    shown = Console(total_steps=200, stream=stream)
    shown.figures(10, {"loss": 3.0, "mfu": None})
    shown.message("[saved] step-10")
    shown.advance(11)
    shown.close()
    shown.close()
    text = stream.getvalue()
    assert "loss 3.0000" in text and "MFU" not in text and "[saved] step-10" in text and "step 11/200" in text


def test_unknown_figures_show_as_a_dash_and_skipped_steps_only_when_there_are_some():
    assert format_figures({"loss": None, "mfu": None, "skipped_steps": 3}, float("nan")) == (
        "loss - | skipped 3 | left -"
    )


@pytest.mark.parametrize("width", [80, 60, 40, 20])
def test_figures_fit_a_terminal_and_the_loss_is_never_missing(width):
    every = VALUES | {"validation_loss": 3.2, "moe/max_load": 1.25, "mom/max_load": 1.5, "skipped_steps": 2}
    text = format_figures(every, 4000.0, width=width)
    assert len(text) <= width and text.startswith("loss 3.1416")
    assert ("skipped 2" in text) == (width >= 40)
    assert ("MFU" in text) == (width == 80) and ("left 1h06m" in text) == (width >= 40)
    assert len(format_figures(every, 4000.0)) > 120
    stream = Terminal()
    shown = Console(total_steps=200, stream=stream)
    shown.figures(10, every, 4000.0)
    shown.close()
    assert shown._bar is not None and format_figures(every, 4000.0, width=shown._bar.width) in stream.getvalue()


@pytest.mark.parametrize(
    "value, text", [(0, "0"), (999, "999"), (1000, "1.0K"), (2_500_000_000, "2.50B"), (7e12, "7.00T"), (None, "-")]
)
def test_counts_change_unit_at_a_thousand(value, text):
    assert format_number(value) == text


@pytest.mark.parametrize(
    "seconds, text", [(0.4, "0s"), (59.7, "1m00s"), (3599.6, "1h00m"), (86_400, "1d00h"), (None, "-")]
)
def test_durations_carry_into_the_next_unit(seconds, text):
    assert format_seconds(seconds) == text


def test_examples_in_the_documentation_hold():
    results = doctest.testmod(console)
    assert results.attempted >= 3 and results.failed == 0
