"""A model that starts from another takes what means the same in it, says so, and refuses what would not."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from published_cases import make, random_tokens, save
from torch import Tensor

from torchlinearmoe import MIXERS, build_model, load_model
from torchlinearmoe.checkpoint import CheckpointManager
from torchlinearmoe.checkpoint.huggingface.importing import import_directory
from torchlinearmoe.checkpoint.huggingface.weights import PublishedWeights
from torchlinearmoe.checkpoint.initial import InitialWeights
from torchlinearmoe.checkpoint.model import model_files
from torchlinearmoe.checkpoint.transplant import describe
from torchlinearmoe.data.tokenizer import load_tokenizer
from torchlinearmoe.errors import RecipeError, UserError
from torchlinearmoe.models.decoder import Decoder
from torchlinearmoe.recipe import Recipe, resolve

MODEL = {
    "hidden_size": 32,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "ffn_hidden_size": 48,
    "vocab_size": 96,
    "rope_theta": 5e5,
    "norm_eps": 1e-6,
}
MOE = {"num_experts": 4, "top_k": 2, "hidden_size": 16, "shared_hidden_size": 24, "shared_gate": True}
DENSE = {"num_experts": 0, "top_k": 0, "hidden_size": 0}
HEADS = {"heads": 4, "head_dim": 8}


def recipe_of(source: Path, moe: dict[str, Any], mixer: str = "gla", noise: float = 0.0, **model: Any) -> Recipe:
    options = {**HEADS, "expand_k": 1.0} if mixer == "gla" else HEADS
    return resolve(
        {
            "model": {**MODEL, "mixer": mixer, "layout": "LN", **model},
            "moe": moe,
            "mixer": {mixer: options},
            "training": {"steps": 1, "seed": 7},
            "checkpoint": {"init_from": str(source), "upcycle_noise": noise},
        }
    )


def start(recipe: Recipe) -> tuple[Decoder, InitialWeights]:
    initial = InitialWeights(recipe)
    model = build_model(recipe.model, recipe.training.seed)
    initial.load(model)
    return model.eval(), initial


def repeated(weight: Tensor) -> Tensor:
    """Two heads of 8 as four, each twice."""
    return weight.unflatten(0, (2, 8)).repeat_interleave(2, 0).flatten(0, 1)


@pytest.fixture(scope="module")
def sparse(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(make("qwen2_moe"), tmp_path_factory.mktemp("sparse"))


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(make("qwen2"), tmp_path_factory.mktemp("dense"))


def test_a_hybrid_takes_all_but_what_its_linear_layers_have_of_their_own(sparse: Path, tmp_path: Path) -> None:
    import_directory(sparse, tmp_path / "checkpoint")
    source = load_model(tmp_path / "checkpoint").state_dict()
    recipe = recipe_of(sparse, MOE)
    model, initial = start(recipe)
    drawn = build_model(recipe.model, 7).state_dict()
    fresh = {f"layers.0.mixer.{n}" for n in ("g_proj.weight", "decay_down.weight", "decay_up.weight", "decay_up.bias")}
    fresh.add("layers.0.mixer.norm.weight")
    assert initial.plan.fresh.keys() == fresh
    for name, value in model.state_dict().items():
        if name in fresh:
            assert torch.equal(value, drawn[name]), name
        elif name in ("layers.0.mixer.k_proj.weight", "layers.0.mixer.v_proj.weight"):
            assert torch.equal(value, repeated(source[name])), name
        else:
            assert torch.equal(value, source[name]), name
    assert sorted(initial.plan.unused) == [f"layers.0.mixer.{role}_proj.bias" for role in "kqv"]
    report = "\n".join(initial.describe())
    assert report.startswith(f"32 of 37 tensors from {sparse}: embed.weight, layers.{{0-1}}.mixer_norm.weight")
    assert "initial values (softmax_attention has no such part): layers.{0}.mixer.g_proj.weight" in report
    assert "not taken: layers.{0}.mixer.q_proj.bias" in report


@pytest.mark.parametrize("converted", [False, True])
def test_the_same_layers_make_the_same_model(converted: bool, sparse: Path, tmp_path: Path) -> None:
    """From the directory and from the checkpoint it converts to."""
    source = sparse
    if converted:
        source = tmp_path / "checkpoint"
        import_directory(sparse, source)
    model, initial = start(recipe_of(source, MOE, layout="N"))
    assert not initial.plan.fresh and not initial.plan.unused
    tokens = random_tokens(2, 40)
    torch.testing.assert_close(model(tokens), make("qwen2_moe")(tokens).logits, atol=1e-4, rtol=0)


def test_experts_made_of_a_dense_feed_forward_compute_what_it_did(dense: Path) -> None:
    """With the chosen weights summing to one; noise then tells the experts apart."""
    moe = {**MOE, "hidden_size": 48, "shared_hidden_size": 0, "shared_gate": False, "renormalize": True}
    model, initial = start(recipe_of(dense, moe, layout="N"))
    assert initial.plan.upcycled == {f"layers.{i}.ffn.experts.{n}" for i in (0, 1) for n in ("gate_up", "down")}
    assert set(initial.plan.fresh) == {f"layers.{i}.ffn.router.weight" for i in (0, 1)}
    tokens = random_tokens(2, 40)
    torch.testing.assert_close(model(tokens), make("qwen2")(tokens).logits, atol=1e-4, rtol=0)

    noisy, _ = start(recipe_of(dense, moe, layout="N", noise=0.01))
    for name in initial.plan.upcycled:
        noise = noisy.get_parameter(name) - model.get_parameter(name)
        assert 0.009 < noise.std() < 0.011 and not torch.equal(noise[0], noise[1])
    again, _ = start(recipe_of(dense, moe, layout="N", noise=0.01))
    assert all(torch.equal(a, b) for a, b in zip(noisy.parameters(), again.parameters()))


def test_experts_without_gates_are_made_of_a_feed_forward_without(tmp_path: Path) -> None:
    source = save(make("nemotron_h dense"), tmp_path / "dense")
    model = PublishedWeights(source).recipe.model
    apart = ("moe", "mixer_options", "mixers", "embed_init_std")
    own = {key: value for key, value in vars(model).items() if key not in apart}
    moe = {"num_experts": 4, "top_k": 2, "hidden_size": 48, "shared_hidden_size": 0, "renormalize": True}

    def grown(**more: Any) -> Recipe:
        tables = {
            "model": own | {"feed_forwards": model.feed_forwards.replace("-", "E")},
            "moe": {**moe, "score": "softmax", "routed_scaling": 1.0, "latent_size": 0, **more},
            "mixer": {name: vars(model.mixer_options[name]) for name in ("mamba2", "softmax_attention")},
            "training": {"steps": 1},
            "checkpoint": {"init_from": str(source)},
        }
        return resolve(tables)

    sparse, initial = start(grown())
    assert initial.plan.upcycled == {
        f"layers.{layer}.ffn.experts.{name}" for layer in (0, 1) for name in ("up", "down")
    }
    tokens = random_tokens(2, 40)
    torch.testing.assert_close(sparse(tokens), make("nemotron_h dense")(tokens).logits, atol=1e-4, rtol=0)
    with pytest.raises(RecipeError, match="moe.latent_size = 8: .* has 0"):
        start(grown(latent_size=8))


def test_a_tied_embedding_becomes_an_untied_head(tmp_path: Path) -> None:
    source = save(make("qwen2 tied"), tmp_path / "tied")
    model, initial = start(recipe_of(source, DENSE, layout="N", tie_embeddings=False))
    assert not initial.plan.fresh and torch.equal(model.get_parameter("head.weight"), model.embed.weight)


def test_an_own_checkpoint_gives_its_linear_layers_too(tmp_path: Path) -> None:
    tables = {"model": {**MODEL, "mixer": "hgrn2", "layout": "LN"}, "moe": MOE, "training": {"steps": 1}}
    recipe = resolve({**tables, "mixer": {"hgrn2": HEADS}})
    trained = build_model(recipe.model, 1)
    files = model_files(recipe, load_tokenizer())
    CheckpointManager(tmp_path, 1).save(4, trained, None, {}, files, blocking=True)
    model, initial = start(recipe_of(tmp_path / "step-4", MOE, mixer="hgrn2"))
    assert not initial.plan.fresh
    for name, value in trained.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    other, initial = start(recipe_of(tmp_path / "step-4", MOE))
    taken = {f"layers.0.mixer.{mine}.weight": theirs for mine, theirs in (("q_proj", "q_proj"), ("v_proj", "i_proj"))}
    for name, theirs in taken.items():
        assert torch.equal(other.get_parameter(name), trained.get_parameter(f"layers.0.mixer.{theirs}.weight"))
    assert initial.plan.fresh["layers.0.mixer.k_proj.weight"] == "hgrn2 has no such part"


@pytest.mark.parametrize(
    ("model", "moe", "wanted"),
    [
        ({"hidden_size": 64, "head_dim": 16}, {}, "model.hidden_size = 64: .* has 32"),
        ({"vocab_size": 97}, {}, "model.vocab_size = 97: .* has 96"),
        ({"num_layers": 3}, {}, "model.num_layers = 3: .* has 2"),
        ({"norm_eps": 1e-5}, {}, "model.norm_eps = 1e-05: .* has 1e-06"),
        ({"norm_placement": "post"}, {}, "model.norm_placement = 'post': .* has 'pre'"),
        ({"attention_norm_placement": "stream"}, {}, "model.attention_norm_placement = 'stream': .* has 'pre'"),
        ({"linear_scales": [2.0, 1.0]}, {}, r"model.linear_scales = \[2.0, 1.0\]: .* has \[1.0, 1.0\]"),
        ({"ffn_scales": [1.0, 0.5]}, {}, r"model.ffn_scales = \(1.0, 0.5\): .* has \(1.0, 1.0\)"),
        ({"rope_theta": 1e4}, {}, "model.rope_theta = 10000.0: .* has 500000.0"),
        ({"num_kv_heads": 4}, {}, "model.num_kv_heads = 4: .* has 2"),
        ({"tie_embeddings": True}, {}, "model.tie_embeddings = True: .* has False"),
        ({}, {"renormalize": True}, "moe.renormalize = True: .* has False"),
        ({}, {"num_experts": 8}, "moe.num_experts = 8: .* has 4"),
        ({}, {"hidden_size": 48}, "moe.hidden_size = 48: .* has 16"),
    ],
)
def test_what_would_compute_something_else_is_named(
    model: dict[str, Any], moe: dict[str, Any], wanted: str, sparse: Path
) -> None:
    with pytest.raises(RecipeError, match=wanted):
        InitialWeights(recipe_of(sparse, {**MOE, **moe}, **model))


@pytest.mark.parametrize(("case", "wanted"), [("olmo_hybrid", "model.norm_placement = 'pre': .* has 'post'")])
def test_a_linear_layer_has_its_norms_where_the_softmax_layer_had_them(case: str, wanted: str, tmp_path: Path) -> None:
    import_directory(save(make(case), tmp_path / "published"), tmp_path / "checkpoint")
    tables = tomllib.loads((tmp_path / "checkpoint" / "recipe.toml").read_text())
    tables["checkpoint"] = {"init_from": str(tmp_path / "checkpoint")}
    InitialWeights(resolve(tables))
    tables["model"]["layout"] = "L"
    with pytest.raises(RecipeError, match=wanted):
        InitialWeights(resolve(tables))


def test_a_mixer_with_other_options_is_named(sparse: Path) -> None:
    tables = {"model": {**MODEL, "layout": "N"}, "moe": MOE, "mixer": {"softmax_attention": {"window": 8}}}
    recipe = resolve({**tables, "training": {"steps": 1}, "checkpoint": {"init_from": str(sparse)}})
    with pytest.raises(RecipeError, match="mixer.softmax_attention.window = 8: .* has 0"):
        InitialWeights(recipe)


@pytest.mark.parametrize("width", [6, 8])
def test_a_hybrid_of_latent_attention_takes_its_latent_layers(width: int, tmp_path: Path) -> None:
    """And the output projection of the others, where the values of all heads are as wide."""
    source = save(make("deepseek_v2"), tmp_path / "latent")
    import_directory(source, tmp_path / "checkpoint")
    whole = load_model(tmp_path / "checkpoint").state_dict()
    tables = tomllib.loads((tmp_path / "checkpoint" / "recipe.toml").read_text())
    tables["model"] |= {"mixer": "gla", "layout": "LN"}
    tables["mixer"]["gla"] = {"heads": 4, "head_dim": width}
    tables["checkpoint"]["init_from"] = str(source)
    model, initial = start(resolve(tables))
    output = "layers.0.mixer.o_proj.weight"
    for name, value in whole.items():
        if not name.startswith("layers.0.mixer.") or (name == output and width == 6):
            assert torch.equal(model.state_dict()[name], value), name
    others = {name for name in model.state_dict() if name.startswith("layers.0.mixer.")}
    assert initial.plan.fresh.keys() == others - ({output} if width == 6 else set())
    if width == 8:
        assert initial.plan.fresh[output] == "mla has [32, 24], not [32, 32]"


def test_linear_layers_need_no_heads_like_the_source(sparse: Path) -> None:
    start(recipe_of(sparse, MOE, layout="L", num_kv_heads=4, rope_theta=1e4))


def test_a_dense_feed_forward_of_another_width_is_named(dense: Path, sparse: Path) -> None:
    with pytest.raises(RecipeError, match="moe.hidden_size = 16: .* has 48"):
        InitialWeights(recipe_of(dense, MOE))
    with pytest.raises(RecipeError, match="model.ffn_hidden_size = 40: .* has 48"):
        InitialWeights(recipe_of(dense, DENSE, ffn_hidden_size=40))
    with pytest.raises(RecipeError, match="checkpoint.upcycle_noise = 0.1: no expert is made"):
        InitialWeights(recipe_of(sparse, MOE, noise=0.1))


def test_a_source_that_is_none_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="checkpoint.init_from = '.*nowhere': no such folder"):
        InitialWeights(recipe_of(tmp_path / "nowhere", MOE))
    with pytest.raises(UserError, match="cannot read state.json"):
        InitialWeights(recipe_of(tmp_path, MOE))


@pytest.mark.parametrize("name", MIXERS)
def test_the_projections_that_a_mixer_names_are_there(name: str) -> None:
    recipe = resolve({"model": {"mixer": name, "layout": "L", "num_layers": 2}, "training": {"steps": 1}})
    mixer = build_model(recipe.model).get_submodule("layers.1.mixer")
    parameters = dict(mixer.named_parameters())
    for role, module in MIXERS[name].projections.items():
        assert role in "qkvo" and f"{module}.weight" in parameters, (role, module)


def test_layers_are_told_together() -> None:
    from torchlinearmoe.checkpoint.transplant import Transplant

    fresh = {f"layers.{i}.a": "why" for i in (0, 1, 2, 5)} | {"b": "why", "layers.11.c": "other"}
    assert describe(Transplant(fresh=fresh), "here") == [
        "0 of 6 tensors from here: ",
        "  initial values (why): layers.{0-2,5}.a, b",
        "  initial values (other): layers.{11}.c",
    ]
