"""What is drawn is what the runs say."""

from pathlib import Path

import numpy as np
import pytest
from runs import line, write_run

pytest.importorskip("matplotlib")

from torchlinearmoe.plotting.figures import curves, draw, load_maps
from torchlinearmoe.plotting.run import Run, read_run


def loads(step: int, busiest: list[float]) -> dict[str, list[float]]:
    return {
        "moe/layers": [1, 2],
        "moe/max_load_by_layer": busiest,
        "moe/min_load_by_layer": [0.5 / step, 0.25],
    }


@pytest.fixture
def runs(tmp_path: Path) -> list[Run]:
    first = [line(1, **loads(1, [2.0, 4.0])), line(2, validation_loss=3.0, **loads(2, [1.0, 8.0]))]
    second = [line(1), line(3, validation_loss=2.5)]
    folders = [write_run(tmp_path / "a", first), write_run(tmp_path / "b", second)]
    return [read_run(folder) for folder in folders]


def test_training_and_validation_loss_of_each_run_are_curves_of_one_colour(runs: list[Run]) -> None:
    keys = {"loss": "training", "validation_loss": "validation"}
    figure = curves(runs, ["a", "b"], keys, "loss", "steps")
    assert figure is not None
    lines = figure.axes[0].get_lines()
    names = ["a, training", "a, validation", "b, training", "b, validation"]
    assert [drawn.get_label() for drawn in lines] == names
    legend = figure.axes[0].get_legend()
    assert legend is not None and [text.get_text() for text in legend.get_texts()] == names
    assert [drawn.get_color() for drawn in lines] == ["C0", "C0", "C1", "C1"]
    assert lines[0].get_xydata().tolist() == [[1, 4.0], [2, 2.0]]  # type: ignore[union-attr]
    assert lines[3].get_xydata().tolist() == [[3, 2.5]]  # type: ignore[union-attr]


def test_a_smooth_curve_is_a_running_mean(runs: list[Run]) -> None:
    figure = curves(runs[:1], ["a"], {"loss": ""}, "loss", "steps", smooth={"loss": 2})
    assert figure is not None
    assert figure.axes[0].get_lines()[0].get_xydata().tolist() == [[1, 4.0], [2, 3.0]]  # type: ignore[union-attr]


def test_the_load_of_experts_is_a_map_of_layers_over_time_in_doublings(runs: list[Run]) -> None:
    figure = load_maps(runs, ["a", "b"], "tokens")
    assert figure is not None
    busiest, idlest = (axes for axes in figure.axes if axes.get_title())  # of the first run alone: the other has none
    assert (busiest.get_title(), idlest.get_title()) == ("a: experts, busiest", "a: experts, idlest")
    (mesh,) = busiest.collections
    np.testing.assert_allclose(np.asarray(mesh.get_array()).reshape(2, 2), [[1, 0], [2, 3]])
    (mesh,) = idlest.collections
    np.testing.assert_allclose(np.asarray(mesh.get_array()).reshape(2, 2), [[-1, -2], [-2, -2]])
    assert [tick.get_text() for tick in busiest.get_yticklabels()] == ["1", "2"]
    assert load_maps(runs[1:], ["b"], "tokens") is None


def test_pictures_lie_in_the_folder_and_those_of_nothing_are_left_out(runs: list[Run], tmp_path: Path) -> None:
    files = draw(runs, ["a", "b"], tmp_path / "new" / "plots", "hours")
    assert [file.name for file in files] == ["loss.png", "grad_norm.png", "throughput.png", "expert_load.png"]
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in files)
    assert [file.name for file in draw(runs[1:], ["b"], tmp_path / "b")][-1] == "throughput.png"
