"""Sections fail alone, the table and the JSON tell everything, and no process outlives its section."""

import json
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from torchlinearmoe.benchmark import __main__ as command
from torchlinearmoe.benchmark import multi
from torchlinearmoe.benchmark.multi.host import Host, Job, OutOfTime, descendants
from torchlinearmoe.benchmark.multi.models import small
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
    modules = {name: SimpleNamespace(run=run, LIMIT=10) for name, run in fakes.items()}
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
    assert "ranks 2" in out and "sound" in out and "1e-07" in out and "hidden" not in out


def test_one_section_alone_that_succeeds_is_status_0(sections):
    assert command.main([*MULTI, "--only", "pipeline"]) == 0


def test_what_quick_has_no_time_for_is_left_out(sections, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(multi, "QUICK_SECONDS", -1)
    assert command.main([*MULTI, "--quick", "--json", str(tmp_path / "found.json")]) == 0
    rows = json.loads((tmp_path / "found.json").read_text())["rows"]
    assert {row["result"] for row in rows} == {"left out"} and len(rows) == 3


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

    def _measure(self, runs, ranks, rising=False):
        found = []
        for run in runs:
            run["recipe"]["training"].setdefault("output_dir", "runs/x")
            recipe = resolve(run["recipe"])
            degrees = resolve_degrees(recipe.parallel, ranks)
            recipe = with_tokens_per_step(recipe, tokens_per_step(recipe.training, degrees))
            check_micro_batches(recipe, degrees)
            if degrees.pipeline > 1:
                stage_layers(recipe)
            per_rank = tokens_per_step(recipe.training, degrees) / ranks
            found.append(
                {
                    "losses": [7.0] * recipe.training.total_steps,
                    "gradients": {"a": 1.0},
                    "grad_norms": [1.0] * recipe.training.total_steps,
                    "tokens_per_second_per_gpu": per_rank,
                    "hidden_share": 0.5,
                    "resumed": 0,
                }
            )
        return found


@pytest.mark.parametrize("ranks", multi.RANKS)
@pytest.mark.parametrize("name", [name for name in multi.SECTIONS if name not in ("checkpoint", "kill")])
def test_every_recipe_for_gpus_is_legal_and_gives_each_rank_as_many_tokens(name: str, ranks: int, tmp_path: Path):
    host = Checked(ranks, True, False, True, tmp_path)
    rows = multi.section(host, name, None, float("inf"))
    assert not [row for row in rows if row["result"] == "failed"], rows
    cases = {row["case"]: row for row in rows}
    assert ("hsdp, speed" in cases) == (name == "fsdp" and ranks >= 4)
    assert all(row["share"] == 1 for row in rows if "share" in row)
    longest = [row["tokens"] for case, row in cases.items() if case.endswith("longest")]
    assert longest == ([2**20] * 2 if name == "context" else [])


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
    late = host.measure([good, good])
    assert late == [{"error": "no answer within the limit"}, {"error": "not begun within the limit"}]
    assert host.chip == "CPU"


@pytest.mark.slow
@pytest.mark.parametrize("name", list(multi.SECTIONS))
def test_every_section_runs_on_two_gloo_ranks(name: str, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(multi, "QUICK_SECONDS", 600)
    monkeypatch.setattr(multi.signal, "signal", lambda *_: None)
    path = tmp_path / "found.json"
    folder = tmp_path / "runs"
    arguments = ["--quick", "--only", name, "--limit", "600", "--json", str(path), "--folder", str(folder)]
    status = command.main([*MULTI, *arguments, "--moe.top_k=1"])
    rows = json.loads(path.read_text())["rows"]
    assert status == 0, rows
    results = {row["case"]: row["result"] for row in rows}
    assert "equal" in results.values()
    assert all("speed" not in case or result == "timed" for case, result in results.items())
    logs = "".join(log.read_text() for log in folder.glob("*/log"))
    assert ("resumed from" in logs) == (name in ("checkpoint", "kill"))
