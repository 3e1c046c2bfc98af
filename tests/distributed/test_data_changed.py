"""A run that goes on knows whether it reads what it read before."""

import json
import re
from pathlib import Path

import pytest
from harness import RankError, RankPool
from seals import reseal
from tiny_run import Settings, build, run, settings, write_corpus

STEPS = 8
SHORT: Settings = {
    "model": {"layout": "L", "num_layers": 1},
    "training": {"steps": STEPS, "tokens_per_step": 4 * 48},
    "checkpoint": {"interval": 2, "keep": 9},
}


def of_steps(steps: int, **data: object) -> Settings:
    return {"training": {"steps": steps}, "data": data}


def note(rank: int, tables: Settings) -> str | None:
    """What a run that goes on says of its data."""
    return build(tables).data_note


def test_moved_data_go_on_and_changed_data_are_refused_or_begin_afresh(ranks: RankPool, tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path, documents=40)
    whole = ranks(1, run, settings(corpus, tmp_path / "whole", SHORT), False)[0]

    def start(name: str, steps: int, ranks_: int = 1, **data: object) -> dict[int, list[str]]:
        """The rows of every step, of all ranks, in a folder of this name."""
        tables = settings(corpus, tmp_path / name, SHORT, of_steps(steps, **data))
        results = ranks(ranks_, run, tables, False)
        return {step: sorted(row for r in results for row in r.rows[step]) for step in results[0].rows}

    usual = {step: sorted(rows) for step, rows in whole.rows.items()}
    before = start("run", 4)
    assert before == {step: usual[step] for step in range(1, 5)}

    moved = tmp_path / "elsewhere"
    moved.mkdir()
    places = {"paths": [str(corpus.rename(moved / "other.jsonl"))], "cache": str(moved / "cache")}
    assert start("run", 6, **places) == {step: usual[step] for step in (5, 6)}

    with (moved / "other.jsonl").open("a") as stream:
        stream.write(json.dumps({"text": "and some more words " * 30}) + "\n")
    with pytest.raises(RankError, match=re.escape("data.on_change = 'refuse': the checkpoint was trained on 40 ")):
        start("run", STEPS, 2, **places)
    allowed = settings(corpus, tmp_path / "run", SHORT, of_steps(12, **places, on_change="restart_epoch"))
    said = ranks(1, note, allowed)[0]
    assert said is not None
    assert said.startswith("data.on_change = 'restart_epoch': the checkpoint was trained on 40 documents")
    fresh = start("run", 12, 2, **places, on_change="restart_epoch")
    assert sorted(fresh) == list(range(7, 13))
    assert not {row for rows in fresh.values() for row in rows[:3]} <= {r for rows in usual.values() for r in rows}

    # The checkpoints after the change go on in the new order, on any ranks, with nothing more to allow.
    for later in (tmp_path / "run/checkpoints").glob("step-*"):
        if int(later.name.removeprefix("step-")) > 8:
            for file in sorted(later.rglob("*"), reverse=True):
                file.unlink() if file.is_file() else file.rmdir()
            later.rmdir()
    assert start("run", 12, **places) == {step: fresh[step] for step in range(9, 13)}


def test_a_checkpoint_of_an_earlier_version_goes_on_with_a_line(ranks: RankPool, tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path, documents=40)
    ranks(1, run, settings(corpus, tmp_path / "run", SHORT, of_steps(2)), False)
    file = tmp_path / "run/checkpoints/step-2/state.json"
    state = json.loads(file.read_text())
    state["extra"]["data"] = {"next_step": 2}
    file.write_text(json.dumps(state))
    reseal(file.parent)
    said = ranks(1, note, settings(corpus, tmp_path / "run", SHORT))[0]
    assert said is not None and "whether its data have changed is not known" in said
    assert min(ranks(1, run, settings(corpus, tmp_path / "run", SHORT), False)[0].rows) == 3
