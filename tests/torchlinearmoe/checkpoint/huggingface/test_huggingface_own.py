"""Hybrid and linear models leave as a directory that transformers loads, and come back."""

from __future__ import annotations

import builtins
import json
import runpy
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import transformers
from own_cases import MODELS, checkpoint, load
from transformers.dynamic_module_utils import check_imports

from torchlinearmoe import build_model, load_model
from torchlinearmoe.checkpoint import CheckpointManager
from torchlinearmoe.checkpoint.huggingface.exporting import export_checkpoint
from torchlinearmoe.checkpoint.huggingface.importing import import_directory
from torchlinearmoe.checkpoint.huggingface.own import MODELING
from torchlinearmoe.checkpoint.model import checkpoint_template, checkpoint_tokenizer, model_files
from torchlinearmoe.data.chat_template import load_template
from torchlinearmoe.data.messages import Message
from torchlinearmoe.data.tokenizer import DEFAULT_TOKENIZER, load_tokenizer
from torchlinearmoe.generation import generate
from torchlinearmoe.recipe import resolve


@pytest.mark.parametrize("kind", MODELS)
def test_an_exported_model_has_the_same_logits_and_generates_the_same(kind: str, tmp_path: Path) -> None:
    source, ours = checkpoint(tmp_path / "run", kind)
    export_checkpoint(source, tmp_path / "exported", shard_bytes=200_000)
    theirs = load(tmp_path / "exported")
    tokens = torch.randint(1000, (2, 18))
    torch.testing.assert_close(theirs(tokens).logits, ours(tokens), atol=1e-6, rtol=0)
    found = theirs.generate(tokens, max_new_tokens=10, do_sample=False, eos_token_id=None)
    expected = list(generate(ours, tokens.tolist(), 10))
    assert found[:, 18:].t().tolist() == expected and len({row[0] for row in expected}) > 3


def test_generation_keeps_a_state_of_constant_size(tmp_path: Path) -> None:
    source, _ = checkpoint(tmp_path / "run", "linear")
    export_checkpoint(source, tmp_path / "exported")
    theirs = load(tmp_path / "exported")
    seen: list[tuple[int, int]] = []
    forward = theirs.forward

    def watched(*arguments: Any, **options: Any) -> Any:
        output = forward(*arguments, **options)
        size = sum(value.numel() for layer in output.state.layers for value in layer.values())
        seen.append((options["input_ids"].shape[1], size))
        return output

    theirs.forward = watched
    theirs.generate(torch.randint(1000, (1, 30)), max_new_tokens=6, do_sample=False, eos_token_id=None)
    assert [length for length, _ in seen] == [30, 1, 1, 1, 1, 1]
    assert len({size for _, size in seen}) == 1


