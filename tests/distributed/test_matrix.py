"""Every mixer and every family under every kind of parallelism trains as one process does.

`pytest -m distributed_full` runs all of it, but for a few cells that always run, and prints the table: the greatest
relative error of the losses and the first gradients, and that of the last gradients, or why a recipe is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial

import pytest
from harness import RankPool
from matrix_run import LENGTH, Trace, distance, joined, trace
from tiny_run import Settings, settings, write_corpus

from torchlinearmoe.errors import RecipeError
from torchlinearmoe.families import FAMILIES
from torchlinearmoe.mixers import MIXERS
from torchlinearmoe.parallel.mesh import resolve_degrees, tokens_per_step
from torchlinearmoe.parallel.pipeline import check_micro_batches
from torchlinearmoe.recipe import resolve
from torchlinearmoe.run_folder import with_tokens_per_step

Layout = tuple[int, dict[str, int]]

SINGLE: dict[str, Layout] = {
    "fsdp 2": (2, {}),
    "hsdp 2x2": (4, {"data_replicate": 2}),
    "tp 2": (2, {"tensor": 2}),
    "cp 2": (2, {"context": 2}),
    "cp 4": (4, {"context": 4}),
    "ep 2": (2, {"expert": 2}),
    "pp 2": (2, {"pipeline": 2}),
}
COMPOSED: dict[str, Layout] = {
    "fsdp 2, cp 2, tp 2, ep 4": (8, {"data_shard": 2, "context": 2, "tensor": 2, "expert": 4}),
    "pp 2, tp 2, fsdp 2, ep 4": (8, {"pipeline": 2, "data_shard": 2, "tensor": 2, "expert": 4}),
}
LAYOUTS = SINGLE | COMPOSED
WIDE = ["fsdp 2", "hsdp 2x2", "tp 2", "cp 4", "ep 2", "pp 2"]
COMPILED = ["fsdp 2", "tp 2", "cp 2", "ep 2"]

# Outputs near zero make a norm a step function, which magnifies the rounding of sums: 1e4-fold in five steps of GLA.
# For some 1e-2 still does; with more, others' gradients of queries become so small that rounding shows in them.
# RWKV's group norms have an epsilon of their own: with weights of 1 / sqrt(width) gradients round up to 30 times finer.
MODEL = {"norm_eps": 1e-2, "num_layers": 3, "layout": "LNL"}
CONDITIONED = {
    "retention": {"norm_eps": 1e-1},
    "rwkv6": {"norm_eps": 1e-1, "init_std": 0.125},
    "rwkv7": {"norm_eps": 1e-1, "init_std": 0.125},
    "family kimi_linear": {"norm_eps": 1e-1},
}
WITH_OWN_EPSILON = {"minimax": "lightning_attention", "olmo_hybrid": "gated_delta_net"}
"""Families whose linear mixer has an epsilon that is not the model's; here it takes that."""
LIMITS = {"float32": (1e-5, 1e-4), "float64": (1e-9, 1e-9)}
"""Of the losses and first gradients, and of the last gradients."""

WITHOUT_EXPERTS = [name for name in FAMILIES if not FAMILIES[name].preset("debug")["moe"]["num_experts"]]
REFUSED = {(f"family {name}", "ep 2") for name in WITHOUT_EXPERTS}
REFUSED |= {(f"published {name}", "ep 2") for name in (*WITHOUT_EXPERTS, "qwen3, dense")}
"""Models without experts; nothing else may be refused."""

full = pytest.mark.distributed_full
PUBLISHED = ("qwen3, dense", "qwen3", "qwen3_next", "qwen3_5_moe", "deepseek_v3", "glm4_moe", "kimi_linear")
PUBLISHED += ("minimax", "olmo_hybrid", "bailing_hybrid", "granitemoehybrid", "nemotron_h")
AXES = ("fsdp 2", "tp 2", "cp 2", "ep 2", "pp 2")
FEW = {("qwen3_next", "cp 2"), ("kimi_linear", "tp 2"), ("glm4_moe", "ep 2")}
FEW |= {("minimax", "tp 2"), ("olmo_hybrid", "tp 2"), ("bailing_hybrid", "cp 2")}
FEW |= {("granitemoehybrid", "pp 2"), ("nemotron_h", "tp 2")}
"""Cells of published models that every run of the tests has."""


def of_mixer(name: str) -> Settings:
    """Two layers of the mixer around softmax attention, all with experts; wide enough for two heads of any mixer."""
    dimensions = {"num_kv_heads": 2, "hidden_size": 64}
    return {"model": {"mixer": name, **dimensions, **MODEL, **CONDITIONED.get(name, {})}}


def of_family(name: str) -> Settings:
    """The family as it comes, a published hybrid with its mixer, but for its layers and the epsilon of its norms."""
    dimensions = dict.fromkeys(("hidden_size", "num_heads", "num_kv_heads"))
    mixer = {"mixer": FAMILIES[name].common["mixer"]} if "mixer" in FAMILIES[name].common else {}
    epsilon = {WITH_OWN_EPSILON[name]: {"norm_eps": 0.0}} if name in WITH_OWN_EPSILON else {}
    return {
        "model": {
            "family": name,
            "size": "debug",
            **dimensions,
            **mixer,
            **MODEL,
            **CONDITIONED.get(f"family {name}", {}),
        },
        "moe": dict.fromkeys(("num_experts", "top_k", "hidden_size", "shared_hidden_size", "shared_gate")),
        "mixer": epsilon,
    }


