"""A directory as it was released is read as the one that transformers saves again; what is left out is said."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from published_cases import as_released, in_float64, make, make_exact, random_tokens, released_name, save, set_slopes
from safetensors.torch import load_file, save_file
from torch import Tensor

from torchlinearmoe import load_model
from torchlinearmoe.checkpoint.huggingface.config import read_recipe, write_config
from torchlinearmoe.checkpoint.huggingface.importing import import_directory
from torchlinearmoe.checkpoint.huggingface.weights import PublishedWeights
from torchlinearmoe.convert import main as convert
from torchlinearmoe.errors import UserError
from torchlinearmoe.models.layer_mixers import layer_mixers
from torchlinearmoe.recipe import ModelRecipe

Tensors = dict[str, Tensor]
Config = dict[str, Any]


def directory(case: str, folder: Path, change: Callable[[Config, Tensors], tuple[Config, Tensors]]) -> Path:
    """A case's directory in another spelling."""
    save(make(case), folder)
    config = json.loads((folder / "config.json").read_text())
    config, tensors = change(config, load_file(folder / "model.safetensors"))
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / "model.safetensors")
    return folder


def assert_same_model(found: PublishedWeights, expected: PublishedWeights) -> None:
    assert found.recipe.model == expected.recipe.model and found.shapes == expected.shapes
    for name, shape in expected.shapes.items():
        zeros = (0,) * len(shape)
        assert torch.equal(found.read(name, zeros, shape), expected.read(name, zeros, shape)), name


def with_pictures(config: Config, tensors: Tensors) -> tuple[Config, Tensors]:
    """The whole Qwen3.5: text nested, experts stacked, a vision tower and a head for further tokens."""
    text = {**config, "model_type": "qwen3_5_moe_text", "mtp_num_hidden_layers": 1}
    text["rope_parameters"] = {**text["rope_parameters"], "mrope_section": [1, 1, 0], "mrope_interleaved": True}
    del text["architectures"], text["layer_types"]
    text |= {"full_attention_interval": 2, "num_hidden_layers": 3}
    whole = {
        "architectures": ["Qwen3_5MoeForConditionalGeneration"],
        "text_config": text,
        "vision_config": {"depth": 2},
    }
    found: Tensors = {"mtp.fc.weight": torch.ones(2, 2), "model.visual.patch_embed.proj.bias": torch.ones(3)}
    for name, value in tensors.items():
        if ".experts." not in name:
            found[name.replace("model.", "model.language_model.", 1)] = value
    for layer in range(3):
        path = f"model.layers.{layer}.mlp.experts"
        parts = {
            n: torch.stack([tensors[f"{path}.{e}.{n}_proj.weight"] for e in range(4)]) for n in ("gate", "up", "down")
        }
        path = path.replace("model.", "model.language_model.", 1)
        found[f"{path}.gate_up_proj"] = torch.cat([parts["gate"], parts["up"]], 1)
        found[f"{path}.down_proj"] = parts["down"]
    return whole, found


def with_a_layer_beyond(config: Config, tensors: Tensors) -> tuple[Config, Tensors]:
    last = config["num_hidden_layers"]
    return config, {**tensors, f"model.layers.{last}.eh_proj.weight": torch.ones(4, 8)}


def as_remote_code_has_it(config: Config, tensors: Tensors) -> tuple[Config, Tensors]:
    """Kimi Linear's own keys: layers counted from one, the options of linear layers in a table of their own."""
    names = {
        "max_position_embeddings": "model_max_length",
        "norm_topk_prob": "moe_renormalize",
        "n_group": "num_expert_group",
        "num_local_experts": "num_experts",
        "num_experts_per_tok": "num_experts_per_token",
        "n_shared_experts": "num_shared_experts",
    }
    told = {names.get(key, key): value for key, value in config.items()}
    linear = {"full_attn_layers": [2], "kda_layers": [1, 3], "head_dim": 8, "num_heads": 4, "short_conv_kernel_size": 4}
    for key in ("layer_types", "mlp_layer_types", "linear_head_dim", "linear_num_heads", "linear_conv_kernel_dim"):
        told.pop(key, None)
    told |= {"linear_attn_config": linear, "first_k_dense_replace": 1, "head_dim": 72, "mla_use_nope": True}
    told |= {"moe_router_activation_func": "sigmoid", "moe_layer_freq": 1}
    return told, {released_name("kimi_linear", name): value for name, value in tensors.items()}


