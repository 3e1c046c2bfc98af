"""The command as a user types it: models of one trunk, on the same tokens; it goes on where it stopped."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from torchlinearmoe.curves import learn as learning
from torchlinearmoe.curves import peer
from torchlinearmoe.curves.__main__ import main
from torchlinearmoe.curves.cases import build_cases
from torchlinearmoe.curves.learn import claimed, learn
from torchlinearmoe.curves.results import Outcome, parameters, read_outcomes, table
from torchlinearmoe.curves.settings import STEP_TOKENS, STEPS
from torchlinearmoe.curves.text import DOCUMENTS, TOKENIZER, get_text
from torchlinearmoe.data.tokenizer import load_tokenizer
from torchlinearmoe.data.train_tokenizer import save, train
from torchlinearmoe.mixers import MIXERS
from torchlinearmoe.models.decoder import Decoder, build_model

SMALL = {
    "model": {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "num_kv_heads": 2, "head_dim": 16,
              "ffn_hidden_size": 32, "vocab_size": 300},
    "training": {"sequence_length": 32, "micro_batch_size": 2, "tokens_per_step": 128, "steps": 4},
    "optimizer": {"warmup_steps": 1},
    "metrics": {"validation_interval": 2, "interval": 2},
    "data": {"validation_fraction": 0.2},
}  # fmt: skip
OVERRIDES = [f"{section}.{key}={value}" for section, keys in SMALL.items() for key, value in keys.items()]
ARGUMENTS = [f"--{override}" for override in OVERRIDES]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    folder = tmp_path / "text"
    folder.mkdir()
    texts = [f"The operation {number} returns item {number % 7}, unless it is throttled. " * 20 for number in range(40)]
    lines = [json.dumps({"text": text}) for text in texts]
    (folder / DOCUMENTS).write_text("\n".join(lines) + "\n")
    save(train(texts, 300), folder / TOKENIZER)
    get_text(folder, say=lambda line: None)
    return folder


def cases(labels: list[str], text: Path, more: list[str] | None = None) -> list[Any]:
    return build_cases(labels, text / "tokens", text / TOKENIZER, text.parent / "out", [*OVERRIDES, *(more or [])])


def test_models_share_data_and_order_and_a_second_start_goes_on(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    out = tmp_path / "out"
    arguments = ["--models", "gla", "retention", "--text", str(text), "--output", str(out), *ARGUMENTS]
    assert main([*arguments, "--seconds", "0"]) == 0
    assert "2 models, 0 of them done before" in (told := capsys.readouterr().out) and "left: gla retention" in told

    def only_the_first(case: Any, *rest: Any) -> Any:
        if case.label != "gla":
            raise KeyboardInterrupt
        return learn(case, *rest)

    monkeypatch.setattr(learning, "learn", only_the_first)
    with pytest.raises(SystemExit) as done:
        main(arguments)
    assert done.value.code == 130
    monkeypatch.setattr(learning, "learn", learn)
    capsys.readouterr()
    assert main(arguments) == 0
    told = capsys.readouterr().out
    assert told.startswith("2 models, 1 of them done before") and "[1/2]" not in told and "[2/2] retention" in told
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    models = json.loads((out / "curves.json").read_text())["models"]
    assert {model["label"] for model in models} == {"gla", "retention"}
    assert all([at for at, _ in model["curve"]] == [256, 512] for model in models)
    assert (out / "curves.md").read_text() in told
    assert not list(out.glob("*/checkpoints"))
    monkeypatch.setattr(learning, "learn", lambda *rest: pytest.fail("nothing is left to train"))
    assert main(arguments) == 0


def test_a_model_that_diverges_is_done_too(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    arguments = ["--models", "gla", "--text", str(text), "--output", str(out), *ARGUMENTS]
    broken = [*arguments, "--model.init_std=1e30", "--training.max_skipped_steps=1"]
    assert main(broken) == 0
    assert "| gla | 0.0 M |  |  | diverged |" in (told := capsys.readouterr().out) and "left:" not in told
    assert not (out / "curves.png").exists()


def test_what_another_process_is_at_or_failed_at_is_left_to_it(text: Path, tmp_path: Path) -> None:
    (case,) = cases(["fla/gla"], text)
    with claimed(case) as free, claimed(case) as again:
        assert (free, again) == (True, False)
    (case.folder / "failed.txt").touch()
    with claimed(case) as free:
        assert not free


def test_every_model_has_over_ten_million_parameters_and_reads_each_token_once() -> None:
    here = Path("text")
    built = build_cases([*MIXERS], here, here, here)
    assert all(10e6 < parameters(case.recipe.model) < 50e6 for case in built)
    assert 10e6 <= STEPS * STEP_TOKENS < 10.9e6
    assert len({case.folder for case in built}) == len(built)


def test_table_has_theirs_beside_ours() -> None:
    def outcome(label: str, loss: float, theirs: bool = False, diverged: bool = False) -> Outcome:
        curve = [(10 * n, loss + (10 - n)) for n in range(1, 11)]
        return Outcome(label, label.removeprefix("fla/"), theirs, 10**7, curve, 1e5, 1e-3, diverged, 1.0)

    _, _, *rows = table([outcome("gla", 2.0), outcome("fla/gla", 2.02, True), outcome("kda", 9.0, diverged=True)])
    assert rows == [
        "| gla | 10.0 M | 11.0000 | 7.0000 | 2.0000 |  | 100,000 |",
        "| fla/gla | 10.0 M | 11.0200 | 7.0200 | 2.0200 | +1.00 % | 100,000 |",
        "| kda | 10.0 M | 18.0000 | 14.0000 | diverged |  | 100,000 |",
    ]


class Theirs(nn.Module):
    """Ours with the call of a model of transformers."""

    def __init__(self, model: Decoder) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, cu_seqlens: torch.Tensor) -> Any:
        return SimpleNamespace(logits=self.model(input_ids, cu_seqlens))


def test_a_peer_that_is_ours_learns_as_ours_does(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = cases(["delta_net", "fla/delta_net"], text, ["training.device=cpu"])
    monkeypatch.setattr(peer, "build_peer", lambda mixer, model: Theirs(build_model(model)))
    for case in (ours, theirs):
        with claimed(case) as free:
            assert free and learn(case)
    found = {outcome.label: outcome for outcome in read_outcomes([ours, theirs])}
    for (at, loss), (other, their) in zip(found["delta_net"].curve, found["fla/delta_net"].curve, strict=True):
        assert at == other and loss == pytest.approx(their, rel=1e-5)
    assert load_tokenizer(ours.recipe.data.tokenizer).vocab_size <= 300


def test_mistakes_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, told in (
        (["--models", "glaa"], "--models glaa: unknown mixer; did you mean 'gla'?"),
        (["--models", "fla/based"], "--models fla/based: unknown mixer; "),
        (["--models", "fla/gla:conv=4"], "--models fla/gla:conv=4: flash-linear-attention's model has the defaults"),
        (["--models", "gla:conw=3"], "mixer.gla.conw: unknown key"),
        (["--processes", "0"], "--processes 0: must be at least 1"),
        (["--model.hiden_size=3"], "model.hiden_size: unknown key"),
    ):
        with pytest.raises(SystemExit) as done:
            main([*arguments, "--output", str(tmp_path / "out")])
        assert done.value.code == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"error: {told}")
    assert not (tmp_path / "out").exists()