def test_padded_batches_are_each_sequence_by_itself(tmp_path: Path) -> None:
    source, ours = checkpoint(tmp_path / "run", "hybrid")
    export_checkpoint(source, tmp_path / "exported")
    theirs = load(tmp_path / "exported")
    tokens = torch.randint(1000, (2, 12))
    mask = torch.ones_like(tokens)
    mask[0, :5] = 0
    logits = theirs(tokens, attention_mask=mask, labels=tokens.masked_fill(mask == 0, -100))
    torch.testing.assert_close(logits.logits[0, 5:], ours(tokens[:1, 5:])[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(logits.logits[1], ours(tokens[1:])[0], atol=1e-5, rtol=0)
    assert logits.loss.isfinite()
    found = theirs.generate(tokens, attention_mask=mask, max_new_tokens=8, do_sample=False, eos_token_id=None)
    expected = list(generate(ours, [tokens[0, 5:].tolist(), tokens[1].tolist()], 8))
    assert found[:, 12:].t().tolist() == expected
    with pytest.raises(ValueError, match="num_beams = 2"):
        theirs.generate(tokens, num_beams=2, max_new_tokens=2)


def test_what_computes_in_float32_stays_float32(tmp_path: Path) -> None:
    source, ours = checkpoint(tmp_path / "run", "hybrid")
    export_checkpoint(source, tmp_path / "exported", dtype=torch.bfloat16)
    theirs = load(tmp_path / "exported")
    exact = {name for name, value in theirs.named_parameters() if value.dtype == torch.float32}
    assert exact == {f"model.{n}" for n, _ in ours.named_parameters() if "router" in n or "shared.hgrn2" in n}
    for name, value in ours.named_parameters():
        assert torch.equal(theirs.get_parameter(f"model.{name}").float(), value) == (f"model.{name}" in exact) or (
            torch.equal(value.bfloat16(), theirs.get_parameter(f"model.{name}"))
        )


@pytest.mark.parametrize("kind", MODELS)
def test_an_exported_model_comes_back_as_the_same_checkpoint(kind: str, tmp_path: Path) -> None:
    source, ours = checkpoint(tmp_path / "run", kind)
    export_checkpoint(source, tmp_path / "exported")
    import_directory(tmp_path / "exported", tmp_path / "again")
    again = load_model(tmp_path / "again")
    assert again.recipe == ours.recipe
    for name, value in ours.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    assert checkpoint_tokenizer(tmp_path / "again").fingerprint == checkpoint_tokenizer(source).fingerprint


def test_generation_ends_where_a_finetuned_response_does(tmp_path: Path) -> None:
    """At the end of text, and at the marker that the chat template ends its turns with."""
    file = tmp_path / "marked.tiktoken"
    file.write_bytes(DEFAULT_TOKENIZER.read_bytes())
    markers = {"<|endoftext|>": 1023, "<|im_start|>": 1024, "<|im_end|>": 1025}
    file.with_name(f"{file.name}.json").write_text(json.dumps({"special_tokens": markers}))
    model = {"num_layers": 1, "vocab_size": 1026}
    for template, ends in (("chatml", [1023, 1025]), ("plain", 1023)):
        data = {"format": "messages", "chat_template": template, "tokenizer": str(file)}
        recipe = resolve({"model": model, "data": data, "training": {"steps": 1}})
        files = model_files(recipe, load_tokenizer(file))
        run = CheckpointManager(tmp_path / template, keep=1)
        run.save(1, build_model(recipe.model), None, {"tokens": 0, "skipped_steps": 0}, files, blocking=True)
        export_checkpoint(tmp_path / template / "step-1", tmp_path / f"{template} exported")
        assert load(tmp_path / f"{template} exported").generation_config.eos_token_id == ends


@pytest.mark.parametrize("template", ["chatml", "turns.toml"])
def test_transformers_writes_a_conversation_with_the_ids_that_were_trained(template: str, tmp_path: Path) -> None:
    file = tmp_path / "marked.tiktoken"
    file.write_bytes(DEFAULT_TOKENIZER.read_bytes())
    markers = {"<|endoftext|>": 1023, "<|im_start|>": 1024, "<|im_end|>": 1025, "<|begin|>": 1026}
    table = {"special_tokens": markers, "begin_of_text": "<|begin|>"}
    file.with_name(f"{file.name}.json").write_text(json.dumps(table))
    (tmp_path / "turns.toml").write_text(
        'end = "<|im_end|>"\nsystem = "{content}\\n\\n"\nuser = "\\"{% Qé🙂 %}\\"\\\\:\\n{content}\\n"\n'
        'assistant = "A:\\n{content}{end}{end}\\n"\n'
    )
    named = str(tmp_path / template) if "." in template else template
    data = {"format": "messages", "chat_template": named, "tokenizer": str(file), "begin_of_text": True}
    recipe = resolve({"model": {"num_layers": 1, "vocab_size": 1027}, "data": data, "training": {"steps": 1}})
    tokenizer = load_tokenizer(file)
    run = CheckpointManager(tmp_path, keep=1)
    model = build_model(recipe.model)
    run.save(1, model, None, {"tokens": 0, "skipped_steps": 0}, model_files(recipe, tokenizer), blocking=True)
    export_checkpoint(tmp_path / "step-1", tmp_path / "exported")

    ours, theirs = load_template(named), transformers.AutoTokenizer.from_pretrained(tmp_path / "exported")
    told = [
        ("system", "Be brief."),
        ("user", "Hi, who is it?"),
        ("assistant", "Me."),
        ("user", "  Why\n"),
        ("assistant", "So."),
    ]
    turns, messages = ([{"role": r, "content": c} for r, c in told], [Message(r, c) for r, c in told])
    found = theirs.apply_chat_template(turns, return_dict=True, return_assistant_tokens_mask=True)
    ids, trained = ours.encode(messages, tokenizer)
    assert found["input_ids"][: len(ids)] == ids
    assert found["assistant_masks"][: len(ids)] == [int(flag) for flag in trained]
    assert not any(found["assistant_masks"][len(ids) :])
    prompt = theirs.apply_chat_template(turns[:2], add_generation_prompt=True, return_dict=True)["input_ids"]
    assert prompt == ours.prompt(messages[:2], tokenizer)
    assert (
        json.loads((tmp_path / "exported" / "tokenizer_config.json").read_text())["chat_template"]
        == (tmp_path / "exported" / "chat_template.jinja").read_text()
    )
    # What is imported again writes the same.
    import_directory(tmp_path / "exported", tmp_path / "again")
    again = checkpoint_template(tmp_path / "again")
    assert again.encode(messages, tokenizer) == (ids, trained) and again.end_id(tokenizer) == ours.end_id(tokenizer)


def test_the_neighbours_of_a_tokenizer_travel_with_it_but_no_template_that_was_not_learned(tmp_path: Path) -> None:
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0, "b": 1, "<|endoftext|>": 2}, []))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore
    tokenizer.decoder = tokenizers.decoders.ByteLevel()  # pyright: ignore
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>"}')
    for name in ("special_tokens_map.json", "chat_template.jinja", "README.md"):
        (tmp_path / name).write_text("{}")
    kept = ["tokenizer.json", "special_tokens_map.json", "tokenizer_config.json"]
    for form, names in (("text", [*kept, "chat_template.jinja"]), ("messages", kept)):
        recipe = resolve({"data": {"format": form}, "training": {"steps": 1}})
        files = model_files(recipe, load_tokenizer(tmp_path / "tokenizer.json"))
        assert {name for name in files if "/" in name} == {f"tokenizer/{name}" for name in names}


