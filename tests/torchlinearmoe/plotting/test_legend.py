"""Runs are named by what differs in their recipes."""

from pathlib import Path

import pytest
from runs import line, write_run

from torchlinearmoe.plotting.legend import labels
from torchlinearmoe.plotting.run import read_run


def named(folder: Path, *overrides: list[str]) -> list[str]:
    runs = [write_run(folder / f"run-{i}", [line(1)], keys) for i, keys in enumerate(overrides)]
    return labels([read_run(run) for run in runs])


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        ([["model.mixer=gla"]], ["run-0"]),
        ([["model.mixer=gla"], ["model.mixer=rwkv7"]], ["mixer=gla", "mixer=rwkv7"]),
        (
            [["optimizer.lr=0.001"], ["optimizer.lr=0.003", "training.output_dir=elsewhere", "metrics.interval=3"]],
            ["lr=0.001", "lr=0.003"],
        ),
        ([["metrics.interval=3"], []], ["run-0", "run-1"]),
        (
            [["training.seed=1"], ["training.seed=2"], ["training.seed=2"]],
            ["seed=1", "seed=2 (run-1)", "seed=2 (run-2)"],
        ),
        # An option that one of the mixers alone has is no difference between two runs of it and another.
        ([["mixer.gla.expand_k=1.0"], ["model.mixer=rwkv7"]], ["mixer=gla", "mixer=rwkv7"]),
        ([["mixer.gla.expand_k=1.0"], []], ["expand_k=1", "expand_k=0.5"]),
        # What a family or a size brings is not told beside it.
        ([["model.family=qwen2"], ["model.family=mixtral"]], ["family=qwen2", "family=mixtral"]),
    ],
    ids=["alone", "mixer", "lr", "nothing", "alike", "one mixer's option", "option", "family"],
)
def test_a_run_is_named_by_what_differs(tmp_path: Path, overrides: list[list[str]], told: list[str]) -> None:
    assert named(tmp_path, *overrides) == told


def test_two_keys_of_one_name_are_told_apart(tmp_path: Path) -> None:
    found = named(
        tmp_path, ["model.hidden_size=64", "moe.hidden_size=32"], ["model.hidden_size=128", "moe.hidden_size=48"]
    )
    assert [name.count("model.hidden_size=") + name.count("moe.hidden_size=") for name in found] == [2, 2]


def test_many_differences_end_in_the_folder(tmp_path: Path) -> None:
    keys = ["training.seed", "optimizer.weight_decay", "optimizer.eps", "optimizer.lr", "moe.top_k"]
    first, second = ([f"{key}={value}" for key in keys] for value in (1, 2))
    found = named(tmp_path, first, second)
    assert [name.count("=") for name in found] == [4, 4]
    assert [name.rpartition("... ")[2] for name in found] == ["(run-0)", "(run-1)"]


def test_folders_of_one_name_without_recipes_are_told_by_their_paths(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / name / "run", [line(1)]) for name in "ab"]
    for folder in folders:
        (folder / "recipe.toml").unlink()
    assert labels([read_run(folder) for folder in folders]) == [str(folder) for folder in folders]
