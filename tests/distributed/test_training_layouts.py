"""One process, FSDP, FSDP with replicas, accumulation and compilation train the same model on the same data."""

from pathlib import Path

import pytest
import torch
from harness import RankPool
from tiny_run import Result, Settings, assert_same_training, every_run, run, settings, write_corpus

DEEP: Settings = {"model": {"layout": "LLLN", "num_layers": 4}}
HYBRID: Settings = {"model": {"layout": "LN", "num_layers": 2}}
COMPILED: Settings = {"training": {"compile": True, "compile_backend": "aot_eager"}}
MIXERS: dict[str, Settings] = {
    "hgrn2": DEEP,
    "gated_delta_net": HYBRID,
    "linear_attention": HYBRID,
    "softmax_attention": HYBRID,
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"), documents=150)


def with_mixer(name: str) -> Settings:
    return {"model": {"mixer": name}}


@pytest.mark.parametrize("mixer", every_run(MIXERS, "hgrn2"))
def test_shards_and_replicas_train_as_one_process_does(
    ranks: RankPool, corpus: Path, tmp_path: Path, mixer: str
) -> None:
    far: Settings = {"training": {"steps": 5}, "optimizer": {"lr": 3e-3}}

    def train(size: int, *changes: Settings) -> list[Result]:
        changes = (MIXERS[mixer], with_mixer(mixer), far, *changes)
        return ranks(size, run, settings(corpus, tmp_path / f"{size}", *changes))

    (one,) = train(1)
    two, four = train(2), train(4, {"parallel": {"data_replicate": 2}})
    assert one.column("loss")[-1] < one.column("loss")[0] - 0.1  # the parameters moved a long way together
    for results in (two, four):
        for result in results:
            assert_same_training(result, one)
        for step, rows in one.rows.items():
            assert sorted(row for result in results for row in result.rows[step]) == sorted(rows)


@pytest.mark.parametrize("mixer", every_run([*MIXERS, "rwkv7"], "linear_attention", slow=["hgrn2"]))
def test_compiled_regions_under_fsdp_train_as_one_eager_process_does(
    ranks: RankPool, corpus: Path, tmp_path: Path, mixer: str
) -> None:
    # Two linear layers: the bounds of a lone HGRN2 layer have no gradient, RWKV7's values go from one to the next.
    layers: Settings = {"model": {"layout": "LLN", "num_layers": 3}}
    changes = (layers, with_mixer(mixer), {"training": {"steps": 2}})
    (one,) = ranks(1, run, settings(corpus, tmp_path / "eager", *changes))
    assert one.graphs == 0
    for result in ranks(2, run, settings(corpus, tmp_path / "compiled", *changes, COMPILED)):
        assert_same_training(result, one)
        # Layers of one mixer share their graphs: about ten regions, in training and perhaps in evaluation.
        assert 10 <= result.graphs <= 30 and not result.graph_breaks, (result.graphs, result.graph_breaks)


BALANCES: dict[str, Settings] = {
    "sequence": {"moe": {"balance": "loss", "balance_scope": "sequence"}},
    "global": {"moe": {"balance": "loss", "balance_scope": "global"}},
    "bias": {"moe": {"balance": "bias", "bias_rate": 0.01}},
}


@pytest.mark.parametrize("balance", every_run(BALANCES, "global", "bias"))
def test_accumulation_and_balance_do_not_depend_on_the_cut(
    ranks: RankPool, corpus: Path, tmp_path: Path, balance: str
) -> None:
    def train(size: int, micro_batch_size: int, *changes: Settings) -> Result:
        output = tmp_path / f"{size}-{micro_batch_size}"
        changes = (HYBRID, with_mixer("linear_attention"), BALANCES[balance], *changes)
        cut: Settings = {"training": {"micro_batch_size": micro_batch_size, "tokens_per_step": 8 * 48, "steps": 2}}
        return ranks(size, run, settings(corpus, output, cut, *changes))[0]

    whole = train(1, 8)
    biases = [name for name in whole.state if name.endswith("expert_bias")]
    assert len(biases) == (2 if balance == "bias" else 0)
    for cut in (train(1, 2), train(4, 1, {"parallel": {"data_replicate": 2}})):
        assert_same_training(cut, whole)
        for name in biases:
            assert whole.state[name].abs().max() > 0.005
            assert torch.equal(cut.state[name], whole.state[name])
        for key in ("moe/max_load", "moe/balance_loss", "moe/z_loss", "moe/entropy"):
            assert cut.column(key) == pytest.approx(whole.column(key), rel=1e-5), key


VARIANTS: dict[str, Settings] = {
    "tied embeddings, weights kept gathered": {
        "model": {"tie_embeddings": True},
        "parallel": {"reshard_after_forward": False},
    },
    "dense feed-forward": {"model": {"ffn_hidden_size": 48}, "moe": {"num_experts": 0}},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_way_to_group_weights_trains_as_one_process_does(
    ranks: RankPool, corpus: Path, tmp_path: Path, variant: str
) -> None:
    changes = (HYBRID, with_mixer("gated_delta_net"), {"training": {"steps": 2}}, VARIANTS[variant])
    (one,) = ranks(1, run, settings(corpus, tmp_path / "one", *changes))
    for result in ranks(2, run, settings(corpus, tmp_path / "two", *changes)):
        assert_same_training(result, one)


def test_bf16_gradients_are_summed_in_float32(ranks: RankPool, corpus: Path, tmp_path: Path) -> None:
    # A micro-batch is rounded the same way wherever it runs; sums in bf16 would depend on the cut by about 1e-3.
    def train(size: int, *changes: Settings) -> list[Result]:
        bf16: Settings = {"training": {"dtype": "bfloat16", "steps": 1, "tokens_per_step": 4 * 48}}
        changes = ({"model": {"layout": "LLN", "num_layers": 3}}, bf16, *changes)
        return ranks(size, run, settings(corpus, tmp_path / f"{size}", *changes))

    (one,) = train(1)
    results = train(4, {"parallel": {"data_replicate": 2}})
    for name, gradient in one.gradients.items():
        distance = (results[0].gradients[name] - gradient).norm() / gradient.norm()
        assert distance < 1e-5, f"gradient of {name}: {distance:.1e}"
        assert gradient.dtype == torch.float32
    assert results[0].column("loss") == pytest.approx(one.column("loss"), rel=1e-6)
