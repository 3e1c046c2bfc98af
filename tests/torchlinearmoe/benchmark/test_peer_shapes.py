"""Peers are timed at the recipe's shape or say which part of it they have not."""

import pytest

from torchlinearmoe.benchmark import train_torchtitan, train_transformers
from torchlinearmoe.benchmark.contest import run_contestant
from torchlinearmoe.benchmark.floors import softmax_twin
from torchlinearmoe.errors import UserError
from torchlinearmoe.recipe import load_recipe

RECIPE = "recipes/quickstart.toml"
TINY = ["model.hidden_size=32", "model.num_layers=2", "model.num_heads=2", "model.num_kv_heads=1", "model.head_dim=16"]
TINY += ["model.layout=LN", "moe.num_experts=4", "moe.hidden_size=16"]
DENSE = [*(key for key in TINY if not key.startswith("moe.")), "moe.num_experts=0", "moe.top_k=0"]


def options(*overrides: str, shape: list[str] = TINY) -> dict:
    return {"recipe": RECIPE, "overrides": [*shape, *overrides], "sequences": 1, "length": 32, "steps": 3} | {
        "profile": False,
        "compile": False,
        "graphs": False,
    }


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("moe.latent_size=8", "moe.latent_size = 8"),
        ("moe.score=sigmoid", "moe.score = 'sigmoid'"),
        ("model.feed_forwards=E-", "model.feed_forwards = 'E-'"),
        ("model.activation=relu2", "model.activation = 'relu2'"),
        ("model.norm_placement=post", "model.norm_placement = 'post'"),
        ("mixer.softmax_attention.window=8", "mixer.softmax_attention.window = 8"),
        ("model.family=deepseek_v2", "mla in its N layers"),
    ],
)
@pytest.mark.parametrize("peer", [train_transformers, train_torchtitan])
def test_what_a_peer_does_not_have_is_named(peer, override: str, said: str) -> None:
    pytest.importorskip("transformers")
    with pytest.raises(UserError, match="leave it out of --contestants") as refused:
        peer.measure(options(override))
    assert said in str(refused.value)


def test_heads_of_another_width_are_not_those_of_transformers() -> None:
    pytest.importorskip("transformers")
    with pytest.raises(UserError, match=r"model\.head_dim = 8"):
        train_transformers.measure(options("model.head_dim=8"))


@pytest.mark.parametrize(
    "shape",
    [[*TINY, "moe.first_dense_layers=1"], *(pytest.param(shape, marks=pytest.mark.slow) for shape in (TINY, DENSE))],
)
def test_the_model_of_transformers_has_as_many_parameters_as_ours(shape: list[str]) -> None:
    pytest.importorskip("transformers")
    found = run_contestant("torchlinearmoe.benchmark.train_transformers", options(shape=shape), 120)
    recipe = load_recipe(RECIPE, [*shape, "mixer.softmax_attention.qkv_bias=true"]).model
    ours = sum(parameter.numel() for parameter in softmax_twin(recipe).parameters())
    gates = 0  # of shared experts, which this model always has
    if recipe.moe.num_experts and not recipe.moe.shared_gate:
        gates = (recipe.num_layers - recipe.moe.first_dense_layers) * recipe.hidden_size
    assert found["parameters"] * 1e9 == pytest.approx(ours + gates, abs=0.5)