def without_layer_types(config: Config, tensors: Tensors) -> tuple[Config, Tensors]:
    del config["layer_types"]
    return {**config, "full_attention_interval": 2}, {**tensors, "mtp.norm.weight": torch.ones(2)}


def in_words_of_minimax(config: Config, tensors: Tensors) -> tuple[Config, Tensors]:
    """The keys of MiniMax-Text-01's own code; of a head's 12 channels 6 are rotated."""
    told = {key: value for key, value in config.items() if not key.endswith("_factor")}
    kinds = told.pop("layer_types")
    told |= {"attn_type_list": [int(kind == "full_attention") for kind in kinds], "postnorm": True, "rotary_dim": 6}
    told |= {"architectures": ["MiniMaxText01ForCausalLM"], "shared_intermediate_size": 0}
    words = {"linear_attn": "linear_attention", "full_attn": "full_attention", "mlp": "mlp"}
    for theirs, ours in words.items():
        told |= {f"layernorm_{ours}_{name}": config[f"{theirs}_{name}_factor"] for name in ("alpha", "beta")}
    return told, tensors


def test_minimax_as_released_is_transformers_with_the_slopes_of_the_paper_and_half_rotations(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers.models.minimax import modeling_minimax

    path = directory("minimax", tmp_path / "released", in_words_of_minimax)
    weights = PublishedWeights(path)
    assert sum(weights.ignored.values()) == 2 * 4
    import_directory(path, tmp_path / "checkpoint")
    model = make_exact("minimax")
    config, rotate = model.config, modeling_minimax.apply_rotary_pos_emb
    for index in (0, 2):
        layer = model.model.layers[index].self_attn
        slopes = 2.0 ** (-8 * torch.arange(1, 5, dtype=torch.float64) / 4)
        set_slopes(layer, (slopes * (1 - index / 2 + 1e-5))[:, None, None])
    with in_float64():
        model.model.rotary_emb = type(model.model.rotary_emb)(
            config=type(config)(**{**config.to_dict(), "head_dim": 6})
        )

    def half(q: Tensor, k: Tensor, cosines: Tensor, sines: Tensor) -> tuple[Tensor, ...]:
        turned = rotate(q[..., :6], k[..., :6], cosines, sines)
        return tuple(torch.cat([first, x[..., 6:]], -1) for first, x in zip(turned, (q, k)))

    monkeypatch.setattr(modeling_minimax, "apply_rotary_pos_emb", half)
    tokens = random_tokens(2, 70)
    with in_float64():
        expected = model(tokens).logits
    ours = load_model(tmp_path / "checkpoint").double()
    torch.testing.assert_close(ours(tokens), expected, atol=1e-11, rtol=0)
    followed = read_recipe(Path(), config_of("minimax", rotary_dim=6)).model.mixer_options["softmax_attention"]
    assert followed == weights.recipe.model.mixer_options["softmax_attention"]
    told = write_config(weights.recipe.model)
    assert told is not None and told["architectures"] == ["MiniMaxText01ForCausalLM"]
    assert read_recipe(Path(), told).model == weights.recipe.model
    capsys.readouterr()
    assert convert(["to-hf", str(tmp_path / "checkpoint"), str(tmp_path / "again")]) == 0
    assert "MiniMaxText01ForCausalLM\nnext: transformers knows it by the release's own code" in capsys.readouterr().out


def cut_by_widths(config: Config, tensors: Tensors) -> tuple[Config, Tensors]:
    """OLMo Hybrid's convolutions, which transformers saves in thirds, and positions that an older key leaves out."""
    told = {key: value for key, value in config.items() if key != "rope_parameters"}
    return {**told, "rope_theta": None}, as_released("olmo_hybrid", tensors)


def in_words_of_ling(config: Config, tensors: Tensors) -> tuple[Config, Tensors]:
    """Ling 3.0's other name and usual keys, a group of layers in the place of a list, a layer for further tokens."""
    names = {
        "model_max_length": "max_position_embeddings",
        "moe_renormalize": "norm_topk_prob",
        "num_expert_group": "n_group",
        "num_experts_per_token": "num_experts_per_tok",
    }
    told = {names.get(key, key): value for key, value in config.items() if not key.startswith("linear_")}
    for key in ("layer_types", "mlp_layer_types", "kda_safe_gate", "kda_lower_bound"):
        del told[key]
    told |= {"layer_group_size": 2, "first_k_dense_replace": 1, "head_dim": 8, "partial_rotary_factor": 0.5}
    told["rope_parameters"] = {**told["rope_parameters"], "partial_rotary_factor": 0.5}
    return with_a_layer_beyond({**told, "architectures": ["BailingMoeV3ForCausalLM"]}, tensors)


def as_granite_was_released(config: Config, tensors: Tensors) -> tuple[Config, Tensors]:
    """Older words for layers, no bounds of step sizes, and what transformers leaves null."""
    words = {"linear_attention": "mamba", "full_attention": "attention"}
    told = {**config, "layers_block_type": [words[kind] for kind in config["layer_types"]]}
    told |= {"mamba_d_head": "auto", "position_embedding_type": "nope", "num_key_value_heads": 2, "init_method": "mup"}
    for key in ("layer_types", "time_step_limit", "rope_parameters"):
        del told[key]
    return told | {"rope_theta": 10000, "rope_scaling": None}, tensors


def as_nemotron_was_released(config: Config, tensors: Tensors) -> tuple[Config, Tensors]:
    """A pattern in the place of a list, keys of the remote code, and a head for further tokens."""
    letters = {"linear_attention": "M", "full_attention": "*", "moe": "E", "mlp": "-"}
    told = {**config, "hybrid_override_pattern": "".join(letters[kind] for kind in config["layers_block_type"])}
    told |= {"num_hidden_layers": 5, "mamba_num_groups": told.pop("n_groups"), "norm_eps": 1e-5, "rope_theta": 10000}
    told |= {"mamba_state_dim": told.pop("ssm_state_size"), "partial_rotary_factor": 1.0, "num_nextn_predict_layers": 1}
    for key in ("layers_block_type", "layer_norm_epsilon", "n_group", "n_shared_experts"):
        del told[key]
    return told, {**tensors, "mtp.layers.0.mixer.q_proj.weight": torch.ones(2, 2)}


def with_another_pattern(config: Config, tensors: Tensors) -> tuple[Config, Tensors]:
    """The older words of `layers_block_type`."""
    words = {"linear_attention": "mamba", "full_attention": "attention"}
    return {**config, "layers_block_type": [words.get(kind, kind) for kind in config["layers_block_type"]]}, tensors


def with_pictures_and_sound(config: Config, tensors: Tensors) -> tuple[Config, Tensors]:
    """Nemotron 3 Nano Omni: the text model nested, its tensors behind a prefix."""
    told = {"architectures": ["NemotronH_Nano_Omni_Reasoning_V3"], "llm_config": config, "vision_config": {}}
    found = {f"language_model.{name}": value for name, value in tensors.items()}
    return told, {**found, "mlp1.1.weight": torch.ones(2, 2), "sound_encoder.encoder.x": torch.ones(3)}


SPELLINGS = {
    "qwen3_5_moe": (with_pictures, {r"mtp..*": 1, r"model.visual..*": 1}),
    "deepseek_v3": (with_a_layer_beyond, {"model.layers.2+..*": 1}),
    "glm4_moe": (with_a_layer_beyond, {"model.layers.2+..*": 1}),
    "kimi_linear": (as_remote_code_has_it, {}),
    "olmo_hybrid": (cut_by_widths, {}),
    "bailing_hybrid": (in_words_of_ling, {"model.layers.3+..*": 1}),
    "qwen3_next": (without_layer_types, {r"mtp..*": 1}),
    "granitemoehybrid": (as_granite_was_released, {}),
    "nemotron_h": (as_nemotron_was_released, {r"mtp..*": 1}),
    "nemotron_h latent": (with_another_pattern, {}),
    "nemotron_h dense": (
        with_pictures_and_sound,
        {r"(vision_model|vision_projector|mlp1|sound_encoder|sound_projection)..*": 2},
    ),
}


@pytest.mark.parametrize("case", SPELLINGS)
def test_a_released_directory_is_the_model_that_transformers_saves(case: str, tmp_path: Path) -> None:
    change, ignored = SPELLINGS[case]
    found = PublishedWeights(directory(case, tmp_path / "released", change))
    assert_same_model(found, PublishedWeights(save(make(case), tmp_path / "saved")))
    assert found.ignored == ignored


def test_convolutions_that_do_not_add_up_are_named(tmp_path: Path) -> None:
    def longer(config: Config, tensors: Tensors) -> tuple[Config, Tensors]:
        name = "model.layers.0.linear_attn.k_conv1d.weight"
        return config, {**tensors, name: torch.cat([tensors[name], tensors[name][:1]])}

    with pytest.raises(UserError, match=r"'model\.layers\.0\.linear_attn\.q_conv1d\.weight' has shape \[32, 1, 4\]"):
        PublishedWeights(directory("olmo_hybrid", tmp_path / "longer", longer))


def test_a_hybrid_of_few_layers_has_one_of_softmax_attention() -> None:
    config = config_of("olmo_hybrid", layer_types="absent")
    assert layer_mixers(read_recipe(Path(), config).model) == ["gated_delta_net"] * 2 + ["softmax_attention"]


def test_an_import_says_what_it_leaves_out_and_nothing_else_is(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        import_directory(directory("glm4_moe", tmp_path / "published", with_a_layer_beyond), tmp_path / "checkpoint")
    assert [line for line in caplog.messages if "left out: 1 tensors model.layers.2+" in line]

    def with_another(config: Config, tensors: Tensors) -> tuple[Config, Tensors]:
        return config, {**tensors, "model.layers.1.eh_proj.weight": torch.ones(4, 8)}

    with pytest.raises(UserError, match=r"holds 'model\.layers\.1\.eh_proj\.weight', which no model"):
        PublishedWeights(directory("glm4_moe", tmp_path / "other", with_another))


@pytest.mark.parametrize(
    ("case", "kept"),
    [
        ("kimi_linear", ("e_score_correction_bias", "block_sparse_moe.gate.weight", "dt_bias")),
        ("bailing_hybrid", ("expert_bias", "mlp.gate.weight", "dt_bias", "A_log", "_conv1d.weight")),
    ],
)
def test_an_export_into_another_type_keeps_selection_biases(case: str, kept: tuple[str, ...], tmp_path: Path) -> None:
    from torchlinearmoe.checkpoint.huggingface.exporting import export_checkpoint

    import_directory(save(make(case), tmp_path / "published"), tmp_path / "checkpoint")
    export_checkpoint(tmp_path / "checkpoint", tmp_path / "again", dtype=torch.bfloat16)
    tensors = load_file(tmp_path / "again" / "model.safetensors")
    wide = {name for name, value in tensors.items() if value.dtype == torch.float32}
    assert wide == {name for name in tensors if name.endswith(kept)}
    assert all(any(name.endswith(end) for name in wide) for end in kept)


def config_of(case: str, **changes: Any) -> Config:
    config = make(case).config.to_dict()
    names = {"qwen3_next": "Qwen3NextForCausalLM", "kimi_linear": "KimiLinearForCausalLM"}
    names |= {"minimax": "MiniMaxForCausalLM", "olmo_hybrid": "OlmoHybridForCausalLM"}
    names["bailing_hybrid"] = "BailingHybridForCausalLM"
    names |= {"granitemoehybrid": "GraniteMoeHybridForCausalLM", "nemotron_h": "NemotronHForCausalLM"}
    return {
        key: value for key, value in {**config, "architectures": [names[case]], **changes}.items() if value != "absent"
    }


@pytest.mark.parametrize(
    ("case", "changes", "why"),
    [
        (
            "qwen3_next",
            {"layer_types": ["full_attention", "sliding_attention", "full_attention"]},
            "layer_types = .*legal",
        ),
        (
            "qwen3_next",
            {"layer_types": ["full_attention", "linear_attention"]},
            "names 2 layers, num_hidden_layers = 3",
        ),
        ("qwen3_next", {"layer_types": "absent", "full_attention_interval": 0}, "full_attention_interval = 0"),
        ("qwen3_next", {"linear_key_head_dim": 0}, "linear_key_head_dim = 0: must be a whole number above 0"),
        ("qwen3_next", {"rope_parameters": {"partial_rotary_factor": 1.5}}, "partial_rotary_factor = 1.5: must be"),
        ("qwen3_next", {"mlp_only_layers": [0]}, r"mlp_only_layers = \[0\]: not supported"),
        ("kimi_linear", {"layer_types": "absent"}, "linear_attn_config.full_attn_layers = None: must be a list"),
        ("kimi_linear", {"mlp_layer_types": ["sparse", "dense", "sparse"]}, "only the first layers may be dense"),
        ("kimi_linear", {"num_expert_group": "many"}, "num_expert_group = 'many': must be a whole number"),
        (
            "bailing_hybrid",
            {"kda_lower_bound": 0},
            "kda_safe_gate = True, kda_lower_bound = 0: must be a bound below 0",
        ),
        ("bailing_hybrid", {"layer_types": "absent", "layer_group_size": 0}, "layer_group_size = 0: must be a whole"),
        ("bailing_hybrid", {"architectures": ["BailingMoeV2_5ForCausalLM"]}, "BailingMoeV2_5ForCausalLM.*not known"),
        ("olmo_hybrid", {"linear_key_head_dim": 0.5}, "linear_key_head_dim = 0.5: must be a whole number"),
        ("olmo_hybrid", {"attention_bias": True}, "attention_bias = True: not supported"),
        ("minimax", {"sliding_window": 8}, "sliding_window = 8: not supported"),
        ("minimax", {"num_attention_heads": 6}, "num_attention_heads = 6: transformers' slopes are known here"),
        ("minimax", {"head_dim": "wide"}, "head_dim = 'wide': must be whole numbers"),
        ("minimax", {"mlp_beta_factor": 0}, r"model.ffn_scales = \[2.5, 0.0\]: both must be positive"),
        (
            "minimax",
            {"architectures": ["MiniMaxText01ForCausalLM"], "layer_types": "absent", "attn_type_list": [2, 0, 0]},
            r"attn_type_list = \[2, 0, 0\]: must be a list of 0 and 1",
        ),
        ("granitemoehybrid", {"position_embedding_type": "alibi"}, "position_embedding_type = 'alibi': not supported"),
        ("granitemoehybrid", {"attention_multiplier": 0}, "attention_multiplier = 0: must be positive"),
        ("granitemoehybrid", {"residual_multiplier": -1.0}, "model.residual_scale = -1.0: must be positive"),
        ("granitemoehybrid", {"time_step_limit": [0.001, 0.1]}, r"time_step_limit = \[0.001, 0.1\]: not supported"),
        ("granitemoehybrid", {"time_step_limit": "none"}, "time_step_limit = 'none': not supported"),
        ("granitemoehybrid", {"mamba_conv_bias": False}, "mamba_conv_bias = False: not supported"),
        ("granitemoehybrid", {"layer_types": ["mamba", "attention"]}, "names 2 layers, num_hidden_layers = 3"),
        ("nemotron_h", {"layers_block_type": ["moe", "mamba"]}, r"layer_types\[0\] = 'moe': must follow a mixer"),
        (
            "nemotron_h",
            {"layers_block_type": ["mamba", "mlp", "moe"]},
            r"layer_types\[2\] = 'moe': must follow a mixer",
        ),
        ("nemotron_h", {"layers_block_type": ["mamba", "mamba1"]}, "layer_types = .*legal: .*'mlp', 'moe'"),
        ("nemotron_h", {"layers_block_type": "absent"}, "hybrid_override_pattern = None: must be a string over M, "),
        (
            "nemotron_h",
            {"layers_block_type": "absent", "hybrid_override_pattern": "MXE"},
            "'MXE': must be a string over",
        ),
        ("nemotron_h", {"layers_block_type": ["mamba"] * 10_000}, "layer_types: names 10000 layers; at most 8192"),
        ("nemotron_h", {"layers_block_type": ["mamba"] * 8000}, "8000"),
        ("nemotron_h", {"num_hidden_layers": 7}, "names 5 layers, num_hidden_layers = 7"),
        ("nemotron_h", {"mlp_hidden_act": "silu"}, "mlp_hidden_act = 'silu': not supported; legal: 'relu2'"),
        ("nemotron_h", {"moe_shared_expert_intermediate_size": 0}, "every layer of experts has a shared one"),
        ("nemotron_h", {"mamba_head_dim": "auto"}, "mixer.mamba2.head_dim = 'auto'"),
    ],
)
def test_what_means_another_model_is_named(case: str, changes: Config, why: str) -> None:
    with pytest.raises(UserError, match=why):
        read_recipe(Path(), config_of(case, **changes))


def test_a_granite_model_that_no_key_describes_is_not_written_as_another() -> None:
    model = read_recipe(Path(), config_of("granitemoehybrid")).model
    assert write_config(model) is not None

    def with_mamba(**options: Any) -> ModelRecipe:
        mamba = dataclasses.replace(model.mixer_options["mamba2"], **options)
        return dataclasses.replace(model, mixer_options={**model.mixer_options, "mamba2": mamba})

    assert write_config(with_mamba(expand=2.5, heads=10)) is None
    assert write_config(with_mamba(conv=0)) is None
    assert write_config(dataclasses.replace(model, moe=dataclasses.replace(model.moe, shared_hidden_size=0))) is None
    assert write_config(dataclasses.replace(model, mixers=("mamba2", "softmax_attention", "gla"))) is None
    config = write_config(dataclasses.replace(model, moe=dataclasses.replace(model.moe, num_experts=0)))
    assert config is not None and config["shared_intermediate_size"] == model.ffn_hidden_size


def test_a_nemotron_model_that_no_key_describes_is_not_written_as_another() -> None:
    def changed(**changes: Any) -> Config | None:
        model = read_recipe(Path(), config_of("nemotron_h")).model
        moe = {key: changes.pop(key) for key in ("shared_hidden_size", "shared_gate", "score") if key in changes}
        return write_config(dataclasses.replace(model, **changes, moe=dataclasses.replace(model.moe, **moe)))

    found = changed()
    assert found is not None
    assert (found["num_hidden_layers"], found["hybrid_override_pattern"]) == (5, "MEM*E")
    assert found["layers_block_type"] == ["linear_attention", "moe", "linear_attention", "full_attention", "moe"]
    for other in (
        {"shared_hidden_size": 0},
        {"shared_gate": True},
        {"score": "softmax"},
        {"activation": "swiglu"},
        {"residual_scale": 0.5},
        {"mixers": ("mamba2", "mamba2", "gla")},
    ):
        assert changed(**other) is None, other
    dense = changed(feed_forwards="-")
    assert dense is None  # experts that no layer has
    dense = changed(feed_forwards="E-")
    assert dense is not None and dense["hybrid_override_pattern"] == "MEM-*E"


def test_layers_come_as_the_shortest_layout_and_are_written_one_by_one() -> None:
    types = ["linear_attention", "linear_attention", "full_attention"] * 2
    model = read_recipe(Path(), config_of("qwen3_next", layer_types=types, num_hidden_layers=6)).model
    assert (model.layout, model.mixer) == ("LLN", "gated_delta_net")
    assert layer_mixers(model) == ["gated_delta_net", "gated_delta_net", "softmax_attention"] * 2
    config = write_config(model)
    assert config is not None and config["layer_types"] == types
