"""The command that asks a model tasks, as a user types it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from torchlinearmoe import build_model
from torchlinearmoe.checkpoint import CheckpointManager
from torchlinearmoe.checkpoint.huggingface.exporting import export_checkpoint
from torchlinearmoe.checkpoint.model import model_files
from torchlinearmoe.data.tokenizer import load_tokenizer
from torchlinearmoe.evaluate import main
from torchlinearmoe.recipe import resolve


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder with one checkpoint."""
    folder = tmp_path_factory.mktemp("run")
    table = {"mixer": "hgrn2", "layout": "LN", "num_layers": 2, "init_std": 0.2}
    recipe = resolve({"model": table, "training": {"steps": 1}})
    manager = CheckpointManager(folder / "checkpoints", keep=1)
    extra = {"tokens": 0, "skipped_steps": 0}
    model = build_model(recipe.model, 2)
    manager.save(1, model, None, extra, model_files(recipe, load_tokenizer()), blocking=True)
    return folder


def fails(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as done:
        main(arguments)
    assert done.value.code == 1
    return capsys.readouterr().err.splitlines()[-1]


def test_without_lm_eval_the_extra_is_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    told = fails(["anything", "--tasks", "local"], capsys)
    assert told.startswith("error: evaluate needs lm-eval") and "torchlinearmoe[eval]" in told


def results(file: Path) -> Any:
    return json.loads(file.read_text())


@pytest.mark.slow
def test_a_run_and_its_export_have_the_same_results(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("lm_eval", reason="the extra eval is not installed")
    export_checkpoint(run / "checkpoints" / "step-1", tmp_path / "exported")
    found = []
    for number, source in enumerate((run, tmp_path / "exported")):
        file = tmp_path / "out" / f"{number}.json"
        assert main([str(source), "--tasks", "local", "--limit", "3", "--output", str(file)]) == 0
        out = capsys.readouterr().out
        assert "|local_next_verse|" in out and out.splitlines()[-1] == str(file)
        found.append(results(file)["results"])
    names = ["local_text", "local_next_verse", "local_last_word"]
    assert sorted(found[0]) == sorted(names) and "samples" not in results(tmp_path / "out" / "0.json")
    for name in names:
        assert found[0][name] == pytest.approx(found[1][name])
    text = found[0]["local_text"]
    # Of the same log-likelihood: bits a byte are the logarithm of the perplexity a byte; a token has several bytes.
    assert 2 ** text["bits_per_byte,none"] == pytest.approx(text["byte_perplexity,none"])
    assert text["token_perplexity,none"] > text["byte_perplexity,none"] > 1


def test_mistakes_are_one_line(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("lm_eval", reason="the extra eval is not installed")
    assert fails([str(run), "--tasks", "local", "--samples"], capsys).startswith("error: --samples: they go into")
    assert fails([str(run), "--tasks", ","], capsys).startswith("error: --tasks: names none")
    told = fails([str(run), "--tasks", "local", "--include-path", str(run / "none")], capsys)
    assert told.endswith("none: no such folder")
    assert "not a checkpoint" in fails([str(run / "none"), "--tasks", "local"], capsys)


@pytest.mark.slow  # lm-eval reads the index of all its tasks
def test_a_task_of_a_file_is_asked_and_a_wrong_name_told(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("lm_eval", reason="the extra eval is not installed")
    (tmp_path / "questions.jsonl").write_text('{"q": "In the beginning was the", "a": "Word"}\n' * 2)
    task = {
        "task": "mine",
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {"test": str(tmp_path / "questions.jsonl")},
            "cache_dir": str(tmp_path / "cache"),
        },
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{q}}",
        "doc_to_target": "{{a}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 4},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    file = tmp_path / "mine.yaml"
    file.write_text(json.dumps(task))  # JSON is YAML
    output = tmp_path / "out.json"
    assert main([str(run), "--tasks", str(file), "--samples", "--output", str(output)]) == 0
    assert results(output)["results"]["mine"]["exact_match,none"] == 0.0
    first, second = results(output)["samples"]["mine"]
    assert first["resps"] == second["resps"] and first["resps"][0][0]
    told = fails([str(run), "--tasks", "local_next_vers"], capsys)
    assert told == (
        "error: --tasks local_next_vers: no such task, and no file of one; did you mean 'local_next_verse'?"
    )
