"""The ids that begin, end and fill a text stay what they are, in and out."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import transformers
from own_cases import checkpoint
from published_cases import make, save
from seals import reseal

from torchlinearmoe.checkpoint.huggingface.exporting import export_checkpoint
from torchlinearmoe.checkpoint.huggingface.importing import import_directory
from torchlinearmoe.checkpoint.model import checkpoint_tokenizer, ends_of_text, load_model
from torchlinearmoe.data.store import TokenStore
from torchlinearmoe.errors import UserError
from torchlinearmoe.generate import _encode
from torchlinearmoe.generation import generate
from torchlinearmoe.train import main as train

KEYS = ("bos_token_id", "eos_token_id", "pad_token_id")


def ids_of(folder: Path, name: str) -> dict[str, Any]:
    """What a file says of them; a key that is not there is told from one that is null."""
    config = json.loads((folder / name).read_text())
    return {key: config[key] for key in KEYS if key in config}


def write_tokenizer(folder: Path, **config: Any) -> None:
    """Ids a = 2, b = 3 (and all else), beside `<s>` = 0 and `</s>` = 1; `tokenizer_config.json` adds `config`."""
    model = tokenizers.models.BPE({"<s>": 0, "</s>": 1, "a": 2, "b": 3}, [], unk_token="b")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore
    tokenizer.decoder = tokenizers.decoders.ByteLevel()  # pyright: ignore
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>", **config}))


def imported(folder: Path, config_ids: dict[str, Any], generation_ids: dict[str, Any] | None, **config: Any) -> Path:
    """A checkpoint of a Llama directory of which the two files say this."""
    published = save(make("llama 3"), folder / "published")
    described = json.loads((published / "config.json").read_text())
    kept = {key: value for key, value in described.items() if key not in KEYS}
    (published / "config.json").write_text(json.dumps(kept | config_ids))
    (published / "generation_config.json").unlink(missing_ok=True)
    if generation_ids is not None:
        (published / "generation_config.json").write_text(json.dumps({"temperature": 0.6, **generation_ids}))
    write_tokenizer(published, **config)
    import_directory(published, folder / "checkpoint")
    return folder / "checkpoint"


@pytest.mark.parametrize(
    ("config_ids", "generation_ids"),
    [
        ({"bos_token_id": 0, "eos_token_id": 1}, None),
        ({"bos_token_id": 0, "eos_token_id": 1}, {"bos_token_id": 0, "eos_token_id": [1, 3], "pad_token_id": 2}),
        ({"bos_token_id": None, "eos_token_id": 1, "pad_token_id": 3}, {}),
        ({}, {"eos_token_id": 1}),
    ],
)
def test_an_imported_model_keeps_them(
    config_ids: dict[str, Any], generation_ids: dict[str, Any] | None, tmp_path: Path
) -> None:
    source = imported(tmp_path, config_ids, generation_ids, bos_token="<s>")
    export_checkpoint(source, tmp_path / "again")
    assert ids_of(tmp_path / "again", "config.json") == config_ids
    expected = config_ids if generation_ids is None else generation_ids
    assert ids_of(tmp_path / "again", "generation_config.json") == expected
    before, after = (
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("published", "again")
    )
    for key in KEYS:
        assert getattr(after.config, key) == getattr(before.config, key), key
        assert getattr(after.generation_config, key) == getattr(before.generation_config, key), key


@pytest.mark.parametrize(
    ("config", "begin"),
    [
        ({"bos_token": "<s>"}, 0),
        ({"bos_token": {"content": "<s>"}, "add_bos_token": True}, 0),
        ({"bos_token": "<s>", "add_bos_token": False}, 1),
        ({"bos_token": None}, 1),
        ({}, 1),
    ],
)
def test_a_prompt_begins_as_the_imported_model_knows_it(config: dict[str, Any], begin: int, tmp_path: Path) -> None:
    source = imported(tmp_path, {"bos_token_id": 0, "eos_token_id": 1}, None, **config)
    options = argparse.Namespace(chat=False, system="", checkpoint=str(source))
    prompts, stop = _encode(options, checkpoint_tokenizer(source), ["ab", ""])
    assert (prompts, stop) == ([[begin, 2, 3], [begin]], {1})
    options.chat, options.prompt = True, ["ab"]
    assert [prompt[0] for prompt in _encode(options, checkpoint_tokenizer(source), ["ab"])[0]] == [begin]


@pytest.mark.parametrize("adds", [True, False, None])
def test_a_begin_token_that_only_the_post_processor_names_begins_a_prompt(adds: bool | None, tmp_path: Path) -> None:
    config = {} if adds is None else {"add_bos_token": adds}
    source = imported(tmp_path, {"bos_token_id": 0, "eos_token_id": 1}, None, **config)
    file = source / "tokenizer" / "tokenizer.json"
    tokenizer = tokenizers.Tokenizer.from_file(str(file))
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing("<s> $A </s>", None, [("<s>", 0), ("</s>", 1)])  # pyright: ignore
    tokenizer.save(str(file))
    assert checkpoint_tokenizer(source).start == (1 if adds is False else 0)
    assert checkpoint_tokenizer(source).encode("ab") == [2, 3]


def test_generation_stops_at_every_end_that_an_imported_model_names(tmp_path: Path) -> None:
    source = imported(tmp_path, {"eos_token_id": 1}, {"eos_token_id": [1, 3]})
    options = argparse.Namespace(chat=False, system="", checkpoint=str(source))
    assert _encode(options, checkpoint_tokenizer(source), ["a"])[1] == {1, 3}
    model = load_model(source)
    tokens = [chosen[0] or 0 for chosen in generate(model, [[0, 2]], 12)]
    found = [chosen[0] for chosen in generate(model, [[0, 2]], 12, stop=set(tokens[3:5]))]
    assert found == tokens[: min(tokens.index(token) for token in tokens[3:5])]
    (source / "special_ids.json").write_text('{"config.json": {"eos_token_id": ["x"]}}')
    with pytest.raises(UserError, match=r"special_ids.json: eos_token_id = \['x'\]: must be an id or a list of ids"):
        ends_of_text(source, checkpoint_tokenizer(source))


def run(source: Path, output: Path, *overrides: str) -> Path:
    """Train some steps from the weights of `source` on words of a and b; returns the last checkpoint."""
    text = output.parent / "text.txt"
    words = ("".join("ab"[bit == "1"] for bit in f"{i:b}") for i in range(16, 64))
    if not text.exists():
        text.write_text("<|endoftext|>".join(["ab", "abab", *words]))
    told = (
        *(f"checkpoint.init_from={source}", f'data.paths=["{text}"]', f"training.output_dir={output}"),
        *("training.steps=2", "training.sequence_length=16", "training.device=cpu", "data.validation_fraction=0.2"),
        *("metrics.tensorboard=false", *overrides),
    )
    assert train([str(source / "recipe.toml"), *(f"--{item}" for item in told)]) == 0
    return max((output / "checkpoints").iterdir(), key=lambda path: int(path.name.removeprefix("step-")))


def prompt(checkpoint: Path) -> list[int]:
    options = argparse.Namespace(chat=False, system="", checkpoint=str(checkpoint))
    return _encode(options, checkpoint_tokenizer(checkpoint), ["ab"])[0][0]


def documents(output: Path) -> list[list[int]]:
    """The first documents of every folder of tokens that a run made."""
    stores = [TokenStore(file.parent) for file in sorted((output / "cache").rglob("store.json"))]
    return [store.tokens[: store.offsets[2]].tolist() for store in stores]


def test_training_goes_on_with_the_tokens_that_an_imported_model_knows(tmp_path: Path) -> None:
    ids = {"bos_token_id": 0, "eos_token_id": 1}
    source = imported(tmp_path, ids, None, bos_token="<s>", pad_token="b")
    first = run(source, tmp_path / "first")
    assert documents(tmp_path / "first") == [[0, 2, 3, 1, 0, 2, 3, 2, 3, 1]]
    assert "begin_of_text = true" in (first / "recipe.toml").read_text()
    assert prompt(first) == [0, 2, 3]
    second = run(first, tmp_path / "second")
    assert documents(tmp_path / "second") == documents(tmp_path / "first")
    assert run(first, tmp_path / "second", "training.steps=4").name == "step-4"
    from_published = run(source, tmp_path / "third", f"checkpoint.init_from={tmp_path / 'published'}")
    assert prompt(second) == prompt(from_published) == [0, 2, 3]
    export_checkpoint(second, tmp_path / "again")
    for name in ("config.json", "generation_config.json"):
        assert ids_of(tmp_path / "again", name) == {**ids, "pad_token_id": 3}


def test_a_model_that_was_trained_without_its_begin_token_goes_on_without(tmp_path: Path) -> None:
    source = imported(tmp_path, {"bos_token_id": 0, "eos_token_id": 1}, None, bos_token="<s>")
    without = run(source, tmp_path / "without", "data.begin_of_text=false")
    recipe = without / "recipe.toml"
    recipe.write_text(recipe.read_text().replace("begin_of_text = false\n", ""))  # as earlier versions wrote it
    reseal(without)
    assert prompt(without) == [1, 2, 3]
    assert prompt(run(without, tmp_path / "after")) == [1, 2, 3]
    assert prompt(run(without, tmp_path / "other", "data.begin_of_text=true")) == [0, 2, 3]
    later = run(source, tmp_path / "without", "training.steps=4")
    assert later.name == "step-4" and prompt(later) == [1, 2, 3]
    assert documents(tmp_path / "without") == documents(tmp_path / "after") == [[1, 2, 3, 1, 2, 3, 2, 3]]
    with pytest.raises(SystemExit):
        run(source, tmp_path / "without", "training.steps=6", "data.begin_of_text=true")


def test_a_model_trained_with_a_tokenizer_without_one_begins_with_the_end(tmp_path: Path) -> None:
    source, _ = checkpoint(tmp_path / "run", "linear")
    export_checkpoint(source, tmp_path / "exported")
    for name in ("config.json", "generation_config.json"):
        assert ids_of(tmp_path / "exported", name) == {"bos_token_id": 1023, "eos_token_id": 1023}
