"""Finetuning by the commands: a model learns its instructions by heart and answers them in its template."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from torchlinearmoe.checkpoint.model import checkpoint_tokenizer
from torchlinearmoe.generate import main as generate
from torchlinearmoe.recipe import load_recipe
from torchlinearmoe.train import main as train

RECIPE = Path(__file__).parents[2] / "recipes" / "finetune.toml"
INSTRUCTIONS = Path(__file__).parents[2] / "torchlinearmoe" / "data" / "instructions" / "instructions.jsonl"
SMALL = (
    *("model.hidden_size=64", "model.num_layers=2", "model.layout=LN", "model.num_heads=2", "moe.num_experts=2"),
    *("moe.hidden_size=64", "training.device=cpu", "metrics.tensorboard=false"),
)


def run(output: Path, *overrides: str) -> Path:
    """Train the finetuning recipe, small; returns the last checkpoint."""
    arguments = [f"--{item}" for item in (*SMALL, *overrides, f"training.output_dir={output}")]
    assert train([str(RECIPE), *arguments]) == 0
    (checkpoint,) = (output / "checkpoints").iterdir()
    return checkpoint


def answer(checkpoint: Path, prompt: str, capsys: pytest.CaptureFixture[str], *options: str) -> str:
    capsys.readouterr()
    assert generate([str(checkpoint), "--chat", "--prompt", prompt, "--max-tokens", "40", *options]) == 0
    return capsys.readouterr().out.removesuffix("\n")


def test_a_model_answers_what_it_was_trained_on_and_goes_on_from_its_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    entries = [json.loads(line) for line in INSTRUCTIONS.read_text().splitlines()[:12]]
    data = tmp_path / "some.jsonl"
    data.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    settings = (f'data.paths=["{data}"]', "data.validation_fraction=0.26", "training.micro_batch_size=1")
    first = run(tmp_path / "first", *settings, "training.steps=150")
    assert "11 conversations in 2 sequences of 256 tokens" in capsys.readouterr().out
    answers = {entry["prompt"]: answer(first, entry["prompt"], capsys) for entry in entries}
    assert sum(entry["response"] == answers[entry["prompt"]] for entry in entries) >= 11  # one is held out

    second = run(tmp_path / "second", *settings, "training.steps=2", "optimizer.lr=0.0", "optimizer.min_lr=0.0",
                 f"checkpoint.init_from={first}")  # fmt: skip
    assert answer(second, entries[0]["prompt"], capsys) == answers[entries[0]["prompt"]]
    assert checkpoint_tokenizer(second).fingerprint == checkpoint_tokenizer(first).fingerprint
    assert load_recipe(second / "recipe.toml").data.tokenizer == str(first / "tokenizer" / "bpe-1024.tiktoken")
    lines = [json.loads(line) for line in (tmp_path / "second" / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["loss"] < 0.1

    with pytest.raises(SystemExit):
        generate([str(second), "--system", "Be brief.", "--prompt", "x"])
    with pytest.raises(SystemExit):
        generate([str(second), "--chat"])
    errors = capsys.readouterr().err.splitlines()
    assert errors[0].startswith("error: --system: ") and errors[1].startswith("error: --chat: ")


def test_weights_without_a_tokenizer_need_one_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "weights").mkdir()
    with pytest.raises(SystemExit):
        train([str(RECIPE), f"--checkpoint.init_from={tmp_path / 'weights'}"])
    assert "data.tokenizer = '': checkpoint.init_from" in capsys.readouterr().err


def test_messages_have_no_count_models(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        train([str(RECIPE), "--metrics.baselines=true"])
    assert "metrics.baselines = true: there are no count models of messages" in capsys.readouterr().err
