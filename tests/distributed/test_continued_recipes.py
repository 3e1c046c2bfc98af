"""Published hybrids go on from converted weights with long texts, by their recipes, as their users would run them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from harness import RankPool
from safetensors.torch import load_file, save_file
from tiny_run import Result, assert_same_training, in_float64, read_lines, watched, whole

from torchlinearmoe.convert import main as convert
from torchlinearmoe.recipe import load_recipe
from torchlinearmoe.train import main as train

RECIPES = Path(__file__).parents[2] / "recipes"
PUBLISHED = {"qwen3_next": "Qwen3NextForCausalLM", "kimi_linear": "KimiLinearForCausalLM"}
LENGTH, SHORT = 256, 320
LONG = (
    *("--model.size=debug", "--training.dtype=float32", "--training.device=cpu", "--metrics.tensorboard=false"),
    "--moe.backend=loop",
    f"--training.sequence_length={LENGTH}",
    f"--training.tokens_per_step={4 * LENGTH}",
    f"--training.tokens={3 * 4 * LENGTH}",
    f"--data.min_length={SHORT}",
    "--data.validation_fraction=0.1",
    "--metrics.interval=1",
    "--optimizer.lr=1e-3",
    f"--optimizer.warmup_tokens={4 * LENGTH}",
)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two of three texts are shorter than a sequence."""
    shipped = Path(__file__).parents[2] / "torchlinearmoe/data/corpus/king_james_new_testament.jsonl"
    lines = [json.loads(line)["text"] for line in shipped.read_text().splitlines()[:72]]
    path = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    cut = [text if number % 3 == 0 else text[:400] for number, text in enumerate(lines)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in cut))
    return path


def published(name: str, folder: Path) -> Path:
    """A directory in the published layout, with random weights and the tokenizer that ships."""
    start, recipe = folder / "start", folder / "start.toml"
    training = f'steps = 1\nsequence_length = 64\ndevice = "cpu"\noutput_dir = "{start}"'
    metrics = "[metrics]\ntensorboard = false"
    recipe.write_text(f'[model]\nfamily = "{name}"\nsize = "debug"\n[training]\n{training}\n{metrics}\n')
    assert train([str(recipe)]) == 0
    assert convert(["to-hf", str(start), str(folder / "published")]) == 0
    config = json.loads((folder / "published/config.json").read_text())
    assert config["architectures"] == [PUBLISHED[name]] and "auto_map" not in config
    (weights,) = (folder / "published").glob("*.safetensors")
    tensors = load_file(weights)
    for key in selection_biases(tensors):
        tensors[key].normal_(0, 0.2)
    save_file(tensors, weights, {"format": "pt"})
    return folder / "published"


def selection_biases(tensors: dict[str, torch.Tensor]) -> list[str]:
    """Names of what training moves by `moe.bias_rate` a step and nothing else."""
    return [key for key in tensors if key.endswith("e_score_correction_bias")]


def continued(rank: int, recipe: Path, overrides: tuple[str, ...]) -> tuple[Result, int]:
    """What the train command does on the ranks that there are; and how many texts were left out."""
    from torchlinearmoe.parallel.mesh import resolve_degrees, tokens_per_step
    from torchlinearmoe.run_folder import with_tokenizer, with_tokens_per_step
    from torchlinearmoe.trainer import Trainer

    found = with_tokenizer(load_recipe(recipe, overrides))
    degrees = resolve_degrees(found.parallel, dist.get_world_size())
    found = with_tokens_per_step(found, tokens_per_step(found.training, degrees))
    with in_float64():  # a router's near tie must not fall either way by how sums are ordered
        trainer = Trainer(found, degrees, torch.device("cpu"))
    gradients: dict[str, torch.Tensor] = {}
    rows: dict[int, list[str]] = {}
    with watched(gradients, rows):
        stopped = trainer.run()
    state = {name: whole(value) for part in trainer.parts for name, value in part.state_dict().items()}
    dist.barrier()
    return Result(read_lines(trainer.folder), gradients, state, rows, stopped, 0, []), trainer.splits.train.left_out


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_a_converted_model_goes_on_over_four_ranks_as_on_one_and_is_converted_back(
    ranks: RankPool, texts: Path, tmp_path: Path, name: str
) -> None:
    converted, recipe = tmp_path / "converted", RECIPES / f"{name}.toml"
    assert convert(["from-hf", str(published(name, tmp_path)), str(converted)]) == 0
    given = (*LONG, f'--data.paths=["{texts}"]', f"--checkpoint.init_from={converted}")
    as_shipped = load_recipe(recipe)
    assert as_shipped.parallel.context > 1 and as_shipped.parallel.expert > 1
    assert as_shipped.training.activation_checkpointing == "full"

    def over(size: int, context: int, expert: int) -> list[tuple[Result, int]]:
        layout = (f"--parallel.context={context}", f"--parallel.expert={expert}")
        return ranks(size, continued, recipe, (*given, *layout, f"--training.output_dir={tmp_path / str(size)}"))

    ((alone, left_out),) = over(1, 1, 1)
    assert 40 < left_out <= 48 and len(alone.column("loss")) == 3
    for found, left_out_there in over(4, 2, 4):
        assert_same_training(found, alone, 1e-9)
        assert left_out_there == left_out
    assert alone.column("loss")[0] - alone.column("loss")[-1] > 0.01

    assert convert(["to-hf", str(tmp_path / "4"), str(tmp_path / "back"), "--dtype", "bfloat16"]) == 0
    config = json.loads((tmp_path / "back/config.json").read_text())
    before = json.loads((tmp_path / "published/config.json").read_text())
    assert config["architectures"] == [PUBLISHED[name]] and config["dtype"] == "bfloat16"
    (there,) = (load_file(file) for file in (tmp_path / "published").glob("*.safetensors"))
    (back,) = (load_file(file) for file in (tmp_path / "back").glob("*.safetensors"))
    assert back.keys() == there.keys()
    assert bool(biases := selection_biases(there)) == (name == "kimi_linear")
    for key in biases:  # a step moves one by the rate times a sign, less the mean of all signs: at most twice the rate
        assert 0 < (back[key] - there[key]).abs().max() < 3 * 2 * as_shipped.model.moe.bias_rate
    assert config.keys() == before.keys() and (tmp_path / "back/tokenizer.json").exists()
