"""What somebody else put beside weights neither travels on, nor runs, nor decides where a run reads and writes."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from published_cases import make, save
from safetensors.torch import load_file, save_file
from seals import reseal
from tokenizers.models import WordLevel

from torchlinearmoe import build_model, load_model
from torchlinearmoe.checkpoint import CheckpointManager
from torchlinearmoe.checkpoint.huggingface.exporting import export_checkpoint
from torchlinearmoe.checkpoint.huggingface.importing import import_directory
from torchlinearmoe.checkpoint.huggingface.own import MODELING
from torchlinearmoe.checkpoint.huggingface.weights import PublishedWeights
from torchlinearmoe.checkpoint.initial import InitialWeights
from torchlinearmoe.checkpoint.model import checkpoint_recipe, find_tokenizer, model_files
from torchlinearmoe.data.tokenizer import load_tokenizer
from torchlinearmoe.errors import RecipeError, UserError
from torchlinearmoe.models.decoder import Decoder
from torchlinearmoe.recipe import DataRecipe, resolve

OWN = resolve({"model": {"num_layers": 2, "layout": "L"}, "training": {"steps": 1}})
EVIL = "import pathlib; pathlib.Path(__file__).with_name('ran').touch()"
REMOTE = {"AutoTokenizer": ["somebody/else--tokenization.Tokenizer", None]}


def write_tokenizer(folder: Path) -> Path:
    """A `tokenizer.json` and its configuration, which asks transformers to run code."""
    folder.mkdir(exist_ok=True)
    tokenizer = tokenizers.Tokenizer(WordLevel({"a": 0, "b": 1, "</s>": 2}, unk_token="a"))
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"eos_token": "</s>", "tokenizer_class": "PreTrainedTokenizerFast", "auto_map": REMOTE}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder / "tokenizer.json"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A checkpoint of our own architecture, with a `tokenizer.json`."""
    file = write_tokenizer(tmp_path / "tokenizer")
    files = model_files(OWN, load_tokenizer(file))
    manager = CheckpointManager(tmp_path / "run", keep=1)
    manager.save(1, build_model(OWN.model, seed=3), None, {"tokens": 0}, files, blocking=True)
    return tmp_path / "run" / "step-1"


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    folder = save(make("qwen2"), tmp_path / "directory")
    write_tokenizer(folder)
    return folder


def test_only_a_tokenizers_files_leave_with_the_weights(checkpoint: Path, tmp_path: Path) -> None:
    import_safe = {"tokenizer.json", "tokenizer_config.json"}
    export_checkpoint(checkpoint, tmp_path / "before")
    weights = load_file(tmp_path / "before" / "model.safetensors")
    planted = checkpoint / "tokenizer"
    write_tokenizer(planted)
    for name in ("evil.py", MODELING, "config.json", "generation_config.json", "README.md", "model.bin", ".hidden"):
        (planted / name).write_text(EVIL)
    save_file({name: torch.zeros_like(value) for name, value in weights.items()}, planted / "model.safetensors")
    (planted / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "evil.safetensors"}}))
    (planted / "tokenizer_module").mkdir()
    os.mkfifo(planted / "pipe")
    reseal(checkpoint)
    (planted / "key.pem").symlink_to("/etc/hostname")

    export_checkpoint(checkpoint, tmp_path / "after")
    names = {path.name for path in (tmp_path / "after").iterdir()}
    assert names == import_safe | {"config.json", "generation_config.json", "model.safetensors", MODELING}
    assert EVIL not in "".join(path.read_text(errors="replace") for path in (tmp_path / "after").iterdir())
    for name, value in load_file(tmp_path / "after" / "model.safetensors").items():
        assert torch.equal(value, weights[name])
    for name in names:
        assert (tmp_path / "after" / name).read_bytes() == (tmp_path / "before" / name).read_bytes()


