"""`python -m torchlinearmoe.train`: what a recipe may change when a run goes on, and mistakes told in one line."""

import json
import shlex
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import RankPool
from tiny_run import Settings, read_lines, run, settings, write_corpus

from torchlinearmoe.recipe import dump, load_recipe, resolve
from torchlinearmoe.train import main

SMALL: Settings = {
    "model": {"layout": "L", "num_layers": 2},
    "training": {"steps": 4, "tokens_per_step": 48},
    "checkpoint": {"interval": 2},
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


class Command:
    """The command on a recipe file that writes into `folder`."""

    def __init__(self, corpus: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.corpus, self.folder, self.capsys = corpus, folder, capsys
        self.recipe = folder.with_suffix(".toml")
        self.recipe.write_text(dump(resolve(settings(corpus, folder, SMALL))))

    def __call__(self, *overrides: str) -> list[dict[str, Any]]:
        """Train; the lines of metrics.jsonl."""
        assert main([str(self.recipe), *overrides]) == 0
        assert not dist.is_initialized()
        return read_lines(self.folder)

    def refused(self, *overrides: str) -> str:
        """The one line that a mistake is told in."""
        self.capsys.readouterr()
        with pytest.raises(SystemExit) as exit:
            main([str(self.recipe), *overrides])
        assert exit.value.code == 1
        assert not dist.is_initialized()
        (line,) = self.capsys.readouterr().err.splitlines()
        return line


@pytest.fixture
def command(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(corpus, tmp_path / "run", capsys)


@pytest.fixture(scope="module")
def trained(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of four steps."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    recipe = folder.with_suffix(".toml")
    recipe.write_text(dump(resolve(settings(corpus, folder, SMALL))))
    assert main([str(recipe)]) == 0
    return folder


@pytest.mark.parametrize(
    "key, value, was",
    [
        ("optimizer.weight_decay", "0.2", "0.1"),
        ("training.seed", "7", "0"),
        ("training.tokens_per_step", "96", "48"),
        ("model.num_layers", "3", "2"),
        ("moe.top_k", "1", "2"),
        ("mixer.hgrn2.conv", "4", "0"),
        ("data.validation_fraction", "0.2", "0.05"),
    ],
)
def test_a_changed_key_is_an_error_that_names_it(
    trained: Path, capsys: pytest.CaptureFixture[str], key: str, value: str, was: str
) -> None:
    before = (trained / "metrics.jsonl").read_bytes()
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit:
        main([str(trained.with_suffix(".toml")), "--training.steps=6", f"--{key}={value}"])
    assert exit.value.code == 1 and not dist.is_initialized()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {key} = {value}: the checkpoint to resume was made with {was};")
    assert (trained / "metrics.jsonl").read_bytes() == before


def test_steps_layout_metrics_and_checkpoints_may_change(command: Command) -> None:
    first = command()
    assert [line["step"] for line in first] == [1, 2, 3, 4]
    lines = command(
        "--training.steps=7",
        "--parallel.reshard_after_forward=false",
        "--metrics.interval=2",
        "--metrics.validation_interval=5",
        "--checkpoint.keep=1",
        "--checkpoint.asynchronous=false",
    )
    assert lines[:4] == first
    assert [(line["step"], "loss" in line) for line in lines[4:]] == [(5, False), (6, True), (7, True)]
    assert [path.name for path in (command.folder / "checkpoints").iterdir()] == ["step-7"]
    assert load_recipe(command.folder / "recipe.toml").training.steps == 7
    # Tokens may take the place of steps, and a finished run has nothing left to do.
    assert [line["step"] for line in command("--training.tokens=384")] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert len(command("--training.tokens=384")) == 8


def test_how_steps_are_computed_may_change_and_samples_stay(command: Command) -> None:
    """At four rows a step: other micro-batches, kernels, recomputation and workers train the same on."""
    four = ("--training.tokens_per_step=192", "--optimizer.schedule=constant", "--data.validation_fraction=0.3")
    whole = command(*four)
    forked = command.folder.with_name("forked")
    source, command.folder = command.folder / "checkpoints/step-2", forked
    lines = command(
        *four,
        f"--checkpoint.resume={source}",
        f"--training.output_dir={forked}",
        "--training.micro_batch_size=2",
        "--training.activation_checkpointing=full",
        "--model.kernel_backend=reference",
        "--moe.backend=loop",
        "--data.workers=1",
        f"--data.cache={forked.parent / 'elsewhere'}",
        "--training.deterministic=true",
        "--training.max_skipped_steps=2",
    )
    torch.use_deterministic_algorithms(False)
    assert [line["step"] for line in lines] == [3, 4]
    for key in ("loss", "grad_norm"):
        assert [line[key] for line in lines] == pytest.approx([line[key] for line in whole[2:]], rel=1e-5)
    told = command.capsys.readouterr().out
    assert "from here on" not in told

    told = command.refused(*four, f"--checkpoint.resume={source}", "--training.micro_batch_size=4", "--moe.top_k=1")
    assert told.startswith("error: moe.top_k = 1: ")


def test_learning_rate_and_clip_change_with_a_line_each(command: Command) -> None:
    command("--training.steps=2")
    command.capsys.readouterr()
    lines = command("--training.steps=8", "--optimizer.lr=0.002", "--optimizer.clip_norm=0.25")
    told = command.capsys.readouterr().out
    assert "optimizer.lr = 0.002 from here on, 0.001 before" in told
    assert "optimizer.clip_norm = 0.25 from here on, 1.0 before" in told
    assert "the cosine schedule of 2 steps is begun again after its end to 8" in told
    assert lines[2]["lr"] > 1.8e-3


def test_a_run_that_says_no_tokens_a_step_keeps_those_of_its_checkpoint(
    ranks: RankPool, command: Command, corpus: Path
) -> None:
    tables = settings(corpus, command.folder, SMALL, {"training": {"tokens_per_step": None, "steps": 2}})
    command.recipe.write_text(dump(resolve(tables)))
    two = {**tables, "training": {**tables["training"], "tokens_per_step": 96}}
    ranks(2, run, two)
    lines = command("--training.steps=3")
    assert [(line["step"], line["tokens"]) for line in lines] == [(1, 96), (2, 192), (3, 288)]
    assert load_recipe(command.folder / "recipe.toml").training.tokens_per_step == 96
    told = command.refused("--training.micro_batch_size=4")
    assert "tokens_per_step = 96: must be a multiple of" in told and "it is the checkpoint's: take a smaller" in told


def test_a_finished_run_says_so_and_touches_nothing(command: Command) -> None:
    command()
    last = command.capsys.readouterr().out.splitlines()[-1]
    name, *prompt = shlex.split(last.partition("torchlinearmoe.generate ")[2])
    first = json.loads(command.corpus.read_text().splitlines()[0])["text"]
    checkpoint = command.folder / "checkpoints/step-4"
    assert (Path(name), prompt[0]) == (checkpoint, "--prompt") and checkpoint.is_dir()
    assert prompt[1] and first.startswith(prompt[1])
    files = {path: path.stat().st_mtime_ns for path in command.folder.rglob("*") if path.is_file()}
    for steps in (4, 3):
        assert main([str(command.recipe), f"--training.steps={steps}", "--metrics.baselines=true"]) == 0
        said = command.capsys.readouterr().out.splitlines()
        assert said[0].startswith(f"all {steps} steps are done; more of them, training.steps or training.tokens, go on")
        assert said[1:] == [f"checkpoint: {checkpoint}", f"next: python -m torchlinearmoe.generate {checkpoint}"]
    assert files == {path: path.stat().st_mtime_ns for path in command.folder.rglob("*") if path.is_file()}
    other = command.folder.with_name("other")
    assert main([str(command.recipe), f"--checkpoint.resume={checkpoint}", f"--training.output_dir={other}"]) == 0
    assert f"checkpoint: {checkpoint}" in command.capsys.readouterr().out
    assert list(other.iterdir()) == []


def test_never_refuses_a_used_folder_and_latest_goes_on_in_it(command: Command) -> None:
    first = command("--checkpoint.resume=never")
    assert "checkpoint.resume = 'never'" in command.refused("--checkpoint.resume=never", "--training.steps=5")
    assert command("--training.steps=5")[:4] == first


def test_a_moved_folder_goes_on(command: Command) -> None:
    first = command()
    moved = command.folder.rename(command.folder.with_name("moved"))
    command.folder = moved
    assert command(f"--training.output_dir={moved.parent}/./moved", "--training.steps=5")[:4] == first


def test_a_path_goes_on_from_that_checkpoint_in_a_folder_of_its_own(command: Command) -> None:
    first = command()
    other = command.folder.with_name("other")
    source = command.folder / "checkpoints/step-2"
    command.folder = other
    lines = command(f"--checkpoint.resume={source}", f"--training.output_dir={other}")
    compared = ("step", "loss", "grad_norm", "lr", "tokens")
    assert [[line[key] for key in compared] for line in lines] == [
        [line[key] for key in compared] for line in first[2:]
    ]
    key = "optimizer.weight_decay"
    fresh = f"--training.output_dir={other}-2"
    assert command.refused(f"--checkpoint.resume={source}", fresh, f"--{key}=0.5").startswith(f"error: {key} = 0.5")
    assert "nowhere" in command.refused(f"--checkpoint.resume={other}/nowhere", fresh)


def test_a_run_without_a_checkpoint_starts_afresh(command: Command) -> None:
    first = command("--training.steps=2", "--checkpoint.interval=0", "--optimizer.schedule=constant")
    for path in (command.folder / "checkpoints").iterdir():
        path.rename(path.with_suffix(".tmp"))  # as a kill before the end of its save leaves it
    again = command("--training.steps=2", "--checkpoint.interval=0", "--optimizer.schedule=constant")
    assert [(line["step"], line["loss"]) for line in again] == [(line["step"], line["loss"]) for line in first]


def test_tokens_say_how_long_and_how_long_to_warm_up(command: Command) -> None:
    lines = command("--training.tokens=200", "--optimizer.warmup_tokens=140", "--optimizer.schedule=constant")
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]  # 200 tokens are 4.2 steps of 48
    assert [line["tokens"] for line in lines] == [48, 96, 144, 192, 240]
    assert [line["lr"] for line in lines] == pytest.approx([1e-3 / 3, 2e-3 / 3, 1e-3, 1e-3, 1e-3])  # 2.9 steps


@pytest.mark.parametrize(
    "overrides, told",
    [
        (["--training.stepz=3"], "training.stepz: unknown key; did you mean 'steps'?"),
        (["--model.mixer=hgrn3"], "model.mixer = 'hgrn3': unknown mixer"),
        (["--training.tokens_per_step=50"], "training.tokens_per_step = 50: must be a multiple of"),
        (["--parallel.data_shard=2"], "parallel.data_shard = 2: the degrees multiply to 2, not to 1 ranks"),
        (["--parallel.data_replicate=2"], "data_replicate x context x tensor = 2 does not divide 1 ranks"),
        (["--data.paths=['/nowhere.jsonl']"], "data.paths: '/nowhere.jsonl' does not exist"),
        (["--data.tokenizer=/nowhere"], "data.tokenizer = '/nowhere'"),
        (["--mixer.gla.conv=2"], "mixer.gla.conv = 2: no layer runs gla; in use: "),
        (["--metrics.profile_steps=[5, 9]"], "metrics.profile_steps = [5, 9]: the run ends with step 4; name an earl"),
        (["--metrics.memory_snapshot_step=5"], "metrics.memory_snapshot_step = 5: the run ends with step 4"),
        (["--metrics.profile_steps=[3, 3]", "--training.tokens=96"], "the run ends with step 2"),
        (["--model.vocab_size=100"], "model.vocab_size = 100 is smaller than"),
        (["--training.sequence_length=100000", "--training.tokens_per_step=100000"], "training.sequence_length = 1000"),
    ],
)
def test_a_mistake_is_one_line(command: Command, overrides: list[str], told: str) -> None:
    line = command.refused(*overrides)
    assert line.startswith("error: ") and told in line
    assert not (command.folder / "metrics.jsonl").exists()


def test_a_recipe_that_cannot_be_read_is_one_line(command: Command) -> None:
    command.recipe.write_text("[model\n")
    assert f"{command.recipe}: not valid TOML" in command.refused()
    command.recipe.unlink()
    assert f"{command.recipe}: cannot be read" in command.refused()


def test_a_run_that_stays_broken_exits_with_one_line(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchlinearmoe.parallel.passes import Loop

    run, steps = Loop.forward_backward, count()
    monkeypatch.setattr(
        Loop, "forward_backward", lambda self, *args: run(self, *args) * (1 if next(steps) < 2 else float("nan"))
    )
    line = command.refused("--training.max_skipped_steps=2")
    assert line.startswith("error: 2 steps in a row had a loss or gradient that is not finite, first bad:")
    assert line.endswith(f"last good checkpoint: {command.folder}/checkpoints/step-2")
    monkeypatch.undo()
    assert [line["step"] for line in command("--training.max_skipped_steps=2")] == [1, 2, 3, 4]


@pytest.mark.parametrize("bad, saved", [({1, 2, 3, 4}, []), ({3, 4}, ["step-2"])], ids=str)
def test_a_run_whose_last_steps_were_not_finite_ends_badly_and_keeps_the_last_good_checkpoint(
    command: Command, monkeypatch: pytest.MonkeyPatch, bad: set[int], saved: list[str]
) -> None:
    _spoil(monkeypatch, bad)
    line = command.refused("--checkpoint.interval=1", "--checkpoint.keep=1")
    assert line.startswith(f"error: {len(bad)} steps in a row had a loss or gradient that is not finite, first bad:")
    checkpoints = command.folder / "checkpoints"
    assert line.endswith(f"last good checkpoint: {checkpoints / saved[0] if saved else 'none yet'}")
    assert [path.name for path in checkpoints.glob("*")] == saved


def test_one_last_step_that_was_not_finite_is_told_and_costs_nothing_else(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    _spoil(monkeypatch, {4})
    assert command()[-1]["skipped_steps"] == 1
    assert "the last step had a loss or gradient that is not finite" in command.capsys.readouterr().out
    assert (command.folder / "checkpoints/step-4").is_dir()
    _spoil(monkeypatch, {1})
    command.folder = command.folder.with_name("short")
    assert command.refused("--training.steps=1", f"--training.output_dir={command.folder}").startswith("error: 1 steps")


def _spoil(monkeypatch: pytest.MonkeyPatch, bad: set[int]) -> None:
    """Losses that are not finite in those steps of the next run."""
    from torchlinearmoe.parallel.passes import Loop

    monkeypatch.undo()
    run, steps = Loop.forward_backward, count(1)
    factor = {True: float("nan"), False: 1}
    monkeypatch.setattr(Loop, "forward_backward", lambda self, *args: run(self, *args) * factor[next(steps) in bad])


def test_the_start_tells_the_data_and_how_often_they_are_read(command: Command) -> None:
    command("--training.steps=2")
    told = command.capsys.readouterr().out.splitlines()[1]
    assert told.startswith("59 documents of ") and "; tokenizer bpe-1024.tiktoken; in " in told
    assert "0.022 epochs" in told and told.endswith(str(command.folder))
    short = command.folder.parent / "short.jsonl"
    short.write_text(json.dumps({"text": "so few words to be read again and again " * 6}))
    command.folder = command.folder.with_name("often")
    command(f"--data.paths=['{short}']", "--data.validation_fraction=0", f"--training.output_dir={command.folder}",
            "--training.steps=40")  # fmt: skip
    told = command.capsys.readouterr().out
    assert "beyond 4 epochs repeated text teaches less; bring more in data.paths, or take fewer steps" in told


def test_a_single_book_trains_without_validation_or_with_its_last_tokens_held_out(command: Command) -> None:
    book = command.folder.parent / "book.txt"
    book.write_text("It was the best of times, it was the worst of times. " * 200)
    paths = (f"--data.paths=['{book}']", "--training.steps=2")
    assert "validation_split = 'tokens'" in command.refused(*paths)
    lines = command(*paths, "--data.validation_fraction=0")
    assert [line["step"] for line in lines] == [1, 2] and "validation_loss" not in lines[-1]
    command.folder = command.folder.with_name("split")
    lines = command(*paths, "--data.validation_split=tokens", f"--training.output_dir={command.folder}")
    assert lines[-1]["validation_loss"] > 0
    told = command.refused("--data.validation_fraction=0", "--metrics.baselines=true")
    assert told == "error: metrics.baselines = True: not read; it needs data.validation_fraction above 0"
    told = command.refused("--data.format=messages", "--data.validation_split=tokens")
    assert "conversations are held out whole" in told


def test_what_the_recipe_says_in_vain_is_told_before_the_run(command: Command) -> None:
    command("--optimizer.warmup_steps=8")
    out = command.capsys.readouterr().out
    assert "optimizer.warmup_steps = 8: longer than the run, which ends at 50% of optimizer.lr = 0.001" in out


def test_float8_that_cannot_be_is_refused_before_the_data_is_read(command: Command) -> None:
    asked = (f"--data.paths=['{command.folder}/no-such-file.jsonl']", "--training.float8=rowwise")
    line = command.refused(*asked, "--training.sequence_length=48", "--model.hidden_size=64")
    assert line.startswith("error: training.float8 = 'rowwise': ") and line.endswith(
        ", or set training.float8 = 'none'"
    )
    assert "it needs a GPU, training runs on the cpu" in line or "torchao cannot be imported" in line
    line = command.refused(*asked, "--training.sequence_length=24")
    assert "24 tokens of a micro-batch and context-parallel rank are no multiple of 16" in line


def test_a_backend_that_cannot_compute_is_refused_before_the_data_is_read(command: Command) -> None:
    missing = f"--data.paths=['{command.folder}/no-such-file.jsonl']"
    line = command.refused(missing, "--model.layout=LN", "--model.attention_backend=varlen")
    assert line.startswith("error: model.attention_backend = 'varlen': cannot compute attention (packed): it needs a ")
    assert line.endswith("; use 'auto' or 'sdpa'")
    assert "no-such-file" in command.refused(missing, "--model.layout=L", "--model.attention_backend=varlen")
    line = command.refused(missing, "--moe.hidden_size=63", "--moe.backend=grouped_mm")
    assert line == (
        "error: moe.backend = 'grouped_mm': cannot compute grouped_mm: its rows are whole multiples of 16 bytes; "
        "make their widths multiples of 4, use 'auto' or 'loop'"
    )
