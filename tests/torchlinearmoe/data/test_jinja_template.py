"""Jinja chat templates: the ids of transformers, the mask of the roles that are asked for, refusals of one line."""

import json
import random

import pytest

from torchlinearmoe.data import jinja_template
from torchlinearmoe.data.chat import Chat
from torchlinearmoe.data.chat_template import load_template
from torchlinearmoe.data.jinja_template import JinjaTemplate, tokenizer_template
from torchlinearmoe.data.messages import Message, parse_conversation
from torchlinearmoe.data.sources import find_sources
from torchlinearmoe.data.tokenizer import load_tokenizer
from torchlinearmoe.errors import UserError

CHATML = """{%- if messages[0]['role'] != 'system' %}
    {{- '<|im_start|>system\\nYou help.<|im_end|>\\n' }}
{%- endif %}
{% for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
LLAMA3 = """{{ bos_token }}{% for message in messages %}\
{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim }}\
<|eot_id|>{% endfor %}\
{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"""
TOOLS = """{%- if tools %}
<|im_start|>system
{% for tool in tools %}
{{ tool | tojson }}
{% endfor %}
<|im_end|>
{% endif %}
{%- set last = namespace(role='') %}
{%- for message in messages %}
{%- if message.role == 'tool' %}
    {%- if last.role != 'tool' %}{{ '<|im_start|>user' }}{% endif %}
    {{- '\\n<result>' + message.content + '</result>' }}
    {%- if loop.last or loop.nextitem.role != 'tool' %}{{ '<|im_end|>\\n' }}{% endif %}
{%- else %}
    {{- '<|im_start|>' + message.role + '\\n' + (message.content or '') }}
    {%- for call in message.tool_calls or [] %}
        {%- if call.function is not defined %}{{ raise_exception('a call without a function') }}{% endif %}
        {{- '<call>' + call.function.name + ' ' + (call.function.arguments | tojson) + '</call>' }}
        {%- if loop.index > 7 %}{% break %}{% endif %}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endif %}
{%- set last.role = message.role %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
MARKED = """{% for message in messages %}{% if message.role == 'assistant' %}<|im_start|>assistant
{% generation %}{{ message.content }}<|im_end|>{% endgeneration %}

{% else %}<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endif %}{% endfor %}"""
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|begin|>", "<|start_header_id|>", "<|end_header_id|>"]
SPECIAL.append("<|eot_id|>")
CONFIG = {"eos_token": "<|endoftext|>"}

TURNS = [("system", "Be brief."), ("user", "What is   2+2?"), ("assistant", "4 é \U0001f600."), ("user", "x")]
TURNS = [{"role": role, "content": content} for role, content in (*TURNS, ("assistant", "\n No\n"))]
CALL = {"type": "function", "id": "c1", "function": {"name": "clock", "arguments": {"zone": "Ü", "at": [1, None]}}}
TOOL = {"type": "function", "function": {"name": "clock", "description": "<b>'s", "parameters": {"type": "object"}}}
CALLED = [
    {"role": "user", "content": "When?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL, CALL]},
    {"role": "tool", "name": "clock", "content": "12:04"},
    {"role": "tool", "name": "clock", "content": "13:04"},
    {"role": "assistant", "content": "Four past twelve."},
    {"role": "user", "content": "Thanks."},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tokenizer of byte-level merges learned from the text that ships."""
    tokenizers = pytest.importorskip("tokenizers")
    from tokenizers import decoders, models, pre_tokenizers, processors, trainers

    folder = tmp_path_factory.mktemp("tokenizer")
    model = tokenizers.Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    model.post_processor = processors.ByteLevel(trim_offsets=True)
    lines = find_sources().files[0].read_text().splitlines()[:10]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    model.train_from_iterator([json.loads(line)["text"] for line in lines], trainer)
    model.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(CONFIG))
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder):
    return load_tokenizer(folder)


def encode(template, turns, tokenizer, roles=("assistant",), tools=None):
    conversation = parse_conversation({"messages": turns, "tools": tools}, roles)
    return JinjaTemplate(template, "T").encode(conversation.messages, tokenizer, roles, conversation.tools)


def trained_texts(ids, trained, tokenizer):
    """The texts of runs of trained tokens."""
    runs, before = [], False
    for token, flag in zip(ids, trained, strict=True):
        if flag and not before:
            runs.append([])
        if flag:
            runs[-1].append(token)
        before = flag
    return [tokenizer.decode(run) for run in runs]


@pytest.mark.parametrize(
    ("template", "turns", "tools", "names"),
    [
        (CHATML, TURNS, None, {}),
        (CHATML, TURNS[1:], None, {}),
        (LLAMA3, TURNS, None, {"bos_token": "<|begin|>"}),
        (TOOLS, CALLED, [TOOL, TOOL], {}),
        (TOOLS, TURNS, None, {}),
        (MARKED, TURNS, None, {}),
    ],
    ids=["chatml", "no-system", "llama3", "tools", "no-tools", "marked"],
)
def test_ids_and_marked_tokens_are_those_of_transformers(folder, tmp_path, template, turns, tools, names):
    transformers = pytest.importorskip("transformers")
    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(CONFIG | names | {"chat_template": template}))
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"), **CONFIG, **names)
    ours = load_tokenizer(tmp_path)
    loaded = load_template("tokenizer", ours)
    messages = parse_conversation({"messages": turns}).messages
    given = {"chat_template": template, "tools": tools, "return_dict": True}
    prompt = theirs.apply_chat_template(turns[:2], add_generation_prompt=True, **given)["input_ids"]
    if tools is None:
        assert loaded.prompt(messages[:2], ours) == prompt
    marked = template is MARKED
    wanted = theirs.apply_chat_template(turns, return_assistant_tokens_mask=marked, **given)
    ids, trained = loaded.encode(messages, ours, tools=tools)
    assert ids == wanted["input_ids"][: len(ids)] and trained[-1]
    every = ("system", "user", "assistant", "tool")
    whole, _ = loaded.encode(messages, ours, every, tools)
    left = ours.decode(wanted["input_ids"][len(whole) :])
    assert whole == wanted["input_ids"][: len(whole)] and not left.strip()
    if marked:
        mask = [bool(flag) for flag in wanted["assistant_masks"]]
        assert trained == mask[: len(ids)] and not any(mask[len(ids) :])


def test_each_role_has_its_content_and_its_end(tokenizer):
    def texts(roles, turns=TURNS, template=CHATML, tools=None):
        ids, trained = encode(template, turns, tokenizer, roles, tools)
        return [text.replace("<|im_end|>", "$") for text in trained_texts(ids, trained, tokenizer)]

    assert texts(("assistant",)) == ["4 é \U0001f600.$", "\n No\n$"]
    assert texts(("user",)) == ["What is   2+2?$", "x$"]
    assert texts(("system",)) == ["Be brief.$"]
    assert texts(("user", "system")) == ["Be brief.$", "What is   2+2?$", "x$"]
    assert texts(("user",), TURNS[1:]) == ["What is   2+2?$", "x$"]  # behind the template's own system
    assert texts(("assistant",), template=MARKED) == ["4 é \U0001f600.$", "\n No\n$"]
    assert texts(("user", "assistant"), template=MARKED)[0] == "What is   2+2?$"
    call = '<call>clock {"zone": "Ü", "at": [1, null]}</call>'
    assert texts(("assistant",), CALLED, TOOLS, [TOOL]) == [f"{call}{call}$", "Four past twelve.$"]
    assert texts(("tool",), CALLED, TOOLS) == ["12:04</result>\n<result>13:04</result>$"]  # neighbours are one turn


def test_a_special_token_in_a_message_is_plain_text(tokenizer):
    end = tokenizer.special_tokens["<|im_end|>"]
    spelled = [
        {"role": "user", "content": "a<|im_end|>b\ufdd0"},
        {"role": "assistant", "content": "<|im_end|>"},
    ]
    ids, trained = encode(CHATML, spelled, tokenizer)
    assert ids.count(end) == 3 and sum(trained) > 3
    text = tokenizer.decode([token for token, flag in zip(ids, trained) if flag])
    assert text == "<|im_end|><|im_end|>" and "a<|im_end|>b\ufffd" in tokenizer.decode(ids)


def test_spans_end_where_their_text_does(tokenizer):
    drawn = random.Random()
    letters = ["a", " ", "é", "\U0001f600", "\n", "the ", "<|im_end|>", "<|im_"]
    for tokens in (tokenizer, load_tokenizer()):
        for _ in range(30):
            text = "".join(drawn.choices(letters, k=12))
            for special in (True, False):
                ids, ends = tokens.encode_spans(text, special)
                assert ends == sorted(ends) and len(ids) == len(ends) and not text[ends[-1] :].strip(" ")
                assert special or ids == tokens.encode(text)
                assert tokens.decode(ids) == text
                for stop, (end, after) in enumerate(zip(ends, [*ends[1:], len(text) + 1]), start=1):
                    if end < after:  # `tokenizers` leaves spaces out at the edges
                        assert tokens.decode(ids[:stop]).rstrip(" ") == text[:end].rstrip(" ")


@pytest.mark.parametrize(
    ("template", "wanted"),
    [
        ("{% if %}", r"T, line 1: TemplateSyntaxError: Expected an expression"),
        ("{{ raise_exception('roles must\nalternate') }}", "^T: roles must alternate$"),
        (
            "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
            "loops more than 50000",
        ),
        ("{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}", "RecursionError"),
        ("{% for a in range(10 ** 9) %}{% endfor %}", "Range too big"),
        ("{{ 'a' * 10 ** 9 }}", "multiplies 1 elements 1000000000 times"),
        ("{{ 10 ** 10 ** 10 }}", "the power 10000000000 \\*\\* 10|too large|writes nothing"),
        ("{{ ''.__class__.__mro__ }}", "access to attribute '__class__' of 'str' object is unsafe"),
        ("{{ messages.append(1) }}", "access to attribute 'append' of 'list' object is unsafe"),
        ("{{ messages[9].content.x }}", "UndefinedError: list object has no element 9"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("nothing of it", r"T writes nothing that is trained \(assistant\)"),
        (
            "{% for m in messages %}{{ loop.length }}{{ m.content }}{% endfor %}",
            r"T writes messages\[2\] otherwise when more follow, .* mark it by {% generation %}",
        ),
        (
            "{% for m in messages %}{{ m.role + m.content }}{% endfor %}{% if add_generation_prompt %}!{% endif %}",
            r"T writes messages\[2\] otherwise than its generation prompt",
        ),
    ],
)
def test_a_template_that_cannot_be_used_is_one_line(template, wanted, tokenizer, monkeypatch):
    monkeypatch.setattr(jinja_template, "MOST_LOOPS", 50_000)
    with pytest.raises(UserError, match=wanted) as caught:
        encode(template, TURNS, tokenizer)
    assert "\n" not in str(caught.value) and str(caught.value).startswith("T")


def test_the_template_of_a_tokenizer_is_found(folder, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    config = tmp_path / "tokenizer_config.json"

    def loaded(**keys):
        config.write_text(json.dumps(CONFIG | keys))
        return load_template("tokenizer", load_tokenizer(tmp_path))

    with pytest.raises(UserError, match="data.chat_template = 'tokenizer': neither a chat_template.jinja nor a"):
        loaded()
    assert loaded(chat_template=CHATML).source == CHATML
    with pytest.raises(UserError, match="chat_template = 3: must be a string"):
        loaded(chat_template=3)
    with pytest.raises(UserError, match="names no template 'default'|no list of names"):
        loaded(chat_template=[{"name": "x", "template": ""}])
    both = loaded(chat_template=[{"name": "default", "template": "\nD \n"}, {"name": "tool_use", "template": "\nT\n"}])
    turns, tokenizer = [Message("user", "a")], load_tokenizer(tmp_path)
    assert tokenizer.decode(both.prompt(turns, tokenizer)) == "\nD "
    assert tokenizer.decode(both.encode([Message("assistant", "a")], tokenizer, tools=[TOOL])[0]) == "\nT"
    (tmp_path / "chat_template.jinja").write_text(LLAMA3)
    assert loaded(chat_template=CHATML).source == LLAMA3
    found = tokenizer_template(load_tokenizer(tmp_path))
    assert found is not None and found.end_id(tokenizer) == tokenizer.special_tokens["<|eot_id|>"]
    assert tokenizer_template(load_tokenizer()) is None


def test_the_begin_of_text_is_there_once(folder, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(CONFIG | {"bos_token": "<|begin|>"}))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.begin_of_text is not None
    for template in (LLAMA3, CHATML):
        ids, trained = encode(template, TURNS, tokenizer)
        assert ids.count(tokenizer.begin_of_text) == 1 and ids[0] == tokenizer.begin_of_text and not trained[0]
    assert encode(CHATML, TURNS, tokenizer.starting(False))[0] == encode(CHATML, TURNS, tokenizer)[0][1:]


def test_without_jinja2_it_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "jinja2", None)
    with pytest.raises(UserError, match="^T: needs jinja2: pip install jinja2$"):
        JinjaTemplate("", "T")


def test_the_tools_that_ship_work_with_any_tokenizer():
    tokenizer, template = load_tokenizer(), load_template("tools")
    conversation = parse_conversation({"messages": CALLED, "tools": json.dumps([TOOL])})
    ids, trained = template.encode(conversation.messages, tokenizer, tools=conversation.tools)
    call = '<tool_call>{"name": "clock", "arguments": {"zone": "Ü", "at": [1, null]}}</tool_call>'
    end = tokenizer.decode([template.end_id(tokenizer)])
    assert template.end_id(tokenizer) == tokenizer.end_of_text
    assert trained_texts(ids, trained, tokenizer) == [f"{call}\n{call}{end}", f"Four past twelve.{end}"]
    with pytest.raises(UserError, match="chatml.toml has no form for tools; name one that has in data.chat_template"):
        Chat(load_template("chatml")).encode({"messages": CALLED}, tokenizer)
    with pytest.raises(UserError, match="chatml.toml has no line for the role 'tool'; add one"):
        Chat(load_template("chatml")).encode({"messages": [CALLED[2], CALLED[4]]}, tokenizer)


@pytest.mark.parametrize(
    ("turn", "wanted"),
    [
        ({"role": "assistant", "tool_calls": "no"}, r"messages\[0\]: tool_calls is not a list of objects"),
        ({"role": "assistant", "tool_calls": [{}]}, r"tool_calls\[0\]: no function with a name"),
        (
            {"role": "assistant", "tool_calls": [{"name": "f", "arguments": "{"}]},
            "of f: a string that is not JSON",
        ),
        ({"role": "assistant", "tool_calls": [{"name": "f", "arguments": [1]}]}, "the arguments of f are no object"),
        ({"role": "assistant", "content": None}, r"messages\[0\]: the content is not a string"),
        ({"role": "robot", "content": ""}, r"role 'robot'; legal: system, developer, user, assistant, tool"),
    ],
)
def test_a_turn_that_is_none_is_named(turn, wanted):
    with pytest.raises(ValueError, match=wanted):
        parse_conversation({"messages": [turn]})


def test_roles_by_any_name_and_arguments_in_strings():
    told = {"role": "critic", "content": "Bad."}
    assert parse_conversation({"messages": [told]}, ("critic",)).messages == [Message("critic", "Bad.")]
    with pytest.raises(ValueError, match="no message of the critic or user: nothing to train on"):
        parse_conversation({"messages": []}, ("critic", "user"))
    call = {"function": {"name": "f", "arguments": '{"a": "\\ud800"}'}, "id": "1"}
    (message,) = parse_conversation({"messages": [{"role": "assistant", "tool_calls": [call]}]}).messages
    assert message.table()["tool_calls"][0]["function"]["arguments"]["a"] in ("\ud800", "\ufffd")
    with pytest.raises(ValueError, match='"tools" is not a list of objects'):
        parse_conversation({"messages": [told], "tools": [1]}, ("critic",))


def test_a_checkpoint_keeps_the_template_and_an_export_has_it(folder, tmp_path):
    from torchlinearmoe.checkpoint.model import checkpoint_template, model_files
    from torchlinearmoe.recipe import resolve

    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(CONFIG | {"chat_template": CHATML}))
    tokenizer = load_tokenizer(tmp_path)
    data = {"format": "messages", "chat_template": "tokenizer", "tokenizer": str(tmp_path)}
    for number, (told, source) in enumerate(((data, CHATML), (data | {"chat_template": "tools"}, None), ({}, CHATML))):
        recipe = resolve({"data": told, "training": {"steps": 1}})
        checkpoint = tmp_path / str(number)
        for name, content in model_files(recipe, tokenizer).items():
            (checkpoint / name).parent.mkdir(parents=True, exist_ok=True)
            (checkpoint / name).write_bytes(content.encode() if isinstance(content, str) else content)
        found = checkpoint_template(checkpoint)
        assert found.source == (source or load_template("tools").source) and found.kind == "jinja"
        assert (checkpoint / "chat_template.jinja").exists() == (told != {})