def test_the_weights_are_written_last(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchlinearmoe.checkpoint.huggingface import exporting

    beside: list[set[str]] = []

    def watched(tensors: Any, path: Path, **options: Any) -> None:
        beside.append({file.name for file in path.parent.iterdir()})
        save_file(tensors, path, **options)

    monkeypatch.setattr(exporting, "save_file", watched)
    export_checkpoint(checkpoint, tmp_path / "exported")
    after = {file.name for file in (tmp_path / "exported").iterdir()}
    assert beside == [after - {"model.safetensors"}]


def test_no_tokenizer_asks_for_code(checkpoint: Path, directory: Path, tmp_path: Path) -> None:
    assert b"auto_map" not in (checkpoint / "tokenizer" / "tokenizer_config.json").read_bytes()
    write_tokenizer(checkpoint / "tokenizer")
    reseal(checkpoint)
    export_checkpoint(checkpoint, tmp_path / "exported")
    import_directory(directory, tmp_path / "imported")
    for folder in (tmp_path / "exported", tmp_path / "imported" / "tokenizer"):
        config = json.loads((folder / "tokenizer_config.json").read_text())
        assert config == {"eos_token": "</s>", "tokenizer_class": "PreTrainedTokenizerFast"}


def to_secret(path: Path) -> None:
    path.unlink(missing_ok=True)
    secret = path.parent.parent / "secret"
    secret.write_text('{"secret": true}')
    path.symlink_to(secret)


def to_pipe(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


@pytest.mark.parametrize("replace", [to_secret, to_pipe])
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "x.tiktoken"])
def test_a_tokenizers_file_that_is_none_is_named(
    name: str, replace: Callable[[Path], None], checkpoint: Path, directory: Path, tmp_path: Path
) -> None:
    replace(checkpoint / "tokenizer" / name)
    replace(directory / name)
    for convert, source in ((export_checkpoint, checkpoint), (import_directory, directory)):
        with pytest.raises(UserError, match=f"{name}: is ") as caught:
            convert(source, tmp_path / "converted")
        assert "\n" not in str(caught.value)
        with pytest.raises(UserError, match=f"{name}: is "):
            find_tokenizer(source)
    assert not (tmp_path / "converted").exists()


def test_a_linked_folder_of_tokenizer_files_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    (checkpoint / "tokenizer").rename(tmp_path / "elsewhere")
    (checkpoint / "tokenizer").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="behind a link"):
        export_checkpoint(checkpoint, tmp_path / "exported")


@pytest.mark.parametrize("replace", [to_secret, to_pipe])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "model.safetensors.index.json"])
def test_weights_and_config_are_plain_files(
    name: str, replace: Callable[[Path], None], directory: Path, tmp_path: Path
) -> None:
    replace(directory / name)
    for read in (lambda: import_directory(directory, tmp_path / "imported"), lambda: start_from(directory)):
        with pytest.raises(UserError, match=f"{name}: is "):
            read()
    assert not (tmp_path / "imported").exists()


def start_from(folder: Path) -> InitialWeights:
    tables = {"model": {"layout": "N"}, "checkpoint": {"init_from": str(folder)}, "training": {"steps": 1}}
    return InitialWeights(resolve(tables))


