"""A published model imported is the same function, and exported again the same bytes."""

from __future__ import annotations

import json
import weakref
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers
from published_cases import PUBLISHED, as_released, in_float64, make, make_exact, random_tokens, save
from safetensors.torch import load_file
from torch import Tensor

from torchlinearmoe import FAMILIES, load_model
from torchlinearmoe.checkpoint.huggingface.exporting import export_checkpoint
from torchlinearmoe.checkpoint.huggingface.importing import import_directory


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a directory, whatever its files."""
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


def assert_same_tensors(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype and torch.equal(found[name], value), name


def loss_of(logits: Tensor, tokens: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


@pytest.mark.parametrize("case", PUBLISHED)
def test_an_imported_model_has_the_logits_and_gradients_of_transformers_and_decodes_to_them(
    case: str, tmp_path: Path
) -> None:
    published = make_exact(case)
    import_directory(save(published, tmp_path / "published"), tmp_path / "checkpoint")
    ours = load_model(tmp_path / "checkpoint").double()
    tokens = random_tokens(2, 70)
    with in_float64():
        expected = published(tokens).logits
    logits = ours(tokens)
    assert expected.dtype == torch.float64 and expected.std() > 0.3
    torch.testing.assert_close(logits, expected, atol=1e-11, rtol=0)

    with torch.no_grad():
        found, state = ours.prefill(tokens[:, :60], ours.init_state(2))
        torch.testing.assert_close(found, expected[:, :60], atol=1e-11, rtol=0)
        for step in range(60, 70):
            found, state = ours.step(tokens[:, step], state)
            torch.testing.assert_close(found, expected[:, step], atol=1e-11, rtol=0)

    loss_of(logits, tokens).backward()
    loss_of(expected, tokens).backward()
    for parameter in published.parameters():
        parameter.data = parameter.grad
    import_directory(save(published, tmp_path / "gradients"), tmp_path / "gradient checkpoint")
    gradients = load_model(tmp_path / "gradient checkpoint").state_dict()
    for name, parameter in ours.named_parameters():
        assert parameter.grad is not None and parameter.grad.norm() > 0, name
        distance = (parameter.grad - gradients[name]).norm() / gradients[name].norm()
        assert distance < 1e-6, f"gradient of {name}: {distance:.1e}"  # they were loaded in float32


@pytest.mark.parametrize("case", PUBLISHED)
def test_an_exported_model_has_the_tensors_that_were_imported_and_loads_in_transformers(
    case: str, tmp_path: Path
) -> None:
    published = make(case, torch.bfloat16)
    save(published, tmp_path / "published", max_shard_size="20KB")
    assert len(list((tmp_path / "published").glob("*.safetensors"))) > 1
    import_directory(tmp_path / "published", tmp_path / "checkpoint")
    export_checkpoint(tmp_path / "checkpoint", tmp_path / "again", shard_bytes=30_000)
    assert len(list((tmp_path / "again").glob("*.safetensors"))) > 1
    expected = as_released(case, tensors_of(tmp_path / "published"))
    assert_same_tensors(tensors_of(tmp_path / "again"), expected)
    before, after = (
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("published", "again")
    )
    assert type(after) is type(published) and after.dtype == torch.bfloat16
    tokens = random_tokens(1, 50)
    assert torch.equal(after(tokens).logits, before(tokens).logits)


def test_every_architecture_that_a_family_reads_is_compared() -> None:
    compared = {config().model_type for config in PUBLISHED.values()}
    published = [architecture for family in FAMILIES.values() for architecture in family.published]
    assert compared == {architecture.model_type for architecture in published if not architecture.own_code}


def test_an_older_config_means_the_same(tmp_path: Path) -> None:
    """`rope_theta` beside the other keys, and keys left out that have a default."""
    published = make("qwen2_moe")
    file = save(published, tmp_path / "published") / "config.json"
    config = json.loads(file.read_text())
    theta = config.pop("rope_parameters")["rope_theta"]
    for key in ("layer_types", "norm_topk_prob", "qkv_bias", "tie_word_embeddings", "rms_norm_eps"):
        del config[key]
    file.write_text(json.dumps(config | {"rope_theta": theta}))
    import_directory(tmp_path / "published", tmp_path / "checkpoint")
    tokens = random_tokens(1, 60)
    expected = published(tokens).logits
    torch.testing.assert_close(load_model(tmp_path / "checkpoint")(tokens), expected, atol=1e-4, rtol=0)


def test_the_type_of_the_export_can_be_chosen(tmp_path: Path) -> None:
    save(make("qwen2_moe"), tmp_path / "published")
    import_directory(tmp_path / "published", tmp_path / "checkpoint")
    export_checkpoint(tmp_path / "checkpoint", tmp_path / "again", dtype=torch.bfloat16)
    expected = {name: value.bfloat16() for name, value in tensors_of(tmp_path / "published").items()}
    assert_same_tensors(tensors_of(tmp_path / "again"), expected)
    assert json.loads((tmp_path / "again" / "config.json").read_text())["dtype"] == "bfloat16"


def test_an_import_never_holds_more_than_a_few_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchlinearmoe.checkpoint.huggingface.weights import PublishedWeights

    save(make("qwen2_moe"), tmp_path / "published")
    alive: weakref.WeakSet[Tensor] = weakref.WeakSet()
    held, sizes = [0], []
    read = PublishedWeights.read

    def watched(self: PublishedWeights, *arguments: object) -> Tensor:
        tensor = read(self, *arguments)  # type: ignore[arg-type]
        alive.add(tensor)
        sizes.append(tensor.numel())
        held[0] = max(held[0], sum(one.numel() for one in alive))
        return tensor

    monkeypatch.setattr(PublishedWeights, "read", watched)
    import_directory(tmp_path / "published", tmp_path / "checkpoint")
    assert len(sizes) > 50 and held[0] <= 3 * max(sizes) < sum(sizes) / 3


@pytest.mark.skipif(not Path("/proc/self/maps").is_file(), reason="needs Linux's list of mapped files")
def test_an_import_maps_one_file_at_a_time(tmp_path: Path) -> None:
    save(make("qwen2_moe"), tmp_path / "published", max_shard_size="20KB")
    assert len(list((tmp_path / "published").glob("*.safetensors"))) > 4
    seen: list[int] = []

    def watch(done: int, total: int) -> None:
        lines = Path("/proc/self/maps").read_text().splitlines()
        seen.append(len({line.split()[-1] for line in lines if f"{tmp_path}/published/" in line}))

    import_directory(tmp_path / "published", tmp_path / "checkpoint", watch)
    assert len(seen) > 50 and max(seen) == 1
