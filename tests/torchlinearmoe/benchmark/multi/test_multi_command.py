"""Sections fail alone, the table and the JSON tell everything, and no process outlives its section."""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from torchlinearmoe.benchmark import __main__ as command
from torchlinearmoe.benchmark import multi
from torchlinearmoe.benchmark.multi import checkpoint, together
from torchlinearmoe.benchmark.multi.host import LATE, Host, Job, OutOfTime, Runs, Stuck, descendants, key_of
from torchlinearmoe.benchmark.multi.job import await_turn
from torchlinearmoe.benchmark.multi.models import small, timed
from torchlinearmoe.benchmark.multi.together import measure_together
from torchlinearmoe.parallel.mesh import resolve_degrees, tokens_per_step
from torchlinearmoe.parallel.pipeline import check_micro_batches, stage_layers
from torchlinearmoe.recipe import resolve
from torchlinearmoe.run_folder import with_tokens_per_step

MULTI = ["multi", "--device", "cpu"]


@pytest.fixture
def sections(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sections that start nothing."""

    def broken(host):
        yield {"case": "before", "result": "timed", "tokens_per_second_per_gpu": 5.0}
        raise RuntimeError("two\nlines")

    def hung(host):
        raise OutOfTime
        yield

    def sound(host):
        yield {"case": "sound", "result": "equal", "loss_difference": 1e-7}

    fakes = {"fsdp": broken, "tensor": hung, "pipeline": sound}
    modules = {name: SimpleNamespace(run=run, runs=lambda host: Runs(), LIMIT=10) for name, run in fakes.items()}
    monkeypatch.setattr(multi, "SECTIONS", modules)
    monkeypatch.setattr(multi.signal, "signal", lambda *_: None)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


def test_a_failing_section_is_a_row_and_a_line_and_the_others_go_on(sections, tmp_path: Path, capsys):
    assert command.main([*MULTI, "--json", str(tmp_path / "found.json")]) == 1
    found = json.loads((tmp_path / "found.json").read_text())
    assert [(row["section"], row["case"], row["result"]) for row in found["rows"]] == [
        ("fsdp", "before", "timed"),
        ("fsdp", "all", "failed"),
        ("tensor", "all", "failed"),
        ("pipeline", "sound", "equal"),
    ]
    assert found["rows"][1]["error"] == "RuntimeError: two lines"
    assert found["header"]["ranks"] == 2 and found["header"]["backend"] == "gloo" and found["header"]["torch"]
    out, err = capsys.readouterr()
    assert err.splitlines() == ["fsdp, all: RuntimeError: two lines", "tensor, all: no answer within the limit"]
    assert out.startswith("fsdp, before: timed, tokens/s a GPU 5\npipeline, sound: equal, losses differ 1e-07\n")
    assert "ranks 2" in out and "sound" in out and "1e-07" in out and "hidden" not in out


def test_one_section_alone_that_succeeds_is_status_0(sections):
    assert command.main([*MULTI, "--only", "pipeline"]) == 0


def test_what_quick_has_no_time_for_is_left_out_and_starts_nothing(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setattr(multi.signal, "signal", lambda *_: None)
    monkeypatch.setattr(multi, "QUICK_SECONDS", -1)
    assert command.main([*MULTI, "--quick", "--json", str(tmp_path / "found.json")]) == 0
    found = json.loads((tmp_path / "found.json").read_text())
    assert {row["result"] for row in found["rows"]} == {"left out"} and found["torchruns"] == []
    assert {row["section"] for row in found["rows"]} == set(multi.SECTIONS) and len(found["rows"]) > 20
    shown = " ".join(capsys.readouterr().out.split())
    assert "the time of" in shown and "debug size" in shown and found["header"]["seconds"] < 60


def test_under_torchrun_the_first_rank_leads_and_the_others_leave(sections, monkeypatch, capsys):
    for name, value in {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4", "MASTER_ADDR": "localhost"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("RANK", "1")
    assert command.main(MULTI) == 0
    assert capsys.readouterr().out == ""
    monkeypatch.setenv("RANK", "0")
    assert command.main([*MULTI, "--only", "pipeline"]) == 0
    assert "ranks 4" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--training.steps=3"], "--training: is set by the sections"),
        (["--model.mixr=gla"], "mixer"),
        (["--device", "cuda"], "it takes 2"),
    ],
)
def test_mistakes_are_one_line(sections, monkeypatch, capsys, arguments, said):
    monkeypatch.setattr(multi.torch.cuda, "device_count", lambda: 1)
    with pytest.raises(SystemExit):
        command.main([*MULTI, *arguments])
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line


def test_a_job_ends_with_everything_it_started(tmp_path: Path):
    child = "import subprocess, sys; subprocess.Popen(['sleep', '60'], start_new_session=True).wait()"
    process = subprocess.Popen([sys.executable, "-c", child], start_new_session=True)
    job = Job(process, tmp_path / "log")
    while not (below := descendants(process.pid)):
        time.sleep(0.01)
    with pytest.raises(OutOfTime):
        job.wait(time.monotonic())
    job.end()
    assert process.returncode == -9
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{pid}/cmdline").exists() and _runs(pid) for pid in below):
        assert time.monotonic() < deadline


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_children_know_no_launcher_and_no_multicast(monkeypatch, tmp_path: Path):
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setenv("HOME", "/somewhere")
    environment = Host(2, True, False, False, tmp_path).environment()
    assert not {"RANK", "TORCHELASTIC_RUN_ID"} & environment.keys()
    assert environment["NCCL_NVLS_ENABLE"] == "0" and environment["HOME"] == "/somewhere"


class Checked(Host):
    """A host that starts nothing, and looks at every recipe as the ranks would."""

    def __post_init__(self):
        super().__post_init__()
        self.asked: list[tuple[int, dict]] = []

    def _each(self, runs, ranks, rising=False):
        found = []
        for run in runs:
            run["recipe"]["training"].setdefault("output_dir", "runs/x")
            recipe = resolve(run["recipe"])
            degrees = resolve_degrees(recipe.parallel, ranks)
            recipe = with_tokens_per_step(recipe, tokens_per_step(recipe.training, degrees))
            check_micro_batches(recipe, degrees)
            if degrees.pipeline > 1:
                stage_layers(recipe)
            resumed = checkpoint.SAVED if "saved" in recipe.checkpoint.resume else 0
            per_rank = tokens_per_step(recipe.training, degrees) / ranks
            found.append(
                {
                    "losses": [7.0] * (recipe.training.total_steps - resumed),
                    "gradients": {"a": 1.0},
                    "grad_norms": [1.0] * (recipe.training.total_steps - resumed),
                    "tokens_per_second_per_gpu": per_rank,
                    "hidden_share": 0.5,
                    "resumed": resumed,
                    "run_s": 2.0,
                }
            )
        self.asked += [(ranks, run) for run in runs]
        return found


@pytest.mark.parametrize("ranks", multi.RANKS)
@pytest.mark.parametrize("name", [name for name in multi.SECTIONS if name != "kill"])
def test_every_recipe_for_gpus_is_legal_and_gives_each_rank_as_many_tokens(name: str, ranks: int, tmp_path: Path):
    host = Checked(ranks, True, False, True, tmp_path)
    rows = multi.section(host, name, None, float("inf"))
    assert not [row for row in rows if row["result"] == "failed"], rows
    cases = {row["case"]: row for row in rows}
    assert ("hsdp, speed" in cases) == (name == "fsdp" and ranks >= 4)
    assert all(row["share"] == 1 for row in rows if "share" in row)
    longest = [row["tokens"] for case, row in cases.items() if case.endswith("longest")]
    assert longest == ([2**20] * 2 if name == "context" else [])


@pytest.mark.parametrize("ranks", multi.RANKS)
def test_quick_asks_for_each_run_once_equality_first_and_sections_find_it_known(ranks: int, tmp_path: Path):
    host = Checked(ranks, True, True, False, tmp_path)
    modules = {name: module for name, module in multi.SECTIONS.items() if name != "kill"}
    over = time.monotonic() + 100
    measure_together(host, modules, over)
    asked, host.asked = host.asked, []
    rows = {name: multi.section(host, name, None, over) for name in modules}
    assert host.asked == [] and not [row for found in rows.values() for row in found if row["result"] == "failed"]
    assert len({key_of(run, count) for count, run in asked}) == len(asked)
    assert sum(found[-1]["seconds"] for found in rows.values()) == pytest.approx(2.0 * len(asked), abs=1)
    one, every = ([run for count, run in asked if count == number] for number in (1, ranks))
    assert [run["kind"] for run in one] == ["losses"] * 5 + ["speed", "train"]
    kinds = [run["kind"] for run in every]
    first = kinds.index("speed")
    assert set(kinds[:first]) == {"losses", "train"} and set(kinds[first:]) == {"speed", "overlap"}
    assert kinds[first : first + 3] == ["speed", "speed", "overlap"]
    assert "context" in every[first + 1]["recipe"]["parallel"]  # beside data parallelism alone
    timed = [run["recipe"]["model"] for run in every[first:]]
    assert {model["num_layers"] for model in timed} <= {max(4, 2 * ranks), 16}
    assert {run["recipe"]["model"]["kernel_backend"] for run in every[:first]} == {"torch"}
    # What is timed waits for all that is not, and what one rank resumes for what all have saved.
    ends, checked = str(host.turns / "one-ends"), str(host.turns / "every-checked")
    assert [run.get("after") for run in one[5:]] == [[checked], [checked]]
    assert {(run["says"], *run["after"]) for run in every[first:]} == {(checked, ends)}
    assert Path(ends).exists() and Path(checked).exists()


def test_what_is_apart_ends_before_what_is_timed_and_no_later_than_its_share(tmp_path: Path):
    host = Checked(2, False, True, False, tmp_path)
    deadlines = []

    def apart(deadline):
        deadlines.append(deadline)
        return {"losses": []}

    speed = {"kind": "speed", "recipe": timed(host, length=64, sequences=1, parallel={"data_shard": 1})}
    modules: dict[str, Any] = {
        "kill": SimpleNamespace(runs=lambda host: Runs([speed], [], apart)),
        "broken": SimpleNamespace(runs=lambda host: 1 / 0),
    }
    over = time.monotonic() + 100
    measure_together(host, modules, over)
    assert deadlines == [over - together.TIMED_SECONDS]
    assert host.once("kill", apart, over)["losses"] == [] and len(deadlines) == 1
    ((_, run),) = host.asked
    assert [Path(path).name for path in run["after"]] == ["every-checked", "kill-ends"]
    assert all(Path(path).exists() for path in run["after"])


def test_a_signal_ends_what_is_measured_together(tmp_path: Path, monkeypatch):
    host = Host(2, False, True, False, tmp_path)

    def endless(deadline):
        while True:
            host.check()
            time.sleep(0.01)

    def interrupted(futures):
        raise KeyboardInterrupt

    monkeypatch.setattr(together, "wait", interrupted)
    modules: dict[str, Any] = {"x": SimpleNamespace(runs=lambda host: Runs(apart=endless))}
    with pytest.raises(KeyboardInterrupt):
        measure_together(host, modules, time.monotonic() + 100)


def test_what_is_done_beside_has_so_long_and_the_rest_as_long_as_before(tmp_path: Path):
    host = Host(2, False, False, False, tmp_path)
    host.deadline = over = time.monotonic() + 100
    begun = []

    def begin(runs, ranks, rising=False):
        begun.append((runs, host.deadline - time.monotonic() < 10))
        for _ in runs:
            yield {"error": "broke"}

    host._each = begin
    groups = [[{"kind": "warm", "of": name}] for name in "ab"]
    host.beside(groups, 10)
    assert sorted(begun, key=str) == [(group, True) for group in groups] and host.deadline == over


def test_each_answer_comes_before_the_next_is_asked_for(tmp_path: Path):
    host = Host(2, False, False, False, tmp_path)
    begun = []

    def begin(runs, ranks, rising=False):
        for run in runs:
            begun.append(run["kind"])
            yield {"losses": run["kind"]}

    host._each = begin
    figures = host.each([{"kind": name} for name in "aba"])
    assert next(figures) == {"losses": "a"} and begun == ["a"]
    assert [found["losses"] for found in figures] == ["b", "a"]
    assert list(host.each([{"kind": "b"}])) == [{"losses": "b"}] and begun.count("b") == 1


def test_answers_are_kept_and_failures_but_not_what_had_no_time(tmp_path: Path):
    host = Host(2, False, True, False, tmp_path)
    answers = {"good": {"losses": [1.0]}, "bad": {"error": "broke"}, "late": {"error": f"not begun {LATE}"}}
    begun = []

    def begin(runs, ranks, rising=False):
        begun.extend((ranks, run["kind"]) for run in runs)
        return [answers[run["kind"]] for run in runs]

    host._each = begin
    runs = [{"kind": name} for name in answers]
    for _ in range(2):
        assert host.measure([run | {"after": ["x"]} for run in runs]) == list(answers.values())
    assert begun == [(2, "good"), (2, "bad"), (2, "late"), (2, "late")]
    host.measure(runs[:1], 1)
    assert begun[4:] == [(1, "good")]
    host.measure(runs[:1], rising=True)
    assert begun[5:] == [(2, "good")]


def test_a_job_that_neither_answers_nor_waits_is_stuck(tmp_path: Path):
    host = Host(2, False, True, False, tmp_path)
    host.patience = 30
    answers = tmp_path / "answers.jsonl"
    host._watch(tmp_path)  # has not begun
    answers.touch()
    host._watch(tmp_path)
    os.utime(answers, (0, time.time() - 31))
    with pytest.raises(Stuck):
        host._watch(tmp_path)
    host.deadline = time.monotonic()
    with pytest.raises(OutOfTime):
        host._watch(tmp_path)


def test_a_run_says_its_turn_and_waits_for_others_which_is_a_word(tmp_path: Path):
    answers, mine, other = tmp_path / "answers.jsonl", tmp_path / "mine", tmp_path / "other"
    answers.touch()
    os.utime(answers, (0, 0))
    run = {"folder": str(tmp_path / "0"), "says": str(mine), "after": [str(other)]}
    timer = threading.Timer(0.2, lambda: mine.exists() and other.touch())
    timer.start()
    await_turn(run, torch.device("cpu"))
    assert other.exists() and run["waited_s"] >= 0.1 and answers.stat().st_mtime > time.time() - 60
    alone = {"folder": str(tmp_path / "1")}
    await_turn(alone, torch.device("cpu"))
    assert alone["waited_s"] == 0


@pytest.mark.slow
def test_a_run_that_fails_or_hangs_leaves_the_others_their_answers(tmp_path: Path):
    host = Host(2, False, True, False, tmp_path)
    good = {"kind": "losses", "recipe": small(host, steps=1)}
    bad = {"kind": "losses", "recipe": small(host, steps=1, parallel={"tensor": 3})}
    found = host.measure([good, bad, good])
    assert len(found[0]["losses"]) == len(found[2]["losses"]) == 1
    assert "parallel" in found[1]["error"] and "RecipeError" in found[1]["error"]
    assert host.measure([bad, good], rising=True)[1] == {"error": "not begun"}
    host.deadline = time.monotonic() + 0.5
    other = {"kind": "losses", "recipe": small(host, steps=2)}
    late = host.measure([other, other])
    assert late == [{"error": "no answer within the limit"}, {"error": "not begun within the limit"}]
    assert host.chip == "CPU"


@pytest.mark.slow
def test_quick_runs_every_section_on_two_gloo_ranks_in_three_torchruns(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(multi, "QUICK_SECONDS", 600)
    monkeypatch.setattr(together, "PATIENCE", 300)
    monkeypatch.setattr(multi.signal, "signal", lambda *_: None)
    path = tmp_path / "found.json"
    status = command.main([*MULTI, "--quick", "--json", str(path), "--moe.top_k=1"])
    found = json.loads(path.read_text())
    assert status == 0, found["rows"]
    assert sorted(job["ranks"] for job in found["torchruns"]) == [1, 2, 2]
    for name in multi.SECTIONS:
        assert "equal" in {row["result"] for row in found["rows"] if row["section"] == name}
    assert {row["case"] for row in found["rows"] if row["result"] == "left out"} == {"hsdp", "LASP-2, gather"}
    assert "data parallel" in {row.get("of") for row in found["rows"]}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fsdp", "checkpoint", "kill"])
def test_a_section_alone_runs_on_two_gloo_ranks(name: str, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(multi.signal, "signal", lambda *_: None)
    path = tmp_path / "found.json"
    folder = tmp_path / "runs"
    arguments = ["--only", name, "--limit", "600", "--json", str(path), "--folder", str(folder)]
    status = command.main([*MULTI, *arguments, "--moe.top_k=1"])
    rows = json.loads(path.read_text())["rows"]
    assert status == 0, rows
    results = {row["case"]: row["result"] for row in rows}
    assert "equal" in results.values()
    assert all("speed" not in case or result == "timed" for case, result in results.items())
    logs = "".join(log.read_text() for log in folder.glob("*/log"))
    assert ("resumed from" in logs) == (name in ("checkpoint", "kill"))
