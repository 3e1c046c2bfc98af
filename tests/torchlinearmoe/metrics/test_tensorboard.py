"""TensorBoard events are read back as written."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from torchlinearmoe.metrics.tensorboard import TensorBoard, heat_map, relative_load


def read(folder):
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0, "histograms": 0})
    events.Reload()
    return events


def test_numbers_become_scalars_and_the_rest_is_passed_over(tmp_path):
    board = TensorBoard(tmp_path)
    board.scalars(3, {"loss": 2.5, "tokens": 12, "mfu": None, "note": "x"})
    board.scalars(4, {"loss": 2.25, "tokens": 16, "mfu": None})
    board.close()
    events = read(tmp_path)
    assert events.Tags()["scalars"] == ["loss", "tokens"]
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(3, 2.5), (4, 2.25)]


def test_expert_load_is_a_picture_and_a_histogram_a_layer(tmp_path):
    load = torch.tensor([[4.0, 4.0, 4.0], [0.0, 6.0, 6.0]])
    board = TensorBoard(tmp_path)
    board.expert_load(7, load)
    board.close()
    events = read(tmp_path)
    (picture,) = events.Images("moe/expert_load")
    pixels = np.asarray(Image.open(io.BytesIO(picture.encoded_image_string)))
    assert picture.step == 7 and np.array_equal(pixels, heat_map(load / 4).permute(1, 2, 0).numpy())
    (histogram,) = events.Histograms("moe/expert_load/layer_1")
    assert histogram.histogram_value.sum == pytest.approx(3.0) and histogram.histogram_value.max == 1.5


def test_relative_load_has_no_unit_and_a_silent_layer_counts_as_balanced():
    load = torch.tensor([[2**40, 3 * 2**40], [0, 7], [0, 0]])
    expected = torch.tensor([[0.5, 1.5], [0.0, 2.0], [1.0, 1.0]])
    assert torch.equal(relative_load(load), expected) and torch.equal(relative_load(load * 0.25), expected)


def test_heat_map_is_white_at_balance_blue_below_and_red_above():
    relative = torch.tensor([[1.0, 0.25, 0.0], [4.0, 16.0, 2.0]])
    white, blue, red, half = (255, 255, 255), (0, 0, 255), (255, 0, 0), (255, 128, 128)
    picture = heat_map(relative)
    assert picture.shape == (3, 16, 24) and picture.dtype == torch.uint8
    cells = [[tuple(picture[:, 8 * n + at, 8 * e + at].tolist()) for e in range(3)] for n in range(2) for at in (0, 7)]
    assert cells == [[white, blue, blue]] * 2 + [[red, red, half]] * 2


def test_a_run_that_starts_again_from_nothing_hides_all_events_before(tmp_path):
    for losses in ([11.0, 12.0, 13.0], [21.0, 22.0]):
        board = TensorBoard(tmp_path)
        for step, loss in enumerate(losses, start=1):
            board.scalars(step, {"loss": loss})
        board.close()
    assert [(e.step, e.value) for e in read(tmp_path).Scalars("loss")] == [(1, 21.0), (2, 22.0)]


def test_resumed_run_hides_the_events_after_its_step(tmp_path):
    first = TensorBoard(tmp_path)
    for step in (1, 2, 3, 4):
        first.scalars(step, {"loss": 10.0 + step})
    first.close()
    second = TensorBoard(tmp_path, resumed_step=2)
    second.scalars(3, {"loss": 20.0})
    second.close()
    assert [(e.step, e.value) for e in read(tmp_path).Scalars("loss")] == [(1, 11.0), (2, 12.0), (3, 20.0)]


def test_the_recipe_is_there_as_text_and_as_hyperparameters(tmp_path):
    from tensorboard.plugins.hparams import plugin_data_pb2

    board = TensorBoard(tmp_path)
    board.recipe("[model]\nmixer = 'gla'", {"model.mixer": "gla", "optimizer.lr": 0.5, "data.paths": ("a", "b")}, 0)
    board.close()
    events = read(tmp_path)
    (text,) = events.Tensors("recipe/text_summary")
    assert text.tensor_proto.string_val[0].decode() == "```toml\n[model]\nmixer = 'gla'\n```"
    content = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    started = plugin_data_pb2.HParamsPluginData.FromString(  # pyright: ignore[reportAttributeAccessIssue]
        content
    ).session_start_info.hparams
    assert started["model.mixer"].string_value == "gla" and started["optimizer.lr"].number_value == 0.5
    assert started["data.paths"].string_value == "('a', 'b')"
