"""The sweep as a user types it: it measures, goes on where it stopped, and says in one line what it cannot do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from torchlinearmoe import build_model
from torchlinearmoe.recall import learn as learning
from torchlinearmoe.recall.__main__ import main
from torchlinearmoe.recall.cases import build_cases
from torchlinearmoe.recall.learn import learn
from torchlinearmoe.recall.results import best, read_results
from torchlinearmoe.recall.settings import SETTINGS

CPU = torch.device("cpu")
TINY = ["--setting", "small", "--steps", "3", "--widths", "32", "--data.recall=[{pairs=4,length=16,examples=64}]"]


def fails(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as done:
        main(arguments)
    assert done.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_a_sweep_goes_on_where_it_was_stopped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    arguments = [*TINY, "--mixers", "gla", "retention", "--lrs", "1e-3", "1e-2", "--output", str(tmp_path)]
    assert main([*arguments, "--seconds", "0"]) == 0
    assert "4 models left: the time is over" in capsys.readouterr().out and not read_results(tmp_path)
    asked: list[str] = []

    def dies_at_the_third(case, *rest):
        asked.append(case.label)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return learn(case, *rest)

    monkeypatch.setattr(learning, "learn", dies_at_the_third)
    with pytest.raises(SystemExit) as done:
        main(arguments)
    assert done.value.code == 130 and len(read_results(tmp_path)) == 2
    before = (tmp_path / "recall.json").read_text()

    monkeypatch.setattr(learning, "learn", learn)
    capsys.readouterr()
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert out.startswith("4 models, 2 of them done before") and "[2/4]" not in out and "[3/4] retention" in out
    lines = list(read_results(tmp_path).values())
    assert [line["label"] for line in lines] == ["gla"] * 2 + ["retention"] * 2
    assert json.loads(before)["models"] == lines[:2]
    assert out.splitlines()[-2:] == [str(tmp_path / "recall.json"), str(tmp_path / "recall.png")]
    assert (tmp_path / "recall.png").read_bytes().startswith(b"\x89PNG")
    shown = [row for row in out.splitlines() if row.startswith(("gla ", "retention "))]
    assert len(shown) == 2  # the best learning rate of each
    for line in best(lines):
        assert line["accuracy"] == max(other["accuracy"] for other in lines if other["label"] == line["label"])

    monkeypatch.setattr(learning, "learn", lambda *rest: pytest.fail("nothing is left to train"))
    assert main(arguments) == 0


def test_accuracy_and_state_are_those_of_the_model() -> None:
    """Measured again by the whole logits, after a training of no effect."""
    (case,) = build_cases(SETTINGS["small"], ["hgrn2"], [32], [0.0], ["training.steps=1"])
    tests = SETTINGS["small"].tests
    outcome = learn(case, tests, 1.0, CPU)
    model = build_model(case.recipe.model, case.recipe.training.seed)
    recall = learning.Recall(32, "zero", 0)
    tokens, labels = learning.draw_test(recall, tests[0])
    right = model(tokens).argmax(-1) == labels
    assert outcome.accuracy == pytest.approx(right.sum().item() / (labels >= 0).sum().item())
    assert outcome.tests == [{"pairs": 4, "length": 16, "accuracy": outcome.accuracy}]
    # Two layers: a state of two heads of 16 x 16, and what a convolution of four over each of q, k and v keeps.
    kept = sum(value.numel() for layer in model.init_state(1, 16).layers for value in layer.values())
    assert outcome.state_elements == kept >= 2 * 2 * 16 * 16 and outcome.state_bytes == 4 * kept
    assert (outcome.steps, outcome.ended) == (1, "finished")


def test_a_model_whose_loss_is_not_finite_is_given_up() -> None:
    overrides = ["training.steps=200", "training.max_skipped_steps=1", "model.init_std=1e30"]
    (case,) = build_cases(SETTINGS["small"], ["gla"], [32], [1e-3], overrides)
    outcome = learn(case, SETTINGS["small"].tests, 1.0, CPU)
    assert outcome.ended == "diverged" and outcome.steps < 20


def test_models_of_other_settings_and_options_have_other_keys() -> None:
    setting = SETTINGS["small"]
    plain = build_cases(setting, ["mamba2", "gla"], [32, 64], [1e-3, 1e-2])
    others = [
        *build_cases(setting, ["mamba2:state=16,expand=4.0"], [64], [1e-3]),
        *build_cases(setting, ["gla"], [64], [1e-3], ["training.steps=7"]),
        *build_cases(SETTINGS["published"], ["gla"], [64], [1e-3]),
    ]
    assert len({case.key for case in [*plain, *others]}) == 8 + 3
    options = others[0].recipe.model.mixer_options["mamba2"]
    assert (options.state, options.expand, options.conv) == (16, 4.0, 4)
    assert others[0].recipe.model.hidden_size == 64 and others[0].recipe.optimizer.lr == 1e-3


def test_mistakes_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fails(["--mixers", "glaa"], capsys).startswith("error: --mixers glaa: unknown mixer; did you mean 'gla'?")
    assert fails(["--mixers", "gla:conw=3"], capsys).startswith("error: mixer.gla.conw: unknown key")
    assert fails(["--widths", "33"], capsys).startswith("error: ")
    assert fails(["--training.stepz=3"], capsys).startswith("error: training.stepz: unknown key")
    (tmp_path / "recall.json").write_text("[]")
    told = fails([*TINY, "--output", str(tmp_path)], capsys)
    assert "recall.json: is not what a sweep writes" in told


@pytest.mark.slow
@pytest.mark.parametrize("mixer", ["gated_delta_net", "linear_attention"])
def test_the_small_setting_is_learnt(mixer: str) -> None:
    setting = SETTINGS["small"]
    (case,) = build_cases(setting, [mixer], setting.widths, setting.lrs)
    assert learn(case, setting.tests, setting.enough, CPU).accuracy > 0.9
