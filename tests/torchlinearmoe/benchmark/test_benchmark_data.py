"""`benchmark data`: every packing and source is read, at the pace that is asked for."""

import pytest

from torchlinearmoe.benchmark import __main__ as command
from torchlinearmoe.benchmark import data


@pytest.fixture
def rows(monkeypatch):
    found: list[dict] = []
    monkeypatch.setattr(data, "show", lambda title, rows: found.extend(rows))
    return found


def test_every_packing_and_source_is_measured(rows):
    small = ["--tokens", "200000", "--seconds", "0.1", "--length", "512", "--pace", "4e6"]
    assert command.main(["data", *small]) == 0
    kinds = ["tokens", "tokens, 4 mixed", "Megatron", "Megatron, 4 mixed"]
    assert sorted((row["source"], row["case"]) for row in rows) == sorted((k, p) for k in kinds for p in data.PACKINGS)
    for row in rows:
        assert row["cores a node"] == pytest.approx(4e6 / row["tokens/s a core"])
        assert row["keeps up"] == ("yes" if row["tokens/s a core"] > 4e6 / 8 else "no")
        assert 0 < row["share of a step waiting"] < 1 and row["data/padding"] < 0.05


def test_nobody_keeps_up_with_any_pace(rows):
    assert command.main(["data", "--tokens", "100000", "--seconds", "0.1", "--pace", "1e13"]) == 0
    assert all(row["keeps up"] == "no" and row["share of a step waiting"] > 0 for row in rows)


def test_the_data_of_a_recipe(rows, capsys):
    assert command.main(["data", "--recipe", "recipes/quickstart.toml", "--seconds", "0.1"]) == 0
    assert [row["case"] for row in rows] == ["concatenate", "best_fit"]
    cut = [row["data/cut_documents"] for row in rows]
    assert all(row["source"] == "recipes/quickstart.toml" for row in rows) and len(cut) == 2
    for wrong, told in (
        (["--data.workers=1"], "--data.workers=1: drawn data have no recipe"),
        (["--ranks=0"], "at least 1"),
    ):
        with pytest.raises(SystemExit):
            command.main(["data", *wrong])
        assert told in capsys.readouterr().err
