"""Weights & Biases gets what the file gets, in one run however often training is started again."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from torchlinearmoe.errors import UserError
from torchlinearmoe.metrics import METRIC_KEYS, MetricsLogger
from torchlinearmoe.metrics.wandb import WeightsAndBiases, check_wandb


class FakeError(Exception):
    pass


class FakeWandb:
    """The part of the client that is used."""

    Error = FakeError

    def __init__(self) -> None:
        self.begun: list[dict[str, Any]] = []
        self.lines: list[dict[str, Any]] = []
        self.finished = 0
        self.refuses = ""

    def init(self, **options: Any) -> Any:
        if self.refuses:
            raise FakeError(self.refuses)
        self.begun.append(options)
        return SimpleNamespace(
            id=options["id"] or "abc", log=self.lines.append, define_metric=lambda *a, **k: None, finish=self._finish
        )

    def _finish(self) -> None:
        self.finished += 1


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> FakeWandb:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)  # pyright: ignore[reportArgumentType]
    return fake


def log(folder: Path, step: int, resumed_step: int = 0) -> None:
    with MetricsLogger(
        folder,
        total_steps=9,
        resumed_step=resumed_step,
        tensorboard=False,
        stream=io.StringIO(),
        wandb="mine",
        settings={"model.mixer": "gla"},
    ) as logger:
        logger.validation(step, 3.0)
        logger.log(step, dict.fromkeys(METRIC_KEYS, 1.0) | {"mfu": None, "loss": 2.0})


def test_it_gets_the_numbers_of_every_line_and_goes_on_in_its_run(tmp_path: Path, client: FakeWandb) -> None:
    log(tmp_path / "run", 4)
    log(tmp_path / "run", 3, resumed_step=2)
    first, second = client.begun
    assert (first["project"], first["name"], first["id"]) == ("mine", "run", None) and second["id"] == "abc"
    assert first["config"] == {"model.mixer": "gla"} and first["resume"] == "allow"
    assert [line["step"] for line in client.lines] == [4, 3] and client.finished == 2
    (written,) = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    del written["time"], written["mfu"]
    assert client.lines[1] == written and written["validation_loss"] == 3.0


def test_without_the_client_or_a_key_the_way_out_is_one_line(
    tmp_path: Path, client: FakeWandb, monkeypatch: pytest.MonkeyPatch
) -> None:
    client.refuses = "api_key not configured\n(no-tty)"
    with pytest.raises(UserError) as told:
        WeightsAndBiases("mine", tmp_path, {})
    assert str(told.value).startswith("metrics.wandb = 'mine': api_key not configured (no-tty); `wandb login`, or set")
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"^metrics.wandb needs wandb, .* 'torchlinearmoe\[wandb\]'$"):
        check_wandb()


def test_its_own_client_keeps_a_run_without_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="the extra wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    log(tmp_path / "run", 4)
    known = (tmp_path / "run" / "wandb" / "run.id").read_text().strip()
    assert any(known in path.name for path in (tmp_path / "run" / "wandb").glob("offline-run-*"))
