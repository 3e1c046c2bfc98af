"""metrics.jsonl becomes curves, of whatever version and in whatever state it is."""

from pathlib import Path

import pytest
from runs import line, write_run

from torchlinearmoe.errors import UserError
from torchlinearmoe.plotting.run import read_run


def test_a_series_stands_at_its_tokens_steps_and_hours(tmp_path: Path) -> None:
    slow = line(6) | {"tokens_per_second": 10.0}
    run = read_run(write_run(tmp_path / "run", [line(2), line(4, validation_loss=3.0), slow]))
    assert run.series("loss", "steps") == ([2, 4, 6], [2.0, 1.0, 4 / 6])
    assert run.series("loss", "tokens")[0] == [200, 400, 600]
    # 200 tokens at 50 a second are 4 s, at 10 a second 20 s.
    assert run.series("loss", "hours")[0] == pytest.approx([4 / 3600, 8 / 3600, 28 / 3600])
    assert run.series("validation_loss", "tokens") == ([400], [3.0])
    assert run.series("mfu") == ([], [])


def test_a_validation_between_logged_steps_stands_between_them(tmp_path: Path) -> None:
    validations = [{"step": step, "validation_loss": 3.0} for step in (1, 3, 5)]
    lines = sorted([line(2), line(4), *validations], key=lambda entry: entry["step"])
    run = read_run(write_run(tmp_path / "run", lines))
    assert run.series("validation_loss", "tokens")[0] == pytest.approx([100, 300, 500])
    alone = read_run(write_run(tmp_path / "alone", validations))
    assert alone.series("validation_loss", "steps")[0] == [1, 3, 5]
    assert alone.series("validation_loss", "tokens")[0] == [0, 0, 0]


def test_what_is_no_line_of_figures_is_passed_over(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", [line(1), line(2) | {"loss": None}])
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('[1]\n{"loss": 1}\n{"step": 3, "lo')
    for path in (folder, folder / "metrics.jsonl"):
        run = read_run(path)
        assert run.folder == folder and run.series("loss", "steps") == ([1], [4.0])


def test_a_folder_without_figures_is_told_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="metrics.jsonl: cannot be read"):
        read_run(tmp_path / "nowhere" / "metrics.jsonl")
    with pytest.raises(UserError, match="cannot be read .No such file.*; name the folder of a run"):
        read_run(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match="holds no logged step yet"):
        read_run(tmp_path)


def test_a_run_whose_recipe_is_gone_has_none(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", [line(1)])
    recipe = read_run(folder).recipe
    assert recipe is not None and recipe.model.mixer == "gla"
    (folder / "recipe.toml").unlink()
    assert read_run(folder).recipe is None