def of_published(name: str) -> Settings:
    """A published model: its own layers, both kinds where it has two, the first dense where it has such."""
    family, _, dense = name.partition(", ")
    model = of_family(family)
    if "layout" not in FAMILIES[family].common:
        model["model"]["layout"] = "N"
    if dense:
        model["moe"] |= {"num_experts": 0, "top_k": 0, "shared_hidden_size": 0, "shared_gate": False}
    return model


Cell = Callable[..., None]


@pytest.fixture
def cell(compare: Cell, record_property: Callable[[str, object], None]) -> Cell:
    """`cell(row, model, layout)` compares a layout with one process and writes it into the table."""
    return partial(compare, lambda *texts: record_property("cell", texts))


@pytest.fixture(scope="module")
def compare(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Cell:
    """`compare(write, row, model, layout)` tells `write` the row, the column and what was found."""
    folder = tmp_path_factory.mktemp("matrix")
    corpus = write_corpus(folder, documents=60)

    models: dict[str, Settings] = {}

    def tables_of(row: str, wide: bool, *changes: Settings) -> Settings:
        steps: Settings = {
            "training": {"sequence_length": LENGTH, "tokens_per_step": 4 * LENGTH},
            "optimizer": {"lr": 1e-3, "min_lr": 1e-3, "schedule": "constant", "warmup_steps": 0},
        }
        loop: Settings = {"moe": {"backend": "loop"}} if wide else {}
        return settings(corpus, folder / "run", steps, models[row], loop, *changes)

    @cache
    def alone(row: str, wide: bool) -> Trace:
        return joined(ranks(1, trace, tables_of(row, wide), wide))

    def against_one_process(
        write: Callable[[str, str, str], None],
        row: str,
        model: Settings,
        layout: str,
        wide: bool = False,
        compiled: bool = False,
    ) -> None:
        models[row] = model
        size, degrees = LAYOUTS[layout]
        changes: Settings = {"parallel": degrees}
        if compiled:
            changes["training"] = {"compile": True, "compile_backend": "aot_eager"}
        tables = tables_of(row, wide, changes)
        column = layout + ", fp64" * wide + ", compiled" * compiled
        if reason := refusal(tables, size):
            write(row, column, f"refused: {reason}")
            assert (row, layout) in REFUSED, reason
            return
        assert (row, layout) not in REFUSED
        try:
            found = joined(ranks(size, trace, tables, wide, timeout=300))
            error = distance(found, alone(row, wide))
        except AssertionError as problem:
            write(row, column, f"failed: {str(problem).splitlines()[-1]}")
            raise
        write(row, column, f"{max(error.losses, error.first[0]):.0e} {error.last[0]:.0e}")
        start, end = LIMITS["float64" if wide else "float32"]
        assert error.losses < start and error.first[0] < start and error.last[0] < end, error
        assert (found.graphs >= 10) == compiled, found.graphs

    return against_one_process


def refusal(tables: Settings, size: int) -> str:
    """Why a recipe is refused on so many ranks before any of them starts; empty where it is not."""
    try:
        recipe = resolve(tables)
        degrees = resolve_degrees(recipe.parallel, size)
        recipe = with_tokens_per_step(recipe, tokens_per_step(recipe.training, degrees))
        check_micro_batches(recipe, degrees)
    except RecipeError as error:
        return str(error)
    return ""


@full
@pytest.mark.parametrize("layout", SINGLE)
@pytest.mark.parametrize("mixer", MIXERS)
def test_every_mixer_trains_alike_under_every_axis(cell: Cell, mixer: str, layout: str) -> None:
    cell(mixer, of_mixer(mixer), layout)


@full
@pytest.mark.parametrize("layout", WIDE)
@pytest.mark.parametrize("mixer", MIXERS)
def test_every_mixer_is_the_same_function_under_every_axis(cell: Cell, mixer: str, layout: str) -> None:
    cell(mixer, of_mixer(mixer), layout, wide=True)


@full
@pytest.mark.parametrize("layout", COMPOSED)
@pytest.mark.parametrize("mixer", MIXERS)
def test_every_hybrid_trains_alike_under_axes_together(cell: Cell, mixer: str, layout: str) -> None:
    cell(mixer, of_mixer(mixer), layout)


@full
@pytest.mark.parametrize("layout", COMPILED)
@pytest.mark.parametrize("mixer", ["hgrn2", "gated_delta_net", "mamba2"])
def test_compiled_mixers_train_alike_under_every_axis(cell: Cell, mixer: str, layout: str) -> None:
    cell(mixer, of_mixer(mixer), layout, compiled=True)


@full
@pytest.mark.parametrize("layout", SINGLE)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_trains_alike_under_every_axis(cell: Cell, family: str, layout: str) -> None:
    cell(f"family {family}", of_family(family), layout)


@full
@pytest.mark.parametrize("layout", WIDE)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_the_same_function_under_every_axis(cell: Cell, family: str, layout: str) -> None:
    cell(f"family {family}", of_family(family), layout, wide=True)


@pytest.mark.parametrize(
    ("model", "layout"),
    [
        pytest.param(model, layout, marks=() if (model, layout) in FEW else full)
        for model in PUBLISHED
        for layout in AXES
    ],
)
def test_published_models_are_the_same_function_under_every_axis(cell: Cell, model: str, layout: str) -> None:
    cell(f"published {model}", of_published(model), layout, wide=True)
