"""What a run says in words."""

from dataclasses import replace
from pathlib import Path

import torch

from torchlinearmoe.data.baselines import Baselines
from torchlinearmoe.data.splits import open_splits
from torchlinearmoe.data.tokenizer import load_tokenizer
from torchlinearmoe.metrics import report
from torchlinearmoe.recipe.parse import resolve


def test_a_run_says_what_it_is_on_what_and_where(tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.mkdir()
    (text / "a.txt").write_text("In the beginning was the word. " * 40)
    (text / "b.bin").write_bytes(b"\0")
    recipe = resolve(
        {
            "training": {
                "sequence_length": 8,
                "tokens_per_step": 16,
                "steps": 1000,
                "output_dir": str(tmp_path / "a run"),
            },
            "metrics": {"tensorboard": False},
        }
    )
    tokenizer = load_tokenizer()
    splits = open_splits([text], tokenizer=tokenizer, validation_fraction=0, cache=tmp_path / "cache")
    lines = list(
        report.beginning(
            recipe,
            splits,
            tokenizer,
            parameters=1_500_000,
            flops_per_token=2e9,
            devices="4 x cpu",
            dtype=torch.bfloat16,
            resumed=[None, "gone on"],
            weights=["initial"],
            figures={"data/epochs/a": 2.0, "data/epochs/b": 0.5, "data/share/a": 3.0},
        )
    )
    epochs = 2000 / len(splits.train.samples(8))
    assert lines[0] == "1.5M parameters, 2.000 GFLOP a token, 16 tokens a step, 1000 steps on 4 x cpu in bfloat16"
    assert lines[1] == (
        f"1 documents of {len(splits.train)} tokens, {epochs:.2g} epochs; tokenizer bpe-1024.tiktoken; in "
        f"{tmp_path / 'a run'}"
    )
    assert lines[2].startswith(f"the data are read {epochs:.3g} times: beyond 4 epochs")
    assert lines[3] == "data.sources: a is read 2 times by the last step"
    assert lines[4] == "gone on" and "initial" in lines[5:]
    assert lines[-1].startswith("data.paths: 1 files of no known kind are not read: 1 ")

    last = tmp_path / "a run" / "checkpoints" / "step-9"
    checkpoint, curves, command = report.where_it_is(recipe, splits, tokenizer, last)
    assert (checkpoint, curves) == (f"checkpoint: {last}", f"curves: {tmp_path / 'a run' / 'metrics.jsonl'}")
    assert command.startswith(f"next: python -m torchlinearmoe.generate '{last}' --prompt 'In the")
    watched = replace(recipe, metrics=replace(recipe.metrics, tensorboard=True))
    assert (
        f"tensorboard --logdir {tmp_path / 'a run' / 'tensorboard'}"
        in list(report.where_it_is(watched, splits, tokenizer, last))[1]
    )


def test_a_model_is_measured_against_count_models() -> None:
    found = Baselines(uniform=7.0, unigram=5.5, bigram=4.25, tokens=10)
    told = report.count_models(found)
    assert told.endswith("uniform 7.0000, unigram 5.5000, interpolated bigram 4.2500 nats a token")
    assert report.below(found, 4.0) == "  below uniform by 3.0000, unigram by 1.5000, interpolated bigram by 0.2500"
