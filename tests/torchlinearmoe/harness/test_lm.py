"""A model asked by lm-eval gives the numbers that lm-eval's own `hf` model gives for what `convert to-hf` wrote."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from byte_tokenizer import END, write_byte_tokenizer

pytest.importorskip("lm_eval", reason="the extra eval is not installed")
pytest.importorskip("accelerate", reason="lm-eval's hf model needs it")

import transformers
from lm_eval.api.instance import Instance  # pyright: ignore[reportMissingImports]
from lm_eval.models.huggingface import HFLM  # pyright: ignore[reportMissingImports]

from torchlinearmoe import build_model
from torchlinearmoe.checkpoint import CheckpointManager
from torchlinearmoe.checkpoint.huggingface.exporting import export_checkpoint
from torchlinearmoe.checkpoint.model import load_model, model_files
from torchlinearmoe.data.tokenizer import load_tokenizer
from torchlinearmoe.harness.lm import LinearMoELM
from torchlinearmoe.recipe import resolve

MODELS = {
    "transformers' own Qwen2-MoE": {"layout": "N"},
    "a hybrid by trust_remote_code": {"mixer": "gated_delta_net", "layout": "LN"},
}
LENGTH = 48
TEXT = "And the Word was made flesh, and dwelt among us, (and we beheld his glory,) full of grace and truth. "


@pytest.fixture(scope="module", params=MODELS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[LinearMoELM, Any]:
    """Ours of a checkpoint, and lm-eval's `hf` of its export."""
    folder = tmp_path_factory.mktemp("pair")
    file = write_byte_tokenizer(folder / "tokenizer")
    table = {"num_layers": 2, "vocab_size": 257, "init_std": 0.2, "max_length": LENGTH, **MODELS[request.param]}
    recipe = resolve({"model": table, "data": {"tokenizer": str(file)}, "training": {"steps": 1}})
    tokenizer = load_tokenizer(file)
    model = build_model(recipe.model, 1).eval()
    checkpoints = CheckpointManager(folder / "checkpoints", keep=1)
    extra = {"tokens": 0, "skipped_steps": 0}
    checkpoints.save(1, model, None, extra, model_files(recipe, tokenizer), blocking=True)
    source = folder / "checkpoints" / "step-1"
    export_checkpoint(source, folder / "exported")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        folder / "exported", trust_remote_code=True, dtype=torch.float32
    )
    fast = transformers.PreTrainedTokenizerFast(tokenizer_file=str(file), eos_token=END, pad_token=END)
    make: Any = HFLM
    hf = make(pretrained=theirs, tokenizer=fast, device="cpu", batch_size=2, max_length=LENGTH)
    return LinearMoELM(load_model(source), tokenizer, batch_tokens=200), hf


def requests(kind: Any, arguments: list[tuple[Any, ...]]) -> list[Instance]:
    return [Instance(kind, {}, given, index) for index, given in enumerate(arguments)]


def test_loglikelihoods_are_those_of_hf(pair: tuple[LinearMoELM, Any]) -> None:
    ours, hf = pair
    asked = [
        ("", "In the beginning"),
        ("short", " one"),
        ("a trailing space ", "moves"),
        *(("Which of these is said of the Word?", choice) for choice in (" a", " full of grace", " was made flesh")),
        (TEXT, " longer than the model reads"),
    ]
    found = ours.loglikelihood(requests("loglikelihood", asked))
    expected = hf.loglikelihood(requests("loglikelihood", asked), disable_tqdm=True)
    assert [score for score, _ in found] == pytest.approx([score for score, _ in expected], abs=1e-4)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert len({round(score, 3) for score, _ in found}) == len(asked)


def test_rolling_loglikelihoods_are_those_of_hf(pair: tuple[LinearMoELM, Any]) -> None:
    ours, hf = pair
    asked = [(TEXT[:20],), (TEXT * 2,), (TEXT[:LENGTH],), (TEXT[: LENGTH + 1],)]
    found = ours.loglikelihood_rolling(requests("loglikelihood_rolling", asked))
    expected = hf.loglikelihood_rolling(requests("loglikelihood_rolling", asked), disable_tqdm=True)
    assert found == pytest.approx(expected, abs=1e-4 * len(TEXT))
    assert found == pytest.approx(expected, rel=1e-5)


def test_generated_texts_are_those_of_hf(pair: tuple[LinearMoELM, Any]) -> None:
    ours, hf = pair
    free = {"until": [], "max_gen_toks": 10, "do_sample": False}
    prompts = ["In the", "And the Word", "a", TEXT]
    plain = ours.generate_until(requests("generate_until", [(prompt, free) for prompt in prompts]))
    # One that says something readable is stopped at it.
    stops = sorted({text[4] for text in plain if len(text) > 4 and text[4].isascii()}) or ["e"]
    asked = [(prompt, {**free, "until": until}) for until in ([], stops) for prompt in prompts]
    found = ours.generate_until(requests("generate_until", asked))
    expected = hf.generate_until(requests("generate_until", asked), disable_tqdm=True)
    assert found == expected and len(set(found[:4])) == 4


def test_sampling_and_lengths_are_read_from_the_task(pair: tuple[LinearMoELM, Any]) -> None:
    ours, _ = pair
    drawn = {"until": [], "max_new_tokens": 3, "do_sample": True, "temperature": 5.0, "top_k": 200}
    greedy = {"until": [], "max_new_tokens": 3}
    asked = [("In the", drawn), ("In the", greedy), ("In the", greedy | {"max_new_tokens": 1})]
    first, second, third = ours.generate_until(requests("generate_until", asked))
    assert first != second and second.startswith(third) and len(third) <= 1
    with pytest.raises(ValueError, match="max_gen_toks = 48: must be below the 48 tokens that the model reads"):
        ours.generate_until(requests("generate_until", [("x", {"max_gen_toks": LENGTH})]))
