"""The metrics file survives kills and resumes."""

import json

import pytest

from torchlinearmoe.metrics import Record, truncate_after


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_line_is_on_disk_as_soon_as_it_is_written(tmp_path):
    path = tmp_path / "run" / "metrics.jsonl"
    record = Record(path)
    for step in range(3):
        record.write({"step": step, "loss": 1.5 * step})
        assert lines(path)[-1] == {"step": step, "loss": 1.5 * step}
    record.close()
    record.close()
    reopened = Record(path)
    reopened.write({"step": 3})
    assert [line["step"] for line in lines(path)] == [0, 1, 2, 3]


def test_values_that_are_not_finite_become_null(tmp_path):
    record = Record(tmp_path / "metrics.jsonl")
    record.write(
        {"step": 1, "loss": float("nan"), "grad_norm": float("-inf"), "mfu": None, "loads": [1.0, float("inf")]}
    )

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    content = json.loads(record.path.read_text(), parse_constant=refuse)
    assert content == {"step": 1, "loss": None, "grad_norm": None, "mfu": None, "loads": [1.0, None]}


@pytest.mark.parametrize(
    "torn", ['{"step": 5, "lo', '{"step": 2', "\x00\x00", "3", "[]", '{"loss": 1.0}', "nonsense\n"]
)
def test_cut_keeps_lines_up_to_the_step_and_drops_a_torn_one(tmp_path, torn):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": step, "loss": 0.5}) + "\n" for step in (1, 2, 3, 4)) + torn)
    truncate_after(path, 2)
    assert path.read_text() == '{"step": 1, "loss": 0.5}\n{"step": 2, "loss": 0.5}\n'
    assert [entry.name for entry in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_whole_last_line_without_newline_is_kept_and_ended(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}')
    truncate_after(path, 7)
    Record(path).write({"step": 3})
    assert [line["step"] for line in lines(path)] == [1, 2, 3]


def test_cut_at_zero_empties_and_without_a_file_does_nothing(tmp_path):
    path = tmp_path / "metrics.jsonl"
    truncate_after(path, 0)
    assert not path.exists()
    path.write_text('{"step": 1}\n')
    truncate_after(path, 0)
    assert path.read_text() == ""
