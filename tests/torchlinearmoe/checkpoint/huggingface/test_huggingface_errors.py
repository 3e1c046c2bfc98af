"""A directory that is not sound is refused in one line that names the file, key or tensor, and nothing stays."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from published_cases import make, save
from safetensors.torch import load_file, save_file

from torchlinearmoe import load_model
from torchlinearmoe.checkpoint.huggingface.exporting import export_checkpoint
from torchlinearmoe.checkpoint.huggingface.importing import import_directory
from torchlinearmoe.convert import main
from torchlinearmoe.errors import UserError


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of several weight files."""
    return save(make("qwen2_moe"), tmp_path_factory.mktemp("sound"), max_shard_size="40KB")


def edit(file: Path, **changes: Any) -> None:
    """Change keys of a JSON file; None removes one."""
    values = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))


def config(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: edit(folder / "config.json", **changes)


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("model-*.safetensors"))


def of_tensor(name: str, change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    """Change the tensors of the file that holds `name`."""

    def apply(folder: Path) -> None:
        for file in shards(folder):
            tensors = load_file(file)
            if name in tensors:
                change(tensors)
                save_file(tensors, file)

    return apply


def cut(file: Path, by: int) -> None:
    file.write_bytes(file.read_bytes()[:-by])


Q = "model.layers.1.self_attn.q_proj.weight"
DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing shard": (lambda f: shards(f)[1].unlink(), "model-00002-of-"),
    "truncated shard": (lambda f: cut(shards(f)[0], 10), "model-00001-of-00004.safetensors: not a safetensors file"),
    "empty shard": (lambda f: shards(f)[2].write_bytes(b""), "model-00003-of-00004.safetensors: not a safetensors"),
    "wrong shape": (of_tensor(Q, lambda t: t.update({Q: t[Q][:-1].clone()})), f"'{Q}' has shape [31, 32]"),
    "integer weights": (of_tensor(Q, lambda t: t.update({Q: t[Q].int()})), f"'{Q}' is I32"),
    "tensor of another file": (of_tensor(Q, lambda t: t.pop(Q)), f"holds no '{Q}'"),
    "index of nothing": (lambda f: (f / "model.safetensors.index.json").write_text("{}"), "'weight_map' must name"),
    "index out of the folder": (
        lambda f: edit(f / "model.safetensors.index.json", weight_map={"a": "../x.safetensors"}),
        "'weight_map' must name",
    ),
    "broken index": (lambda f: cut(f / "model.safetensors.index.json", 5), "index.json: cannot be read"),
    "no config": (lambda f: (f / "config.json").unlink(), "holds no config.json"),
    "broken config": (lambda f: cut(f / "config.json", 5), "config.json: cannot be read"),
    "unknown architecture": (config(architectures=["GemmaForCausalLM"]), "architectures = ['GemmaForCausalLM']"),
    "no architecture": (config(architectures=None), "architectures = None"),
    "missing key": (config(num_experts=None), "'num_experts' is missing"),
    "key of another type": (config(hidden_size="many"), "model.hidden_size = 'many'"),
    "another activation": (config(hidden_act="gelu"), "hidden_act = 'gelu': not supported"),
    "sliding window": (config(layer_types=["sliding_attention"] * 2), "layer_types = ['sliding_attention'"),
    "unknown rope": (config(rope_parameters={"rope_type": "longrope"}), "rope type 'longrope'"),
    "quantised": (config(quantization_config={"bits": 4}), "'quantization_config'"),
    "fewer layers": (config(num_hidden_layers=1, layer_types=None), "which no model of its config.json has"),
    "more layers": (config(num_hidden_layers=3, layer_types=None), "the tensor 'model.layers.2."),
    "no weights": (lambda f: [(f / "model.safetensors.index.json").unlink(), *map(Path.unlink, shards(f))], "neither"),
    "pickled weights": (
        lambda f: [(f / "model.safetensors.index.json").unlink(), (f / "pytorch_model.bin").write_bytes(b"x")],
        "pytorch_model.bin is pickled",
    ),
}


