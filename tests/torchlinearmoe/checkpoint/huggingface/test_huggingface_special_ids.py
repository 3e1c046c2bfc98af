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

from torchlinearmoe.checkpoint.huggingface.exporting import export_checkpoint
from torchlinearmoe.checkpoint.huggingface.importing import import_directory
from torchlinearmoe.checkpoint.model import begin_of_text, checkpoint_tokenizer, ends_of_text, load_model, model_files
from torchlinearmoe.data.tokenizer import load_tokenizer
from torchlinearmoe.errors import UserError
from torchlinearmoe.generate import _encode
from torchlinearmoe.generation import generate
from torchlinearmoe.recipe import resolve

KEYS = ("bos_token_id", "eos_token_id", "pad_token_id")


def ids_of(folder: Path, name: str) -> dict[str, Any]:
    """What a file says of them; a key that is not there is told from one that is null."""
    config = json.loads((folder / name).read_text())
    return {key: config[key] for key in KEYS if key in config}


def write_tokenizer(folder: Path, **config: Any) -> None:
    """Ids a = 2, b = 3 between `<s>` = 0 and `</s>` = 1, and a `tokenizer_config.json` that adds `config`."""
    model = tokenizers.models.BPE({"<s>": 0, "</s>": 1, "a": 2, "b": 3}, [])
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
    assert begin_of_text(source, checkpoint_tokenizer(source)) == (1 if adds is False else 0)
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


def test_a_model_trained_here_begins_as_its_documents_do(tmp_path: Path) -> None:
    """With the end-of-text token, whatever its tokenizer would begin with, and its export says so."""
    write_tokenizer(tmp_path, bos_token="<s>")
    tokenizer = load_tokenizer(tmp_path)
    for name, content in model_files(resolve({"training": {"steps": 1}}), tokenizer).items():
        file = tmp_path / "trained" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content.encode() if isinstance(content, str) else content)
    assert (tmp_path / "trained" / "tokenizer" / "tokenizer_config.json").is_file()
    assert begin_of_text(tmp_path / "trained", tokenizer) == 1

    source, _ = checkpoint(tmp_path / "run", "linear")
    export_checkpoint(source, tmp_path / "exported")
    for name in ("config.json", "generation_config.json"):
        assert ids_of(tmp_path / "exported", name) == {"bos_token_id": 1023, "eos_token_id": 1023}
