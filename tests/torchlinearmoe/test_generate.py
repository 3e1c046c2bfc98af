"""Decoding gives what the full forward gives, and the command turns checkpoints into text."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from torchlinearmoe import build_model
from torchlinearmoe.checkpoint import CheckpointManager
from torchlinearmoe.checkpoint.model import load_model, model_files
from torchlinearmoe.data.tokenizer import load_tokenizer
from torchlinearmoe.errors import UserError
from torchlinearmoe.generate import main
from torchlinearmoe.generation import Sampling, cast_weights, decode, generate, state_bytes
from torchlinearmoe.generation.sampling import choose
from torchlinearmoe.models.decoder import Decoder
from torchlinearmoe.recipe import Recipe, resolve

MODELS = ["linear_attention/L", "gated_delta_net/LN", "hgrn2/LLLN"]


def recipe_of(kind: str, **model: object) -> Recipe:
    mixer, layout = kind.split("/")
    model = {"mixer": mixer, "layout": layout, "num_layers": max(2, len(layout)), "init_std": 0.2} | model
    return resolve({"model": model, "training": {"steps": 1}})


def build(kind: str, seed: int = 0, **model: object) -> Decoder:
    return build_model(recipe_of(kind, **model).model, seed).eval()


def prompts_of(lengths: list[int], vocab: int = 1024) -> list[list[int]]:
    return [torch.randint(vocab, (n,)).tolist() for n in lengths]


@torch.no_grad()
def greedy_by_full_forward(model: Decoder, prompt: list[int], count: int, vocab: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(model(torch.tensor([tokens]))[0, -1, :vocab].argmax()))
    return tokens[len(prompt) :]


def rows(items: list[list[int | None]], row: int) -> list[int]:
    return [item[row] for item in items if item[row] is not None]  # type: ignore[misc]


@pytest.mark.parametrize("kind", MODELS)
def test_greedy_is_the_argmax_of_the_full_forward(kind: str) -> None:
    torch.manual_seed(1)
    model = build(kind).double()
    (prompt,) = prompts_of([9])
    out = rows(list(generate(model, [prompt], 12, vocab_size=900)), 0)
    assert out == greedy_by_full_forward(model, prompt, 12, 900)
    assert len(set(out)) > 3  # not a constant that anything would give


@pytest.mark.parametrize("kind", MODELS)
def test_unequal_prompts_together_equal_each_alone(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(2)
    model = build(kind).double()
    prompts = prompts_of([7, 1, 23])
    together = list(generate(model, prompts, 8))
    alone = [rows(list(generate(model, [prompt], 8)), 0) for prompt in prompts]
    assert [rows(together, row) for row in range(3)] == alone
    # The same when the prompts are read in pieces, of which the shorter ones miss some.
    monkeypatch.setattr(decode, "PREFILL_LOGITS", 3 * 1024 * 5)
    assert list(generate(model, prompts, 8)) == together


def test_a_sequence_stops_alone_and_the_padding_is_never_chosen() -> None:
    torch.manual_seed(3)
    model = build("linear_attention/L").double()
    prompts = prompts_of([5, 6])
    first, second = (rows(list(generate(model, prompts, 10)), row) for row in (0, 1))
    stop = next(token for token in first if token not in second)
    items = list(generate(model, prompts, 10, stop={stop}))
    assert rows(items, 0) == first[: first.index(stop)] and rows(items, 1) == second
    used = max(second)
    assert max(rows(list(generate(model, prompts, 10, vocab_size=used)), 1)) < used
    wild = Sampling(temperature=50.0)
    assert max(rows(list(generate(model, prompts, 40, sampling=wild, vocab_size=17)), 0)) < 17


def test_draws_repeat_with_the_seed_and_differ_without() -> None:
    torch.manual_seed(4)
    model = build("linear_attention/L")
    prompts = prompts_of([5, 6])

    def drawn(seed: int) -> list[list[int | None]]:
        return list(generate(model, prompts, 12, sampling=Sampling(temperature=1.0, seed=seed)))

    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)


def test_draws_follow_the_tempered_and_cut_distribution() -> None:
    logits = torch.tensor([0.5, 0.1, 0.3, 0.1]).log().expand(20000, 4)
    generator = torch.Generator().manual_seed(0)

    def shares(**options: Any) -> torch.Tensor:
        drawn = choose(logits, Sampling(**options), generator)
        return torch.bincount(drawn, minlength=4) / len(drawn)

    def close(actual: torch.Tensor, expected: list[float]) -> bool:
        return torch.allclose(actual, torch.tensor(expected), atol=0.02) and bool(
            (actual[torch.tensor(expected) == 0] == 0).all()
        )

    assert close(shares(temperature=1.0), [0.5, 0.1, 0.3, 0.1])
    assert close(shares(temperature=0.5), [25 / 36, 1 / 36, 9 / 36, 1 / 36])
    assert close(shares(temperature=1.0, top_k=2), [0.625, 0, 0.375, 0])
    assert close(shares(temperature=1.0, top_p=0.6), [0.625, 0, 0.375, 0])  # the token that crosses is in
    assert close(shares(temperature=1.0, top_p=1e-9), [1.0, 0, 0, 0])
    assert close(shares(), [1.0, 0, 0, 0])


def test_next_to_no_temperature_draws_the_most_probable() -> None:
    logits = torch.randn(64, 30, generator=torch.Generator().manual_seed(2))
    for temperature in (1e-320, 1e-40, 1e-6):
        drawn = choose(logits, Sampling(temperature=temperature), torch.Generator().manual_seed(1))
        assert torch.equal(drawn, logits.argmax(-1))


def test_an_id_that_is_none_is_named() -> None:
    model = build("hgrn2/LN")
    last = model.recipe.vocab_size - 1
    for wrong in (-1, last + 1, 10**12):
        told = f"{wrong} is no id; they go from 0 to {last}"
        with pytest.raises(ValueError, match=f"tokens: {told}"):
            model(torch.tensor([[0, wrong]]))
        with pytest.raises(ValueError, match=f"tokens: {told}"):
            model.prefill(torch.tensor([[0, wrong]]), model.init_state(1))
        with pytest.raises(ValueError, match=f"tokens: {told}"):
            model.step(torch.tensor([wrong]), model.init_state(1))
        with pytest.raises(ValueError, match=f"prompts: {told}"):
            generate(model, [[0, wrong]], 3)


def test_output_that_is_not_utf_8_spells_letters_out(checkpoint: Path) -> None:
    options = ["--prompt", "Zo\u00eb", "--max-tokens", "2", "--device", "cpu"]
    command = [sys.executable, "-m", "torchlinearmoe.generate", str(checkpoint), *options]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    done = subprocess.run(command, capture_output=True, timeout=60, env=environment)
    assert done.returncode == 0 and done.stdout.startswith(b"Zo\\xeb"), done


def test_the_state_of_linear_layers_has_one_size() -> None:
    torch.manual_seed(5)
    linear, hybrid = build("hgrn2/L", max_length=16), build("hgrn2/LN", max_length=4096)
    short, long = prompts_of([3]), prompts_of([300])
    sizes = {}
    for name, model in (("linear", linear), ("hybrid", hybrid)):
        for length, prompt in (("short", short), ("long", long)):
            generation = generate(model, prompt, 4)
            list(generation)
            sizes[name, length] = state_bytes(generation.state)
    # 2 layers of 4 heads of 16 x 16 in float32, beyond model.max_length too
    assert sizes["linear", "short"] == sizes["linear", "long"] == 2 * 4 * 16 * 16 * 4
    # 297 tokens more of keys and values of 2 heads of 16 in one layer
    assert sizes["hybrid", "long"] - sizes["hybrid", "short"] == 297 * 2 * 2 * 16 * 4


def test_what_has_no_room_or_no_meaning_is_refused() -> None:
    model = build("hgrn2/LN", max_length=32)
    assert len(list(generate(model, prompts_of([20]), 12))) == 12
    with pytest.raises(UserError, match=r"max_tokens = 13: .* model.max_length = 32; at most 12 fit"):
        generate(model, prompts_of([20]), 13)
    for prompts, count in (([], 4), ([[1], []], 4), ([[1]], 0)):
        with pytest.raises(UserError):
            generate(model, prompts, count)
    wrongs: list[dict[str, Any]] = [{"temperature": -1.0}, {"temperature": float("nan")}, {"top_k": -1}]
    for wrong in [*wrongs, {"top_p": 0.0}, {"top_p": 1.5}]:
        with pytest.raises(UserError, match=next(iter(wrong))):
            Sampling(**wrong)
    for name, value in {"top_k": 5, "top_p": 0.9}.items():
        with pytest.raises(UserError, match=rf"^{name} = {value}: at temperature 0, greedy, nothing is drawn; give "):
            Sampling(**{name: value})


def test_a_cast_model_keeps_decays_routers_and_bounds_in_float32() -> None:
    model = build("gated_delta_net/L")
    cast_weights(model, torch.bfloat16)
    types = {name: parameter.dtype for name, parameter in model.named_parameters()}
    kept = {name.rpartition(".")[0].rpartition(".")[2] for name, dtype in types.items() if dtype == torch.float32}
    cast = {name.rpartition(".")[2] for name, dtype in types.items() if dtype == torch.bfloat16}
    assert "router" in kept and len(kept) == 2  # and the decay
    assert not {"A_log", "dt_bias"} & cast and {"gate_up", "down"} <= cast
    out = rows(list(generate(model, [[1, 2, 3]], 5)), 0)
    assert len(out) == 5


# ---------------------------------------------------------------------------------------------------------------------
# the command


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    recipe = recipe_of("hgrn2/LN", max_length=256, vocab_size=1100)
    manager = CheckpointManager(folder, keep=1)
    files = model_files(recipe, load_tokenizer())
    manager.save(1, build_model(recipe.model, 7), None, {}, files, blocking=True)
    return folder / "step-1"


def expected_text(checkpoint: Path, text: str, count: int) -> str:
    tokenizer, model = load_tokenizer(), load_model(checkpoint)
    prompt = [tokenizer.end_of_text, *tokenizer.encode(text)]
    ids = greedy_by_full_forward(model, prompt, count, tokenizer.vocab_size)
    assert tokenizer.end_of_text not in ids
    return tokenizer.decode(ids)


def test_the_command_writes_prompt_and_continuation(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = ["In the beginning", "And"]
    expected = {text: expected_text(checkpoint, text, 20) for text in texts}
    common = [str(checkpoint), "--max-tokens", "20", "--device", "cpu"]
    assert main([*common, "--prompt", texts[0]]) == 0
    out, err = capsys.readouterr()
    assert out == texts[0] + expected[texts[0]] + "\n"
    assert "20 tokens" in err and "tokens/s" in err and "bytes" in err
    assert main([*common, "--prompt", texts[0], "--prompt", texts[1], "--hide-prompt"]) == 0
    assert capsys.readouterr().out == f"{expected[texts[0]]}\n\n{expected[texts[1]]}\n"
    drawn = [*common, "--prompt", texts[0], "--temperature", "1", "--seed", "3"]
    assert main([*drawn, "--greedy"]) == 0
    assert capsys.readouterr().out == out
    assert main(drawn) == 0
    assert capsys.readouterr().out != out


def test_a_runs_folder_stands_for_its_newest_sound_checkpoint(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    run = tmp_path / "run"
    shutil.copytree(checkpoint, run / "checkpoints" / "step-1")
    shutil.copy(checkpoint / "recipe.toml", run / "recipe.toml")
    shutil.copytree(checkpoint, run / "checkpoints" / "step-2.tmp")
    common = ["--max-tokens", "5", "--device", "cpu", "--prompt", "And"]
    assert main([str(run), *common]) == 0
    assert capsys.readouterr().out == "And" + expected_text(checkpoint, "And", 5) + "\n"
    assert "step-1 is taken instead" in caplog.text
    (run / "checkpoints" / "step-1" / "state.json").write_text("{")
    with pytest.raises(SystemExit):
        main([str(run), *common])
    assert capsys.readouterr().err == f"error: {run / 'checkpoints'}: holds no complete checkpoint yet\n"


def test_the_command_reads_standard_input(checkpoint: Path) -> None:
    command = [sys.executable, "-m", "torchlinearmoe.generate", str(checkpoint), "--prompt", "-", "--max-tokens", "5"]
    done = subprocess.run(
        [*command, "--device", "cpu"], input="And he said\n", capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "And he said" + expected_text(checkpoint, "And he said", 5) + "\n"


@pytest.mark.parametrize(
    "arguments, told",
    [
        (["{missing}", "--prompt", "a"], "not a checkpoint"),
        (["{checkpoint}", "--prompt", ""], "--prompt: the text is empty"),
        (["{checkpoint}", "--prompt", "a", "--max-tokens", "400"], "model.max_length = 256"),
        (["{checkpoint}", "--prompt", "a", "--max-tokens", "0"], "max_tokens = 0"),
        (["{checkpoint}", "--prompt", "a", "--temperature", "1", "--seed", "1" + "0" * 23], "seed = 1000"),
        (["{checkpoint}", "--prompt", "a", "--top-p", "2"], "top_p = 2.0"),
        (["{checkpoint}", "--prompt", "a", "--top-k", "5"], "top_k = 5: at temperature 0, greedy, nothing is drawn"),
    ],
)
def test_a_mistake_is_one_line(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], told: str
) -> None:
    places = {"missing": tmp_path / "no-such", "checkpoint": checkpoint}
    with pytest.raises(SystemExit) as stopped:
        main([argument.format(**places) for argument in arguments] + ["--device", "cpu"])
    out, err = capsys.readouterr()
    assert stopped.value.code == 1 and out == ""
    assert err.count("\n") == 1 and err.startswith("error: ") and told in err