@pytest.mark.parametrize(
    ("key", "value", "wanted"),
    [
        ("topk_method", "noaux_tc", "topk_method = 'noaux_tc': not supported; legal: greedy, group_limited_greedy"),
        ("norm_topk_prob", True, "norm_topk_prob = True: not supported"),
        ("n_group", 3, "moe.num_groups = 3"),
        ("n_group", None, "moe.num_groups = None"),
        ("rope_interleave", False, "rope_interleave = False: not supported"),
        (
            "q_lora_rank",
            None,
            "'model.layers.0.self_attn.q_a_proj.weight' has shape [12, 32], by config.json it should be [1536, 32]",
        ),
    ],
)
def test_a_latent_model_that_is_not_built_here_is_named(key: str, value: Any, wanted: str, tmp_path: Path) -> None:
    folder = save(make("deepseek_v2 grouped"), tmp_path / "directory")
    config(**{key: value})(folder)
    with pytest.raises(UserError) as caught:
        import_directory(folder, tmp_path / "checkpoint")
    assert wanted in str(caught.value) and str(folder) in str(caught.value)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_directory_is_named_and_leaves_nothing(damage: str, sound: Path, tmp_path: Path) -> None:
    folder = tmp_path / "directory"
    shutil.copytree(sound, folder)
    change, message = DAMAGES[damage]
    change(folder)
    with pytest.raises(UserError) as caught:
        import_directory(folder, tmp_path / "checkpoint")
    assert message in str(caught.value) and str(folder) in str(caught.value) and "\n" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["directory"]


def test_a_failure_while_writing_leaves_nothing(sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchlinearmoe.checkpoint.huggingface.directory import Directory

    import_directory(sound, tmp_path / "checkpoint")
    read, calls = Directory.read, []

    def failing(self: Directory, *arguments: Any) -> torch.Tensor:
        calls.append(arguments)
        if len(calls) == 20:
            raise OSError(28, "No space left on device")
        return read(self, *arguments)

    monkeypatch.setattr(Directory, "read", failing)
    with pytest.raises(UserError, match="second: cannot be written.*No space left"):
        import_directory(sound, tmp_path / "second")
    monkeypatch.setattr("torchlinearmoe.checkpoint.huggingface.exporting.save_file", failing_save)
    with pytest.raises(UserError, match="exported: cannot be written: No space left"):
        export_checkpoint(tmp_path / "checkpoint", tmp_path / "exported")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def failing_save(*_: Any, **__: Any) -> None:
    raise OSError(28, "No space left on device")


def test_what_exists_is_not_overwritten(sound: Path, tmp_path: Path) -> None:
    import_directory(sound, tmp_path / "checkpoint")
    for convert in (import_directory, export_checkpoint):
        with pytest.raises(UserError, match="exists already"):
            convert(sound if convert is import_directory else tmp_path / "checkpoint", tmp_path / "checkpoint")
    (tmp_path / "other.tmp").mkdir()  # of a process that was killed
    (tmp_path / "other.tmp" / "rest").touch()
    import_directory(sound, tmp_path / "other")
    assert load_model(tmp_path / "other").recipe == load_model(tmp_path / "checkpoint").recipe


def test_a_folder_that_is_no_checkpoint_is_not_exported(sound: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"checkpoint .*: cannot read state.json"):
        export_checkpoint(sound, tmp_path / "exported")
    import_directory(sound, tmp_path / "checkpoint")
    data = next((tmp_path / "checkpoint").glob("*.distcp"))
    cut(data, 100)
    with pytest.raises(UserError, match=f"{data.name} has .* bytes"):
        export_checkpoint(tmp_path / "checkpoint", tmp_path / "exported")


def test_the_command_converts_both_ways_and_fails_in_one_line(
    sound: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["from-hf", str(sound), str(tmp_path / "checkpoint")]) == 0
    assert main(["to-hf", str(tmp_path / "checkpoint"), str(tmp_path / "again"), "--dtype", "bfloat16"]) == 0
    assert "Qwen2MoeForCausalLM" in capsys.readouterr().out
    assert {value.dtype for value in load_file(tmp_path / "again" / "model.safetensors").values()} == {torch.bfloat16}
    assert main(["to-hf", str(tmp_path / "checkpoint"), str(tmp_path / "cut"), "--shard-size", "3e-5"]) == 0
    assert len(list((tmp_path / "cut").glob("model-*.safetensors"))) > 2
    with pytest.raises(SystemExit, match="2"):
        main(["to-hf", "a", "b", "--shard-size", "0"])
    assert "--shard-size: '0', legal: numbers above 0" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="1"):
        main(["from-hf", str(tmp_path / "nowhere"), str(tmp_path / "more")])
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "holds no config.json" in error and error.count("\n") == 1
