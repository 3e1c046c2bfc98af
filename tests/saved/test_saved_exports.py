"""Hugging Face directories that earlier versions exported load: here, as initial weights, and by transformers."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from saved_run import HERE, PROMPTS, expected, last_logits, unpack

from torchlinearmoe import build_model, load_model
from torchlinearmoe.checkpoint.huggingface.own import ARCHITECTURE
from torchlinearmoe.checkpoint.initial import InitialWeights
from torchlinearmoe.checkpoint.model import checkpoint_recipe
from torchlinearmoe.convert import main as convert

ARCHIVES = {path.name.removesuffix(".tar.xz"): path for path in sorted((HERE / "exports").glob("*.tar.xz"))}


def assert_logits(found: list[list[float]], name: str) -> None:
    logits = torch.tensor(expected(ARCHIVES[name])["logits"])
    torch.testing.assert_close(torch.tensor(found), logits, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ARCHIVES)
def test_a_directory_becomes_a_checkpoint_and_initial_weights(name: str, tmp_path: Path) -> None:
    folder = unpack(ARCHIVES[name], tmp_path)
    assert convert(["from-hf", str(folder / "exported"), str(folder / "imported")]) == 0
    assert_logits(last_logits(load_model(folder / "imported")), name)

    recipe = checkpoint_recipe(folder / "imported")
    fresh = build_model(recipe.model, seed=1).eval()
    named = dataclasses.replace(recipe.checkpoint, init_from=str(folder / "exported"))
    InitialWeights(dataclasses.replace(recipe, checkpoint=named)).load(fresh)
    assert_logits(last_logits(fresh), name)


def test_the_file_that_travels_with_our_own_architecture_still_runs(tmp_path: Path) -> None:
    folder = unpack(ARCHIVES["own"], tmp_path) / "exported"
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    assert type(model).__name__ == ARCHITECTURE
    with torch.no_grad():
        assert_logits(model(torch.tensor(PROMPTS)).logits[:, -1].tolist(), "own")
    generated = model.generate(torch.tensor(PROMPTS), max_new_tokens=3, do_sample=False, eos_token_id=None)
    assert generated[:, -3].tolist() == torch.tensor(expected(ARCHIVES["own"])["logits"]).argmax(-1).tolist()


def test_published_and_own_architectures_are_among_them() -> None:
    assert {"llama3", "mixtral", "own"} <= ARCHIVES.keys()
