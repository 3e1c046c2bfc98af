"""A text ends before a stop string, and nothing is shown that may be part of one."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from torchlinearmoe import build_model
from torchlinearmoe.checkpoint import CheckpointManager
from torchlinearmoe.checkpoint.model import model_files
from torchlinearmoe.data.tokenizer import load_tokenizer
from torchlinearmoe.generate import main
from torchlinearmoe.generation.stops import StopText
from torchlinearmoe.recipe import resolve


def test_pieces_add_up_to_what_stands_before_the_first_stop() -> None:
    chance = random.Random(7)
    ended = 0
    for _ in range(3000):
        whole = "".join(chance.choices("ab", k=chance.randint(0, 14)))
        stops = ["".join(chance.choices("ab", k=chance.randint(1, 5))) for _ in range(chance.randint(0, 3))]
        text, shown, rest = StopText(stops), "", whole
        while rest:
            size = chance.randint(1, 3)
            shown, rest = shown + text.add(rest[:size]), rest[size:]
            assert not any(stop in shown for stop in stops)
        shown += text.end()
        places = [whole.index(stop) for stop in stops if stop in whole]
        if not places:
            assert shown == whole and not text.done
            continue
        ended += 1
        # Of stops that end at different places the one that is complete first counts, where pieces come one by one.
        assert text.done and shown == whole[: len(shown)] and any(whole[len(shown) :].startswith(s) for s in stops)
    assert ended > 500


def test_the_command_ends_before_the_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    table = {"mixer": "gla", "layout": "L", "num_layers": 2, "init_std": 0.3}
    recipe = resolve({"model": table, "training": {"steps": 1}})
    files = model_files(recipe, load_tokenizer())
    extra = {"tokens": 0, "skipped_steps": 0}
    CheckpointManager(tmp_path, keep=1).save(1, build_model(recipe.model, 2), None, extra, files, blocking=True)
    arguments = [str(tmp_path / "step-1"), "--prompt", "And", "--max-tokens", "30", "--hide-prompt"]
    assert main(arguments) == 0
    whole = capsys.readouterr().out.removesuffix("\n")
    letters = [letter for letter in whole[3:-3] if letter.isalpha() and letter.isascii()]
    stop = whole[whole.index(letters[len(letters) // 2]) :][:2]
    assert main([*arguments, "--stop", "not there", "--stop", stop]) == 0
    printed = capsys.readouterr()
    assert printed.out == whole[: whole.index(stop)] + "\n" and len(printed.out) < len(whole)
    assert main([*arguments, "--prompt", "And", "--stop", stop]) == 0  # several together
    assert capsys.readouterr().out == "\n\n".join([whole[: whole.index(stop)]] * 2) + "\n"
    with pytest.raises(SystemExit):
        main([*arguments, "--stop", ""])
    assert capsys.readouterr().err.startswith("error: --stop: the text is empty")
