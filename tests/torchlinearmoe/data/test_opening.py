"""A prompt from the data's own start."""

import json

import pytest

from torchlinearmoe.data.chat import Chat
from torchlinearmoe.data.chat_template import load_template
from torchlinearmoe.data.conversations import open_conversations
from torchlinearmoe.data.opening import opening_of_messages, opening_of_text
from torchlinearmoe.data.splits import open_splits


@pytest.mark.parametrize(
    "text, expected",
    [
        ("Call me Ishmael.", "Call me Ishmael."),
        ("  Call\nme\tIshmael. Some years ago, never mind how long", "Call me Ishmael. Some years ago, never"),
        ("x" * 90, "x" * 40),
        ("\u4e00" * 60, None),
    ],
)
def test_of_text_it_is_the_first_words(tmp_path, tokenizer, text, expected):
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps({"text": text}) + "\n" + json.dumps({"text": "another"}))
    splits = open_splits([file], tokenizer=tokenizer, validation_fraction=0, cache=tmp_path / "cache")
    found = opening_of_text(splits.train, tokenizer)
    assert found == expected if expected else 0 < len(found) <= 40 and set(found) == {"\u4e00"}


@pytest.mark.parametrize("template", ["chatml", "plain", "tools"])
def test_of_messages_it_is_the_first_question(tmp_path, tokenizer, template):
    turns = [("system", "Be brief."), ("user", "What is  the capital of France?"), ("assistant", "Paris.")]
    entries = [
        {"messages": [{"role": role, "content": text} for role, text in turns]},
        {"prompt": "a", "response": "b"},
    ]
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    loaded = load_template(template)
    splits = open_conversations(
        [file], tokenizer=tokenizer, chat=Chat(loaded), validation_fraction=0, cache=tmp_path / "cache"
    )
    assert opening_of_messages(splits.train, tokenizer, loaded) == "What is the capital of France?"
