"""A conversation as tokens: what is trained, told token by token."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from torchlinearmoe.data.chat_template import ChatTemplate, load_template, parse_template
from torchlinearmoe.data.messages import Message
from torchlinearmoe.data.tokenizer import DEFAULT_TOKENIZER, Tokenizer, load_tokenizer
from torchlinearmoe.errors import UserError

TURNS = [
    Message("system", "Be brief."),
    Message("user", "Hi"),
    Message("assistant", "Hello there."),
    Message("user", "More?"),
    Message("assistant", "No."),
]


@pytest.fixture(scope="module")
def marked(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """The tokenizer that ships, with ChatML's markers as special tokens."""
    file = tmp_path_factory.mktemp("tokenizer") / "marked.tiktoken"
    shutil.copy(DEFAULT_TOKENIZER, file)
    special = {"<|endoftext|>": 1023, "<|im_start|>": 1024, "<|im_end|>": 1025}
    file.with_name("marked.tiktoken.json").write_text(json.dumps({"special_tokens": special}))
    return load_tokenizer(file)


def spans(ids: list[int], trained: list[bool], tokenizer: Tokenizer) -> list[tuple[bool, str]]:
    """Runs of trained and untrained tokens, as text with the special tokens spelled."""
    names = {index: name for name, index in tokenizer.special_tokens.items()}
    runs: list[tuple[bool, str]] = []
    for token, flag in zip(ids, trained, strict=True):
        text = names.get(token) or tokenizer.decode([token])
        if runs and runs[-1][0] == flag:
            runs[-1] = flag, runs[-1][1] + text
        else:
            runs.append((flag, text))
    return runs


def test_responses_and_their_end_are_trained_and_nothing_else(marked: Tokenizer) -> None:
    ids, trained = load_template("chatml").encode(TURNS, marked)
    assert spans(ids, trained, marked) == [
        (
            False,
            "<|endoftext|><|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
            "<|im_start|>assistant\n",
        ),
        (True, "Hello there.<|im_end|>"),
        (False, "\n<|im_start|>user\nMore?<|im_end|>\n<|im_start|>assistant\n"),
        (True, "No.<|im_end|>"),
    ]
    assert ids.count(1025) == 5 and ids.count(1024) == 5  # one id a marker


def test_without_markers_the_end_of_text_ends_a_response() -> None:
    tokenizer = load_tokenizer()
    for name, before in (("plain", "User: Hi\nAssistant: "), ("chatml", "<|im_start|>assistant\n")):
        template = load_template(name)
        ids, trained = template.encode(TURNS[1:3], tokenizer)
        assert template.end_id(tokenizer) == tokenizer.end_of_text == ids[-1]
        (_, prompt), (_, response) = spans(ids, trained, tokenizer)
        assert prompt.endswith(before) and response == "Hello there.<|endoftext|>"


@pytest.mark.parametrize("name", ["chatml", "plain"])
def test_a_prompt_is_the_conversation_up_to_the_response(name: str, marked: Tokenizer) -> None:
    template = load_template(name)
    for turn in (2, 4):
        ids, trained = template.encode(TURNS[: turn + 1], marked)
        response = len(marked.encode(TURNS[turn].content)) + 1
        assert template.prompt(TURNS[:turn], marked) == ids[:-response] and all(trained[-response:])


def test_a_marker_spelled_in_the_content_is_plain_text(marked: Tokenizer) -> None:
    turns = [Message("user", "<|im_end|>"), Message("assistant", "a<|im_end|><|endoftext|>b{end}{content}")]
    ids, trained = load_template("chatml").encode(turns, marked)
    assert ids.count(1025) == 2 and ids.count(1023) == 1
    text = marked.decode([token for token, flag in zip(ids, trained) if flag][:-1])
    assert text == turns[1].content


def test_a_template_of_ones_own(tmp_path: Path, marked: Tokenizer) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(
        'end = "<|im_end|>"\nsystem = "{content}"\nuser = "Q {content}{end}"\nassistant = "A {content}{end}|"'
    )
    template = load_template(str(file))
    assert isinstance(template, ChatTemplate)
    ids, trained = template.encode(TURNS[1:], marked)
    assert spans(ids, trained, marked) == [
        (False, "<|endoftext|>Q Hi<|im_end|>A "),
        (True, "Hello there.<|im_end|>"),
        (False, "|Q More?<|im_end|>A "),
        (True, "No.<|im_end|>"),
    ]
    assert parse_template(template.source, "x") == template


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        ({"user": "no place"}, "user = 'no place': must hold {content} once"),
        ({"user": "{content}{content}"}, "must hold {content} once"),
        ({"assistant": "{content}"}, "assistant: {end} must follow {content}"),
        ({"assistant": "{content} {end}"}, "assistant: {end} must follow {content}"),
        ({"system": None}, "'system' is missing"),
        ({"usr": "{content}"}, "usr: unknown key; did you mean 'user'?"),
        ({"end": 3}, "end = 3: must be a string"),
    ],
)
def test_a_template_that_is_none_is_named(change: dict[str, object], wanted: str, tmp_path: Path) -> None:
    keys = {"system": "{content}", "user": "{content}", "assistant": "{content}{end}", **change}
    file = tmp_path / "mine.toml"
    file.write_text("\n".join(f"{key} = {json.dumps(value)}" for key, value in keys.items() if value is not None))
    with pytest.raises(UserError) as caught:
        load_template(str(file))
    assert str(caught.value) == f"{file}: {wanted}" or (str(file) in str(caught.value) and wanted in str(caught.value))
    with pytest.raises(
        UserError, match="data.chat_template = 'chatm': no such file or template; did you mean 'chatml'"
    ):
        load_template("chatm")
