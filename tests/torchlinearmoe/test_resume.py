"""Which recipe may go on where another stopped, and what is said of it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from torchlinearmoe.checkpoint.model import model_files
from torchlinearmoe.data.tokenizer import DEFAULT_TOKENIZER, load_tokenizer
from torchlinearmoe.errors import RecipeError, UserError
from torchlinearmoe.recipe import Recipe, resolve
from torchlinearmoe.recipe.parse import flatten
from torchlinearmoe.recipe.schema import Recipe as Schema
from torchlinearmoe.resume import FREE_KEYS, TOLD_KEYS, changes, check_same_run, counts_of, go_on


def recipe(**sections: dict[str, Any]) -> Recipe:
    tables = {"training": {"steps": 5, "tokens_per_step": 4096}} | sections
    return resolve(tables)


def training(**changed: Any) -> dict[str, dict[str, Any]]:
    return {"training": {"steps": 5, "tokens_per_step": 4096} | changed}


@pytest.mark.parametrize(
    "sections",
    [
        training(steps=9),
        {"training": {"tokens": 9999, "tokens_per_step": 4096}},
        training(output_dir="elsewhere", device="cpu"),
        training(compile=True, compile_backend="aot_eager"),
        training(activation_checkpointing="full", activation_checkpointing_every=2),
        training(deterministic=True, max_skipped_steps=3),
        training(micro_batch_size=2),
        {"model": {"kernel_backend": "reference", "attention_backend": "sdpa"}},
        {"moe": {"backend": "loop"}},
        {"data": {"workers": 2, "cache": "elsewhere", "on_change": "restart_epoch"}},
        {"data": {"chat_template": "plain"}},
        {"parallel": {"data_replicate": 2}},
        {"metrics": {"interval": 3, "tensorboard": False}},
        {"checkpoint": {"interval": 3, "resume": "never"}},
        {"mixer": {"linear_attention": {"conv": 4}}},
    ],
    ids=str,
)
def test_what_changes_neither_weights_nor_samples_is_free(sections: dict[str, Any]) -> None:
    check_same_run(recipe(), recipe(**sections))
    check_same_run(recipe(**sections), recipe())
    assert all("the cosine schedule of" in line for line in changes(recipe(), recipe(**sections), step=0))


@pytest.mark.parametrize(
    "optimizer, lines",
    [
        ({"lr": 1e-3}, ["optimizer.lr = 0.001 from here on, 0.0003 before"]),
        ({"min_lr": 0.0}, ["optimizer.min_lr = 0.0 from here on, 3e-05 before"]),
        ({"clip_norm": 0.5}, ["optimizer.clip_norm = 0.5 from here on, 1.0 before"]),
        ({"warmup_tokens": 9000}, ["optimizer.warmup_tokens = 9000 from here on, None before"]),
        (
            {"schedule": "wsd", "decay_fraction": 0.5},
            [
                "optimizer.decay_fraction = 0.5 from here on, 0.2 before",
                "optimizer.schedule = 'wsd' from here on, 'cosine' before",
            ],
        ),
    ],
)
def test_learning_rate_schedule_and_clip_may_change_and_are_told(optimizer: dict[str, Any], lines: list[str]) -> None:
    now = recipe(optimizer=optimizer)
    check_same_run(recipe(), now)
    assert changes(recipe(), now, step=2) == lines


@pytest.mark.parametrize(
    "schedule, steps, step, told",
    [
        ("cosine", 50, 20, "training.steps = 50: the cosine schedule of 100 steps is cut short to 50; the"),
        ("cosine", 200, 20, "training.steps = 200: the cosine schedule of 100 steps is drawn out to 200; the"),
        ("cosine", 200, 100, "100 steps is begun again after its end to 200; the learning rate of step 101 is 0.000163,"
         " it would have been 3e-05"),
        ("wsd", 50, 45, "the wsd schedule of 100 steps is cut short to 50; the learning rate of step 46 is"),
        ("wsd", 50, 20, None),
        ("constant", 50, 20, None),
        ("cosine", 50, 50, None),
    ],
)  # fmt: skip
def test_a_schedule_that_ends_elsewhere_is_told(schedule: str, steps: int, step: int, told: str | None) -> None:
    before, now = (recipe(**training(steps=n), optimizer={"schedule": schedule}) for n in (100, steps))
    lines = changes(before, now, step)
    assert len(lines) == (told is not None)
    assert told is None or told in lines[0]


def test_a_micro_batch_is_not_free_under_a_capacity() -> None:
    before = recipe(moe={"capacity_factor": 1.25})
    with pytest.raises(
        RecipeError, match="training.micro_batch_size = 2: .* made with 1, and moe.capacity_factor = 1.25"
    ):
        check_same_run(before, recipe(moe={"capacity_factor": 1.25}, **training(micro_batch_size=2)))
    dense = {"num_experts": 0, "capacity_factor": 1.25}
    check_same_run(recipe(moe=dense), recipe(moe=dense, **training(micro_batch_size=2)))
    only_evaluation = {"eval_capacity_factor": 1.25}
    check_same_run(recipe(moe=only_evaluation), recipe(moe=only_evaluation, **training(micro_batch_size=2)))


@pytest.mark.parametrize(
    "sections, told",
    [
        ({"model": {"num_layers": 2}}, "model.num_layers = 2: the checkpoint to resume was made with 4;"),
        ({"moe": {"balance": "bias"}}, "moe.balance = 'bias': the checkpoint to resume was made with 'loss';"),
        ({"mixer": {"hgrn2": {"conv": 4}}}, "mixer.hgrn2.conv = 4: the checkpoint to resume was made with 0;"),
        (
            {"optimizer": {"weight_decay": 0.0}},
            "optimizer.weight_decay = 0.0: the checkpoint to resume was made with 0",
        ),
        (
            training(tokens_per_step=8192),
            "training.tokens_per_step = 8192: the checkpoint to resume was made with 4096;",
        ),
        (
            training(sequence_length=1024),
            "training.sequence_length = 1024: the checkpoint to resume was made with 2048;",
        ),
        ({"data": {"paths": ["a"]}}, r"data.paths = \('a',\): the checkpoint to resume was made with \(\);"),
        (
            {"data": {"packing": "best_fit"}},
            "data.packing = 'best_fit': the checkpoint to resume was made with 'concatenate';",
        ),
        ({"data": {"min_length": 9}}, "data.min_length = 9: the checkpoint to resume was made with 0;"),
        ({"data": {"tokenizer": "a"}}, "data.tokenizer = 'a': the checkpoint to resume was made with '';"),
        ({"data": {"begin_of_text": True}}, "data.begin_of_text = True: the checkpoint to resume was made with False;"),
    ],
)
def test_anything_else_is_refused_by_its_key(sections: dict[str, Any], told: str) -> None:
    with pytest.raises(RecipeError, match=told):
        check_same_run(recipe(), recipe(**sections))


@pytest.mark.parametrize("changed", [{"tokens": None}, {"step": "3"}, {"skipped_steps": -1}, {"tokens": True}])
def test_counts_that_are_none_are_named(changed: dict[str, Any]) -> None:
    extra = {"step": 3, "tokens": 30, "skipped_steps": 0}
    assert counts_of(extra, Path("x")) == (3, 30, 0)
    with pytest.raises(UserError, match="checkpoint x: state.json counts no steps, tokens and skipped steps; name"):
        counts_of(extra | changed, Path("x"))


def test_every_key_is_of_one_kind() -> None:
    keys = flatten(recipe()).keys()
    assert keys >= FREE_KEYS | TOLD_KEYS and not FREE_KEYS & TOLD_KEYS
    assert {field.name for field in dataclasses.fields(Schema)} >= {key.split(".")[0] for key in TOLD_KEYS}


def test_what_lies_elsewhere_or_is_told_by_default_is_the_same(tmp_path: Path) -> None:
    """Data, tokenizer and template by what they hold; who says nothing of begin tokens takes what was."""
    known = {"data.paths"}
    check_same_run(recipe(), recipe(data={"paths": ["a"]}), known)
    check_same_run(recipe(data={"begin_of_text": True}), recipe())
    with pytest.raises(RecipeError, match="data.validation_fraction"):
        check_same_run(recipe(), recipe(data={"validation_fraction": 0.2}), known)

    told = {"data": {"format": "messages", "chat_template": "plain"}}
    before = recipe(**told)
    for name, content in model_files(before, load_tokenizer()).items():
        file = tmp_path / "checkpoint" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content.encode() if isinstance(content, str) else content)
    source, moved, template = tmp_path / "checkpoint", tmp_path / "moved.tiktoken", tmp_path / "mine.toml"
    moved.write_bytes(DEFAULT_TOKENIZER.read_bytes())
    template.write_bytes((source / "chat_template.toml").read_bytes())
    places = {"tokenizer": str(moved), "chat_template": str(template), "paths": ["b"]}
    now = recipe(data=told["data"] | places)
    assert go_on(source, now, load_tokenizer(moved), step=3, data_known=True) == []
    with pytest.raises(RecipeError, match="data.paths"):
        go_on(source, now, load_tokenizer(moved), step=3, data_known=False)
    fewer = told["data"] | {"min_length": 30}
    with pytest.raises(RecipeError, match="data.min_length = 30: the checkpoint to resume was made with 0;"):
        go_on(source, recipe(data=fewer), load_tokenizer(), step=3, data_known=True)
    restarted = recipe(data=fewer | {"on_change": "restart_epoch"})
    assert go_on(source, restarted, load_tokenizer(), step=3, data_known=True) == []
    template.write_text(template.read_text().replace("User", "Asker"))
    with pytest.raises(RecipeError, match="data.chat_template = '.*mine.toml': the checkpoint to resume was made with"):
        go_on(source, now, load_tokenizer(moved), step=3, data_known=True)
    special = {"special_tokens": {"<|endoftext|>": 1023, "<x>": 1024}}
    moved.with_name("moved.tiktoken.json").write_text(json.dumps(special))
    with pytest.raises(
        RecipeError, match="data.tokenizer = '.*moved.tiktoken': the checkpoint to resume was made with ''"
    ):
        go_on(
            source,
            recipe(data=told["data"] | {"tokenizer": str(moved)}),
            load_tokenizer(moved),
            step=3,
            data_known=True,
        )
    with pytest.raises(RecipeError, match="data.tokenizer = '': has changed since the checkpoint to resume was"):
        go_on(source, before, load_tokenizer(moved), step=3, data_known=True)