def test_without_the_package_the_modeling_file_says_so_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    imports = builtins.__import__

    def without(name: str, *arguments: Any, **options: Any) -> Any:
        if name.startswith("torchlinearmoe"):
            raise ImportError(f"No module named '{name}'")
        return imports(name, *arguments, **options)

    file = Path(str(files("torchlinearmoe.checkpoint.huggingface"))) / MODELING
    assert "torchlinearmoe" not in check_imports(file)  # else transformers would speak first
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match="^this model needs the torchlinearmoe package: pip install torchlinearmoe"):
        runpy.run_path(str(file))


def test_a_fresh_model_of_the_architecture_is_initialised(tmp_path: Path) -> None:
    source, ours = checkpoint(tmp_path / "run", "hybrid")
    export_checkpoint(source, tmp_path / "exported")
    config = transformers.AutoConfig.from_pretrained(tmp_path / "exported", trust_remote_code=True)
    fresh = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    for name, value in ours.named_parameters():
        drawn = fresh.get_parameter(f"model.{name}")
        assert drawn.isfinite().all() and drawn.std(correction=0) <= 1.5 * value.std(correction=0) + 1e-3, name


def test_every_export_has_a_tokenizer_that_transformers_loads(tmp_path: Path) -> None:
    source, _ = checkpoint(tmp_path / "run", "hybrid")
    export_checkpoint(source, tmp_path / "exported")
    ours, theirs = checkpoint_tokenizer(source), transformers.AutoTokenizer.from_pretrained(tmp_path / "exported")
    assert theirs("And the Word was")["input_ids"] == ours.encode("And the Word was")
    assert theirs.eos_token_id == ours.end_of_text


@pytest.mark.parametrize("kind", MODELS)
def test_hidden_states_and_embeddings_are_those_of_the_decoder(kind: str, tmp_path: Path) -> None:
    source, ours = checkpoint(tmp_path / "run", kind)
    export_checkpoint(source, tmp_path / "exported")
    theirs = load(tmp_path / "exported")
    tokens = torch.randint(1000, (2, 9))
    mask = torch.ones_like(tokens)
    mask[0, :4] = 0
    found = theirs(tokens, attention_mask=mask, output_hidden_states=True)
    assert len(found.hidden_states) == len(ours.layers) + 1 and theirs(tokens).hidden_states is None
    embedded = ours.embed(tokens)
    torch.testing.assert_close(found.hidden_states[0], embedded * mask[..., None])
    torch.testing.assert_close(ours.project(found.hidden_states[-1][1]), found.logits[1])
    alone = theirs(tokens[:1, 4:], output_hidden_states=True)
    for one, whole in zip(alone.hidden_states, found.hidden_states):
        torch.testing.assert_close(one[0], whole[0, 4:], atol=1e-5, rtol=1e-4)
    kept = theirs(tokens, attention_mask=mask, output_hidden_states=True, use_cache=True)
    torch.testing.assert_close(kept.hidden_states, found.hidden_states, atol=1e-5, rtol=1e-4)
    stepped = theirs(tokens[:, :1], state=kept.state, use_cache=True, output_hidden_states=True)
    assert [tuple(h.shape) for h in stepped.hidden_states] == [(2, 1, ours.recipe.hidden_size)] * len(
        found.hidden_states
    )

    torch.testing.assert_close(theirs(inputs_embeds=embedded, attention_mask=mask).logits, found.logits)
    told = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    said = theirs.generate(inputs_embeds=embedded, attention_mask=mask, **told)
    assert said.tolist() == theirs.generate(tokens, attention_mask=mask, **told)[:, 9:].tolist()
    with pytest.raises(ValueError, match="exactly one"):
        theirs(tokens, inputs_embeds=embedded)


def test_gradient_checkpointing_gives_the_same_gradients_from_fewer_saved_tensors(tmp_path: Path) -> None:
    source, _ = checkpoint(tmp_path / "run", "hybrid")
    export_checkpoint(source, tmp_path / "exported")
    theirs = load(tmp_path / "exported").train()
    tokens = torch.randint(1000, (2, 12))

    def gradients() -> tuple[dict[str, torch.Tensor], int]:
        saved = 0

        def keep(value: torch.Tensor) -> torch.Tensor:
            nonlocal saved
            saved += 1
            return value

        theirs.zero_grad()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
            loss = theirs(tokens, labels=tokens).loss
        loss.backward()
        return {name: p.grad.clone() for name, p in theirs.named_parameters() if p.grad is not None}, saved

    plain, many = gradients()
    theirs.gradient_checkpointing_enable()
    found, few = gradients()
    assert few < many / 2 and found.keys() == plain.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(found[name], gradient)
    theirs.gradient_checkpointing_disable()
    assert gradients()[1] == many
