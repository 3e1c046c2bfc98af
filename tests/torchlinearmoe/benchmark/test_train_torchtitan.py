"""torchtitan in the contest: told in one line why it does not run, and where it runs, at the recipe's shape."""

import argparse
import os
import sys

import fake_torchtitan
import pytest
import torch

from torchlinearmoe.benchmark import __main__ as command
from torchlinearmoe.benchmark import train, train_torchtitan
from torchlinearmoe.benchmark.floors import softmax_twin
from torchlinearmoe.errors import UserError
from torchlinearmoe.recipe import load_recipe

RECIPE = "recipes/quickstart.toml"
TINY = ["model.hidden_size=32", "model.num_layers=2", "model.num_heads=2", "model.num_kv_heads=1"]
TINY += ["moe.num_experts=4", "moe.hidden_size=16"]
OPTIONS = {"recipe": RECIPE, "overrides": TINY, "sequences": 2, "length": 32, "steps": 4}
OPTIONS |= {"graphs": False, "profile": False}


@pytest.fixture
def trainer(monkeypatch):
    """The stand-in, installed on a machine with a GPU."""
    for name in (*train_torchtitan.ALONE, "PYTORCH_ALLOC_CONF"):
        monkeypatch.setenv(name, "")  # and back as it was afterwards
        del os.environ[name]
    monkeypatch.setattr(train_torchtitan, "installed", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    ours = "torchlinearmoe.benchmark.torchtitan_config"
    sys.modules.pop(ours, None)
    yield fake_torchtitan.install(monkeypatch)
    sys.modules.pop(ours, None)


@pytest.mark.parametrize("installed", [True, False])
def test_it_runs_by_default_where_it_is_installed_and_by_name_always(installed, monkeypatch):
    monkeypatch.setattr(train, "torchtitan_installed", lambda: installed)
    parser = argparse.ArgumentParser()
    train.add_arguments(parser)
    assert ("torchtitan" in parser.parse_args([]).contestants) == installed
    assert parser.parse_args(["--contestants", "torchtitan"]).contestants == ["torchtitan"]


def test_the_contest_goes_on_without_it(monkeypatch):
    tables = []
    monkeypatch.setattr(train, "show", lambda title, rows: tables.append(list(rows)))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    arguments = ["train", "--recipe", RECIPE, "--contestants", "torchtitan", "ours-eager", "--shapes", "1x32"]
    assert command.main([*arguments, "--steps", "3", *(f"--{override}" for override in TINY)]) == 0
    ((theirs, ours),) = tables
    assert theirs["error"].startswith("torchtitan") and "--contestants" in theirs["error"]
    assert ours["tokens_per_second"] > 0


def test_a_missing_package_is_named_with_the_way_out(monkeypatch):
    monkeypatch.setattr(train_torchtitan.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"torchtitan is not installed: pip install torchtitan==\S+, or leave"):
        train_torchtitan.measure(OPTIONS)


def test_a_torchtitan_that_does_not_run_here_is_told_with_its_reason(trainer):
    trainer.failure = AttributeError("no such name\nin this torch")
    with pytest.raises(UserError) as raised:
        train_torchtitan.measure(OPTIONS)
    (line,) = str(raised.value).splitlines()
    assert f"torch {torch.__version__} (AttributeError: no such name): install torchtitan" in line


def test_memory_that_runs_out_is_no_fault_of_the_versions(trainer):
    trainer.failure = torch.OutOfMemoryError("out of memory")
    with pytest.raises(torch.OutOfMemoryError):
        train_torchtitan.measure(OPTIONS)


@pytest.mark.parametrize("graphs", [True, False])
def test_its_trainer_is_given_the_recipes_shape(graphs, trainer):
    figures = train_torchtitan.measure({**OPTIONS, "graphs": graphs})
    assert figures["tokens_per_second"] == 64 / figures["step_s"] and figures["first_step_s"] > 0
    assert figures["parameters"] == 2 * 1024 * 32 / 1e9
    assert trainer.last.steps == [1, 2, 3, 4] and trainer.last.closed
    config = trainer.last.config
    assert (config.training.dtype, config.compile.enable) == ("float32", True)
    assert config.training.disable_cuda_graphs == (not graphs)
    model = config.model_spec.model
    assert (model.dim, model.vocab_size, len(model.layers)) == (32, 1024, 2)
    attention, moe = model.layers[0].attention, model.layers[0].moe
    assert (attention.n_heads, attention.n_kv_heads, attention.head_dim) == (2, 1, 16)
    assert (moe.num_experts, moe.router.top_k, moe.routed_experts.hidden_dim) == (4, 2, 16)
    assert moe.shared_experts is None and model.layers[0].feed_forward is None


def test_shared_experts_and_dense_layers_are_the_recipes(trainer):
    overrides = [*TINY, "moe.shared_hidden_size=24", "moe.first_dense_layers=1", "model.ffn_hidden_size=48"]
    train_torchtitan.measure({**OPTIONS, "overrides": overrides})
    dense, sparse = trainer.last.config.model_spec.model.layers
    assert dense.moe is None and dense.feed_forward.hidden_dim == 48
    assert sparse.feed_forward is None and sparse.moe.shared_experts.hidden_dim == 24


def test_its_step_is_profiled_by_category(trainer):
    figures = train_torchtitan.measure({**OPTIONS, "profile": True})
    rows = {row["category"]: row for row in figures["profile"]["rows"]}
    assert rows["head"]["ms"] > 0 and rows["optimizer"]["ms"] > 0 and rows["optimizer"]["floor ms"] > 0
    assert rows["recurrence"]["floor ms"] == 0 < rows["attention"]["floor ms"]


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["model.tie_embeddings=true"],
        ["moe.shared_hidden_size=24", "moe.first_dense_layers=1"],
        ["moe.num_experts=0"],
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_the_real_model_has_as_many_parameters_as_ours_with_softmax_attention(overrides):
    """But for our biases, and the norms of its queries and keys."""
    pytest.importorskip("torchtitan")
    from torchlinearmoe.benchmark.torchtitan_config import model_config

    recipe = load_recipe(RECIPE, [*TINY, *overrides, "mixer.softmax_attention.qkv_bias=false"]).model
    with torch.device("meta"):
        theirs = model_config(recipe, 32).build()
    ours, theirs = (sum(p.numel() for p in model.parameters()) for model in (softmax_twin(recipe), theirs))
    assert theirs == ours + 2 * recipe.num_layers * recipe.head_dim
