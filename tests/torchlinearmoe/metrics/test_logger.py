"""One call tells the file, TensorBoard and the terminal the same."""

import io
import json

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from torchlinearmoe.metrics import METRIC_KEYS, MetricsLogger


def values(loss):
    return dict.fromkeys(METRIC_KEYS, 1.0) | {"loss": loss, "mfu": None, "tokens": 64}


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_logged_step_reaches_file_events_and_terminal(tmp_path):
    stream = io.StringIO()
    with MetricsLogger(tmp_path, total_steps=10, stream=stream) as logger:
        logger.log(
            5, values(torch.tensor(2.5)) | {"moe/max_load": 1.5}, expert_load=torch.tensor([[1, 3]]), seconds_left=42.0
        )
        logger.message("checkpoint at step 5")
    (line,) = lines(tmp_path)
    assert list(line)[0] == "step" and set(METRIC_KEYS) < set(line)
    assert (line["step"], line["loss"], line["mfu"], line["moe/max_load"]) == (5, 2.5, None, 1.5)
    assert stream.getvalue().startswith("step 5/10 | loss 2.5000 | ")
    assert stream.getvalue().endswith("left 42s\ncheckpoint at step 5\n")
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert events.Scalars("loss")[0].value == 2.5 and events.Images("moe/expert_load")[0].step == 5


def test_validation_loss_stands_in_the_line_of_its_step(tmp_path):
    with MetricsLogger(tmp_path, total_steps=10, tensorboard=False, stream=io.StringIO()) as logger:
        logger.validation(2, torch.tensor(3.0))
        logger.log(2, values(2.0))
        logger.validation(3, 2.75)  # a step that is not logged
        logger.log(4, values(1.5))
        logger.validation(5, 2.5)
    found = [(line["step"], line.get("loss"), line.get("validation_loss")) for line in lines(tmp_path)]
    assert found == [(2, 2.0, 3.0), (3, None, 2.75), (4, 1.5, None), (5, None, 2.5)]


def test_every_line_has_its_time_and_its_losses_their_perplexity(tmp_path):
    times = iter([100.0, 101.5, 103.0])
    with MetricsLogger(
        tmp_path, total_steps=10, tensorboard=False, stream=io.StringIO(), clock=lambda: next(times)
    ) as logger:
        logger.validation(2, 1.0)
        logger.log(2, values(2.0))
        logger.validation(3, 3.0)  # a step that is not logged
        logger.log(4, values(float("nan")))
    first, second, third = lines(tmp_path)
    assert [line["time"] for line in (first, second, third)] == [100.0, 101.5, 103.0]
    assert (first["perplexity"], first["validation_perplexity"]) == pytest.approx((7.389056, 2.718282))
    assert second["validation_perplexity"] == pytest.approx(20.085537) and "perplexity" not in second
    assert third["loss"] is None and third["perplexity"] is None


@pytest.mark.parametrize("terminal", [False, True])
def test_a_log_says_each_validation_once(tmp_path, terminal, monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(stream, "isatty", lambda: terminal)
    with MetricsLogger(tmp_path, total_steps=10, tensorboard=False, stream=stream) as logger:
        logger.validation(2, 3.25)
        logger.log(2, values(2.0))
        logger.advance(2)
        logger.validation(3, 2.75)  # a step that is not logged
        logger.advance(3)
        assert ("step 3 | validation loss 2.7500" in stream.getvalue()) or terminal
    text = stream.getvalue()
    assert text.count("step 3 | validation loss 2.7500") == 1
    assert text.count("step 2 | validation loss 3.2500") == terminal
    if not terminal:
        assert text.splitlines()[0].startswith("step 2/10 | loss 2.0000 | validation loss 3.2500 | ")
        assert text.count("validation loss") == 2


def test_resume_cuts_back_to_the_resumed_step(tmp_path):
    with MetricsLogger(tmp_path, total_steps=4, tensorboard=False, stream=io.StringIO()) as logger:
        for step in (1, 2, 3):
            logger.log(step, values(float(step)))
    with MetricsLogger(tmp_path, total_steps=4, resumed_step=2, tensorboard=False, stream=io.StringIO()) as logger:
        logger.log(3, values(30.0))
    assert [(line["step"], line["loss"]) for line in lines(tmp_path)] == [(1, 1.0), (2, 2.0), (3, 30.0)]
    with MetricsLogger(tmp_path, total_steps=4, tensorboard=False, stream=io.StringIO()):
        assert lines(tmp_path) == []


def test_other_ranks_write_nothing(tmp_path):
    stream = io.StringIO()
    with MetricsLogger(tmp_path / "run", total_steps=4, rank=1, stream=stream) as logger:
        logger.advance(1)
        logger.validation(1, 2.0)
        logger.log(1, {})
        logger.message("hello")
    assert not (tmp_path / "run").exists() and stream.getvalue() == ""


def test_line_without_a_promised_key_is_a_mistake(tmp_path):
    with MetricsLogger(tmp_path, total_steps=4, tensorboard=False, stream=io.StringIO()) as logger:
        incomplete = values(1.0)
        del incomplete["skipped_steps"]
        with pytest.raises(AssertionError, match="skipped_steps"):
            logger.log(1, incomplete)


def test_accuracies_and_tasks_stand_beside_the_losses_of_their_step(tmp_path):
    stream = io.StringIO()
    with MetricsLogger(tmp_path, total_steps=10, tensorboard=False, stream=stream) as logger:
        logger.validation(2, 3.0, {"forum": 4.0}, {"": 0.25, "forum": 0.5})
        logger.evaluation(2, {"evaluation/local_text/bits_per_byte": 1.5, "evaluation/arc/acc": 0.75})
        logger.log(2, values(2.0))
        logger.evaluation(3, {"evaluation/arc/acc": 0.5})  # a step that is not logged
        logger.validation(4, 2.0)
    first, second, third = lines(tmp_path)
    assert (first["step"], first["loss"], first["validation_loss/forum"]) == (2, 2.0, 4.0)
    assert (first["validation_accuracy"], first["validation_accuracy/forum"]) == (0.25, 0.5)
    assert (first["evaluation/local_text/bits_per_byte"], first["evaluation/arc/acc"]) == (1.5, 0.75)
    assert (second["step"], second["evaluation/arc/acc"]) == (3, 0.5) and "validation_loss" not in second
    assert (third["step"], third["validation_loss"]) == (4, 2.0) and "evaluation/arc/acc" not in third
    told = stream.getvalue()
    assert (
        "step 2 | validation loss 3.0000, of forum 4.0000, validation accuracy 0.2500, validation accuracy forum 0.5000"
        in told
    )
    assert "step 2 | arc: acc 0.7500" in told and "step 3 | arc: acc 0.5000" in told