def test_a_snapshot_of_the_cache_is_imported(directory: Path, tmp_path: Path) -> None:
    import_directory(directory, tmp_path / "plain")
    model = tmp_path / "models--a--b"
    snapshot = model / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (model / "blobs").mkdir()
    for number, file in enumerate(sorted(directory.iterdir())):
        shutil.copy(file, model / "blobs" / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    import_directory(snapshot, tmp_path / "cached")
    wanted = load_model(tmp_path / "plain").state_dict()
    assert all(torch.equal(value, wanted[name]) for name, value in load_model(tmp_path / "cached").state_dict().items())
    names = [sorted(file.name for file in (tmp_path / f / "tokenizer").iterdir()) for f in ("plain", "cached")]
    assert names[0] == names[1] == ["tokenizer.json", "tokenizer_config.json"]


def test_what_lies_beside_a_tokenizer_by_a_link_is_not_saved(tmp_path: Path) -> None:
    file = write_tokenizer(tmp_path / "downloaded")
    (tmp_path / "secret").write_text("private")
    (file.parent / "special_tokens_map.json").symlink_to("../secret")
    with pytest.raises(UserError, match="special_tokens_map.json: is a link to another folder"):
        model_files(OWN, load_tokenizer(file))


def test_a_tokenizer_linked_with_all_that_belongs_to_it_is_saved(tmp_path: Path) -> None:
    write_tokenizer(tmp_path / "shared")
    (tmp_path / "mine").mkdir()
    for file in (tmp_path / "shared").iterdir():
        (tmp_path / "mine" / file.name).symlink_to(file)
    files = model_files(OWN, load_tokenizer(tmp_path / "mine"))
    assert {"tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json"} <= files.keys()


def edit(directory: Path, change: Callable[[Any], Any]) -> None:
    config = json.loads((directory / "config.json").read_text())
    change(config)
    (directory / "config.json").write_text(json.dumps(config))


def test_of_our_own_architecture_only_the_model_is_taken(checkpoint: Path, tmp_path: Path) -> None:
    export_checkpoint(checkpoint, tmp_path / "exported")
    strange = {
        "data": {"paths": ["/home/somebody"], "cache": "/tmp/cache", "tokenizer": "/tmp/evil.tiktoken"},
        "checkpoint": {"init_from": "/tmp/evil", "resume": "/tmp/evil"},
        "training": {"output_dir": "/tmp/evil", "steps": 10**9},
        "nonsense": {},
    }
    edit(tmp_path / "exported", lambda config: config["recipe"].update(strange))
    import_directory(tmp_path / "exported", tmp_path / "imported")
    recipe, fresh = checkpoint_recipe(tmp_path / "imported"), resolve({"training": {"steps": 1}})
    assert recipe.model == OWN.model and recipe.checkpoint == fresh.checkpoint
    assert (recipe.data.paths, recipe.data.cache) == (DataRecipe.paths, DataRecipe.cache)
    assert recipe.data.tokenizer == str(tmp_path / "imported" / "tokenizer" / "tokenizer.json")
    assert recipe.training.output_dir == "runs/imported" and recipe.training.steps == 1
    assert "evil" not in (tmp_path / "imported" / "recipe.toml").read_text()


@pytest.mark.parametrize(
    ("case", "key", "value", "named"),
    [
        ("qwen2", "num_hidden_layers", 10**7, "model.num_layers = 10000000: must be at most"),
        ("qwen2", "num_hidden_layers", 4000, "model.num_layers = 4000 take at least 4000 tensors"),
        ("qwen2", "vocab_size", 10**12, "model.vocab_size = 1000000000000: must be at most"),
        ("qwen2", "hidden_size", 2**40, "model.hidden_size = 1099511627776: must be at most"),
        ("mixtral", "num_local_experts", 10**9, "moe.num_experts = 1000000000: must be at most"),
        ("mixtral", "num_local_experts", 60_000, "moe.num_experts = 60000 take at least"),
        ("deepseek_v2 grouped", "n_shared_experts", 10**9, "moe.shared_hidden_size = "),
        ("deepseek_v2 grouped", "kv_lora_rank", 10**9, "mixer.mla.kv_lora_rank = 1000000000: must be at most"),
    ],
)
def test_absurd_sizes_are_refused_before_anything_is_built(
    case: str, key: str, value: int, named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save(make(case), tmp_path / "directory")
    edit(folder, lambda config: config.update({key: value}))
    monkeypatch.setattr(Decoder, "__init__", lambda *_, **__: pytest.fail("a model was built"))
    with pytest.raises(UserError) as caught:
        import_directory(folder, tmp_path / "imported")
    assert named in str(caught.value) and "config.json" in str(caught.value)
    assert isinstance(caught.value, RecipeError) == ("at most" in str(caught.value))


def test_absurd_sizes_of_our_own_architecture_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    export_checkpoint(checkpoint, tmp_path / "exported")
    edit(tmp_path / "exported", lambda config: config["recipe"]["model"].update(num_layers=10**7))
    with pytest.raises(RecipeError, match="config.json: model.num_layers = 10000000: must be at most"):
        import_directory(tmp_path / "exported", tmp_path / "imported")


@pytest.mark.parametrize("case", ["llama yarn", "deepseek_v2 grouped"])
def test_whatever_a_config_holds_is_refused_in_one_line_or_not_looked_at(case: str, tmp_path: Path) -> None:
    folder = save(make(case), tmp_path / "directory")
    config = json.loads((folder / "config.json").read_text())
    refused = set()
    for key in config:
        for value in ("x", [[]], {"a": [1]}, -1, 1.5, 10**30, 10**12):
            (folder / "config.json").write_text(json.dumps(config | {key: value}))
            try:
                PublishedWeights(folder)
            except UserError as error:
                assert "\n" not in str(error) and "directory" in str(error)
                refused.add(key)
    assert {"architectures", "hidden_size", "num_hidden_layers", "vocab_size", "rope_parameters"} <= refused
