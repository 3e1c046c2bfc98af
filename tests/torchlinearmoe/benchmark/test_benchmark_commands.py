"""The subcommands on a tiny model on the CPU: every contestant in a process of its own finishes and is shown."""

import math

import pytest
import torch

from torchlinearmoe.benchmark import __main__ as command
from torchlinearmoe.benchmark import kernels, optimizer, parts, profile, train
from torchlinearmoe.benchmark.categories import CATEGORIES
from torchlinearmoe.benchmark.kernel_calls import OPERATORS, timed_call
from torchlinearmoe.kernels.operator import operators

RECIPE = "recipes/quickstart.toml"
TINY = ["--model.hidden_size=32", "--model.num_layers=2", "--model.layout=LN", "--model.num_heads=2"]
TINY += ["--moe.num_experts=4", "--moe.hidden_size=16"]


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> dict[str, list]:
    """Rows of the tables, by title."""
    tables: dict[str, list] = {}
    for module in (train, kernels, optimizer, parts, profile):
        monkeypatch.setattr(module, "show", lambda title, rows: tables.update({title: list(rows)}))
    return tables


def test_a_step_is_profiled_by_category(shown, capsys):
    arguments = ["train", "--recipe", RECIPE, "--contestants", "ours-eager", "--shapes", "2x32", "--steps", "3"]
    arguments.append("--training.compile_backend=eager")  # for contestants that compile, which this one does not
    assert command.main([*arguments, "--profile", *TINY]) == 0
    rows = {row["category"]: row for row in shown["ours-eager, 2x32"]}
    assert list(rows) == [*CATEGORIES, "idle"]
    for name in set(CATEGORIES) - {"sharding"}:
        row = rows[name]
        assert row["ms"] > 0 and row["launches"] >= 1 and row["floor ms"] > 0, row
        assert math.isclose(row["share of floor"], row["floor ms"] / row["ms"])
    assert rows["sharding"]["floor ms"] is None
    assert 0 < rows["idle"]["share of step"] < 1
    assert "under no label" in capsys.readouterr().out
    (row,) = shown[next(title for title in shown if title.startswith("training"))]
    assert row["tokens_per_second"] > 0 and "profile" not in row


def test_updates_are_checked_and_timed(shown):
    names = ["ours-bfloat16", "torch-masters"]
    assert command.main(["optimizer", "--recipe", RECIPE, "--repeats", "3", "--contestants", *names, *TINY]) == 0
    ((title, rows),) = shown.items()
    assert title.startswith("optimizer")
    assert {row["contestant"] for row in rows} == set(names)
    assert all(row["ms"] > 0 and row["GB/s"] > 0 and row["share of copy"] > 0 for row in rows)
    for name in names:
        parts = " ".join(row["part"] for row in rows if row["contestant"] == name)
        assert all(word in parts for word in ("norm", "update, bfloat16", "sum of gradients")), parts


def test_a_large_model_without_a_gpu_is_refused_in_one_line(monkeypatch, capsys):
    monkeypatch.setattr(optimizer.torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        command.main(["optimizer", "--recipe", "recipes/qwen2_hgrn2.toml"])
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: --recipe") and "quickstart" in line


def test_kernels_are_held_to_their_definition_and_timed(shown, capsys):
    small = ["--shape", "2x32", "--heads", "1", "--width", "8", "--repeats", "3", "--eager"]
    assert command.main(["kernels", "--operators", "linear:scalar", "--backends", "torch", "fla", *small]) == 0
    ((title, rows),) = shown.items()
    assert title.startswith("kernels, 2x32")
    ours, theirs = rows
    assert ours["operator"] == "linear (scalar)" and ours["ms"] > ours["forward_ms"] > 0 and ours["difference"] < 1e-5
    assert math.isclose(ours["of_floor"], ours["floor_ms"] / ours["ms"])
    assert "needs a CUDA device" in theirs["error"]
    with pytest.raises(SystemExit):
        command.main(["kernels", "--operators", "linear:wide"])
    assert "legal: linear:identity, linear:constant" in capsys.readouterr().err


@pytest.mark.parametrize(("part", "backends"), [("moe", ["torch"]), ("loss", ["torch"]), ("attention", ["sdpa"])])
def test_parts_of_a_step_are_held_to_their_definition_and_timed(shown, capsys, part, backends):
    small = ["--recipe", RECIPE, "--shape", "2x16", "--repeats", "3", "--eager", *TINY]
    assert command.main([part, *small]) == 0
    ((title, rows),) = shown.items()
    assert title.startswith(f"{part}, 2x16")
    assert [row["contestant"] for row in rows] == [*backends, "pytorch"]
    for row in rows:
        assert row["ms"] > 0 and row["forward_ms"] > 0 and row["difference"] < 1e-5, row
        assert math.isclose(row["of_floor"], row["floor_ms"] / row["ms"])
    assert "needs a CUDA device" in capsys.readouterr().out  # backends that were left out
    shown.clear()
    assert command.main([part, *small, "--contestants", "reference", "nothing"]) == 0
    ((_, (slow, refused)),) = shown.items()
    assert slow["difference"] == 0 and "legal: " in refused["error"]


@pytest.mark.parametrize("part", ["moe", "loss", "attention"])
def test_parts_that_no_gpu_is_there_for_are_refused_in_one_line(monkeypatch, capsys, part):
    monkeypatch.setattr(parts.torch.cuda, "is_available", lambda: False)
    for arguments, told in (
        ([], "no GPU is visible"),
        (["--shape", "8"], "a shape reads"),
        (["--repeats", "2"], "at le"),
    ):
        with pytest.raises(SystemExit):
            command.main([part, *arguments])
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: --") and told in line
    if part == "moe":
        with pytest.raises(SystemExit):
            command.main([part, "--recipe", RECIPE, "--moe.num_experts=0", "--moe.top_k=0"])
        assert "no experts" in capsys.readouterr().err


@pytest.mark.parametrize("operator", OPERATORS)
def test_every_call_that_is_timed_is_one_of_its_operator(operator):
    for kind in operators()[operator].kinds:
        call = timed_call(operator, kind, (5, 3), 2, 8, torch.device("cpu"), torch.float32)
        out = call.run("torch")
        out.sum().backward()
        assert out.shape[0] == 8 and all(x.grad is not None for x in call.inputs.values())
        moved = sum(x.numel() * x.element_size() for x in [*call.inputs.values(), out])
        assert call.budget.forward_bytes == pytest.approx(moved, rel=0.2)


@pytest.mark.parametrize("arguments", [["train", "--steps", "2"], ["optimizer", "--repeats", "2"]])
def test_too_few_repeats_are_refused(arguments, capsys):
    with pytest.raises(SystemExit):
        command.main(arguments)
    assert "must be at least 3" in capsys.readouterr().err
