"""The chat template of a Hugging Face tokenizer: Jinja, in jinja2's sandbox, with what transformers gives it.

The ids are those of `apply_chat_template(tokenize=True)`, the begin of text in front where the tokenizer has one and
the template writes none. Special tokens that a message spells are plain text, so that no content can end a turn. Which
characters are trained, of the roles that are:

    {% generation %}    what stands in such blocks is the assistant's, where the template has any
    else                the conversation is rendered up to a message, and with it: what the message adds is its role's.
                        Of the assistant without the generation prompt, of others from their content on; white space
                        after the last special token is nobody's, since nothing is generated after that token

        rendered up to it    <|im_start|>user Hi<|im_end|><|im_start|>assistant
        rendered with it     <|im_start|>user Hi<|im_end|><|im_start|>assistant Hello.<|im_end|>
        trained                                                                 ^^^^^^^^^^^^^^^^

A template that renders earlier messages otherwise once others follow is refused where that matters. Every loop and
call counts, so that no template runs on for ever.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any

import numpy as np

from torchlinearmoe.data.messages import ASSISTANT, Message
from torchlinearmoe.data.tokenizer import Tokenizer
from torchlinearmoe.errors import UserError

HELD, OPEN, CLOSE = "\ufdd0", "\ufdd1", "\ufdd2"
"""Characters that no text holds: inside a special token that is plain text, and around what is generated."""
MOST_LOOPS = 10_000_000
"""Rounds and calls of one rendering."""
MOST_COPIES = 10_000_000
"""Elements of what a template multiplies."""


class JinjaTemplate:
    """A template as `ChatTemplate` is one."""

    kind = "jinja"
    reads_all = True

    def __init__(self, source: str, where: str) -> None:
        """`where` is what errors call it. Raises UserError for one that is no Jinja."""
        self.source, self.where = source, where
        self._compile()  # a mistake shows now

    def _compile(self) -> None:
        try:
            self._function, self._marks = _compiled(self.source)
        except ImportError:
            raise UserError(f"{self.where}: needs jinja2: pip install jinja2") from None
        except Exception as error:  # a parser may raise anything
            line = getattr(error, "lineno", None)
            raise UserError(f"{self.where}{f', line {line}' if line else ''}: {_told(error)}") from None

    def end_id(self, tokenizer: Tokenizer) -> int:
        """The id that ends a response: the first special one after its content, else the end of text."""
        answer = "Yes"
        try:
            text = self._render([Message("user", "Hi"), Message("assistant", answer)], tokenizer)[0]
        except UserError:
            return tokenizer.end_of_text
        found = _special_pattern(tokenizer).search(text, text.rfind(answer) + len(answer))
        return tokenizer.special_tokens[found[0]] if found else tokenizer.end_of_text

    def around_user(self, tokenizer: Tokenizer) -> tuple[str, str]:
        """What stands right before and after the content of a user's first message; nothing where that is unknown."""
        try:
            text = self._render([Message("user", HELD)], tokenizer)[0]
        except UserError:
            return "", ""
        before, found, after = text.partition(HELD)
        special = _special_pattern(tokenizer)
        first = [match.start() for match in special.finditer(before)] or [before.rfind("\n", 0, -1) + 1]
        end = special.search(after)
        return (before[first[-1] :], after[: end.end()] if end else after) if found else ("", "")

    def prompt(self, messages: Sequence[Message], tokenizer: Tokenizer) -> list[int]:
        """The ids of a conversation up to where the assistant's next content begins. Raises UserError."""
        text, _ = self._render(messages, tokenizer, prompts=True)
        return _ids(text, np.zeros(len(text), dtype=bool), tokenizer)[0]

    def encode(
        self,
        messages: Sequence[Message],
        tokenizer: Tokenizer,
        roles: Sequence[str] = ASSISTANT,
        tools: Sequence[Any] | None = None,
    ) -> tuple[list[int], list[bool]]:
        """The ids of a conversation up to its last trained token; and which are trained, those of `roles`.

        Raises UserError for what the template refuses, and where it does not tell what is trained.
        """
        whole, generated = self._render(messages, tokenizer, tools)
        flags = np.zeros(len(whole), dtype=bool)
        marked = {"assistant"} if self._marks else set[str]()
        if marked.intersection(roles):
            for start, stop in generated:
                flags[start:stop] = True
        number = 0
        while number < len(messages):
            stop, role = number + 1, messages[number].role
            if role in roles and role not in marked:
                while (end := self._end(messages, stop, whole, tokenizer, tools)) is None:
                    # Templates write neighbours of one role, results of tools above all, as one turn.
                    if stop == len(messages) or messages[stop].role != role:
                        raise UserError(
                            f"{self.where} writes messages[{stop - 1}] otherwise when more follow, so what is trained "
                            "of it is not known; end the conversation there, or mark it by {% generation %}"
                        )
                    stop += 1
                start = self._start(messages, number, whole[:end], tokenizer, tools)
                flags[start : self._trimmed(whole, start, end, tokenizer)] = True
            number = stop
        if not flags.any():
            raise UserError(f"{self.where} writes nothing that is trained ({', '.join(roles)})")
        ids, trained = _ids(whole, flags, tokenizer)
        last = len(trained) - trained[::-1].index(True) if any(trained) else 0
        return ids[:last], trained[:last]

    def _end(self, messages: Sequence[Message], stop: int, whole: str, *given: Any) -> int | None:
        """Where the first `stop` messages end; None where they are not how the conversation begins."""
        if stop == len(messages):
            return len(whole)
        text, _ = self._render(messages[:stop], *given)
        return len(text) if whole.startswith(text) else None

    def _start(self, messages: Sequence[Message], number: int, whole: str, tokenizer: Tokenizer, tools: Any) -> int:
        """Where what is trained of a message begins, in the conversation up to its end."""
        message = messages[number]
        if number and message.role == "assistant":
            text, _ = self._render(messages[:number], tokenizer, tools, prompts=True)
            if not whole.startswith(text):
                raise UserError(
                    f"{self.where} writes messages[{number}] otherwise than its generation prompt, so what is trained "
                    "of it is not known; mark it by {% generation %}"
                )
            return len(text)
        text = self._render(messages[:number], tokenizer, tools)[0] if number else ""
        if not whole.startswith(text):
            raise UserError(
                f"{self.where} writes messages[{number - 1}] otherwise when more follow, so what is trained of the "
                "next is not known; name other data.trained_roles, or another template"
            )
        before = len(text)
        special = [match.start() for match in _special_pattern(tokenizer).finditer(whole, before)]
        content = _held(message.content.strip(), tokenizer)
        for end in (special[-1] if special else len(whole), len(whole)):
            if content and (found := whole.rfind(content, before, end)) >= 0:
                return found
        return before

    def _trimmed(self, whole: str, start: int, end: int, tokenizer: Tokenizer) -> int:
        """The end, without the white space after the last special token."""
        found = [match.end() for match in _special_pattern(tokenizer).finditer(whole, start, end)]
        return found[-1] if found and not whole[found[-1] : end].strip() else end

    def _render(
        self,
        messages: Sequence[Message],
        tokenizer: Tokenizer,
        tools: Sequence[Any] | None = None,
        prompts: bool = False,
    ) -> tuple[str, list[tuple[int, int]]]:
        """The text, with HELD in the special tokens that are plain text; and where what is generated stands in it."""
        try:
            text = self._function(
                messages=[_held(message.table(), tokenizer) for message in messages],
                tools=None if tools is None else _held(list(tools), tokenizer),
                documents=None,
                add_generation_prompt=prompts,
                **tokenizer.names,
            )
        except Exception as error:  # a template may raise anything
            raise UserError(f"{self.where}: {_told(error)}") from None
        pieces, spans, begun, place = [], [], [], 0
        for piece in re.split(f"([{OPEN}{CLOSE}])", text):
            if piece == OPEN:
                begun.append(place)
            elif piece == CLOSE and begun:
                spans.append((begun.pop(), place))
            elif piece != CLOSE:
                pieces.append(piece)
                place += len(piece)
        return "".join(pieces), spans


def tokenizer_template(tokenizer: Tokenizer) -> JinjaTemplate | None:
    """What lies with a tokenizer: `chat_template.jinja`, else the `chat_template` of its `tokenizer_config.json`.

    Of several by name it is `default`, and `tool_use` for conversations with tools. Raises UserError.
    """
    file = tokenizer.path.with_name("chat_template.jinja")
    if tokenizer.path.name == "tokenizer.json" and file.is_file():
        return read_jinja(file)
    content = tokenizer.files.get("tokenizer_config.json")
    told = json.loads(content.decode("utf-8-sig")).get("chat_template") if content else None
    where = str(tokenizer.path.with_name("tokenizer_config.json"))
    if isinstance(told, list):
        try:
            named = {one["name"]: one["template"] for one in told}
            told = _by_tools(named["default"], named.get("tool_use"))
        except (KeyError, TypeError) as error:
            raise UserError(
                f"{where}: chat_template: no list of names and templates with a default: {error!r}"
            ) from None
    if told is None:
        return None
    if not isinstance(told, str):
        raise UserError(f"{where}: chat_template = {told!r}: must be a string")
    return JinjaTemplate(told, f"{where}: chat_template")


def read_jinja(file: Any) -> JinjaTemplate:
    """A template file. Raises UserError."""
    try:
        return JinjaTemplate(file.read_text(encoding="utf-8-sig"), str(file))
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not a Jinja file: byte {error.start} is not UTF-8") from None
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from None


def _by_tools(default: str, tool_use: str | None) -> str:
    """One template of two. A template's last end of line is nothing to jinja2."""
    if tool_use is None:
        return default
    first, second = (text.removesuffix("\n") for text in (tool_use, default))
    return f"{{% if tools is not none +%}}{first}{{%+ else +%}}{second}{{%+ endif %}}"


def _held(value: Any, tokenizer: Tokenizer) -> Any:
    """The same with HELD in every special token that a string spells."""
    if isinstance(value, str):
        value = value.replace(OPEN, "\ufffd").replace(CLOSE, "\ufffd")
        if value != HELD:
            value = value.replace(HELD, "\ufffd")
        return _special_pattern(tokenizer).sub(lambda found: found[0][0] + HELD + found[0][1:], value)
    if isinstance(value, Mapping):
        return {_held(key, tokenizer): _held(item, tokenizer) for key, item in value.items()}
    return [_held(item, tokenizer) for item in value] if isinstance(value, (list, tuple)) else value


def _special_pattern(tokenizer: Tokenizer, between: str = "") -> re.Pattern[str]:
    """Any special token; `between` its first character and the others."""
    spelled = sorted((token for token in tokenizer.special_tokens if token), key=len, reverse=True)
    return re.compile("|".join(re.escape(token[0]) + between + re.escape(token[1:]) for token in spelled) or r"(?!)")


def _ids(text: str, flags: np.ndarray, tokenizer: Tokenizer) -> tuple[list[int], list[bool]]:
    """The ids of a rendered text; a token is trained where any of its characters is. flags: bool [characters]."""
    ids: list[int] = []
    trained: list[bool] = []

    def add(start: int, stop: int, plain: bool) -> None:
        here = np.array([letter != HELD for letter in text[start:stop]], dtype=bool)
        piece, known = text[start:stop].replace(HELD, ""), flags[start:stop][here]
        if not piece:
            return
        found, ends = tokenizer.encode_spans(piece, special=not plain)
        counts = np.concatenate([[0], np.cumsum(known)])
        before = 0
        for token, end in zip(found, ends):
            # A character of several tokens: those after the first are trained as it is.
            trained.append(bool(counts[end] > counts[before]) if end > before else bool(trained and trained[-1]))
            ids.append(token)
            before = max(before, end)

    place = 0
    for held in _special_pattern(tokenizer, HELD).finditer(text):
        add(place, held.start(), False)
        add(held.start(), held.end(), True)
        place = held.end()
    add(place, len(text), False)
    if tokenizer.begin_of_text is not None and ids[:1] != [tokenizer.begin_of_text]:
        ids, trained = [tokenizer.begin_of_text, *ids], [False, *trained]
    return ids, trained


def _told(error: BaseException) -> str:
    """An error of jinja2, or of the template, in one line."""
    kind = type(error).__name__
    return " ".join(f"{'' if kind == 'TemplateError' else f'{kind}: '}{error}".split())


def _compiled(source: str) -> tuple[Callable[..., str], bool]:
    """A template as a function of its variables, and whether it has blocks of what is generated."""
    from jinja2 import nodes
    from jinja2.exceptions import SecurityError, TemplateError
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}` ... `{% endgeneration %}`: what the model writes."""

        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("_around"), [], [], body).set_lineno(line)

        def _around(self, caller: Callable[[], str]) -> str:
            return OPEN + caller() + CLOSE

    class Bounded(ImmutableSandboxedEnvironment):
        """What is costly is counted."""

        intercepted_binops = frozenset(["*", "**"])
        rounds = 0

        @property
        def round(self) -> None:
            self.rounds += 1
            if self.rounds > MOST_LOOPS:
                raise SecurityError(f"loops more than {MOST_LOOPS} times")

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            numbers = all(isinstance(side, (int, float)) for side in (left, right))
            if operator == "**" and numbers and abs(right) > 64:
                raise SecurityError(f"the power {left} ** {right} is too large")
            if operator == "*" and not numbers:
                size, times = (left, right) if isinstance(right, int) else (right, left)
                if isinstance(times, int) and len(size) * times > MOST_COPIES:
                    raise SecurityError(f"multiplies {len(size)} elements {times} times")
            return super().call_binop(context, operator, left, right)

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def strftime_now(form: str) -> str:
        return datetime.now().strftime(form)

    def tojson(value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys=False):
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = Bounded(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"])
    environment.filters["tojson"] = tojson
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": strftime_now}
    tree = environment.parse(source)
    for node in list(tree.find_all((nodes.For, nodes.Macro))):
        node.body.insert(0, nodes.ExprStmt(nodes.EnvironmentAttribute("round")).set_lineno(node.lineno))
    tree.set_environment(environment)
    marked = any(isinstance(block.call.node, nodes.ExtensionAttribute) for block in tree.find_all(nodes.CallBlock))
    template = environment.template_class.from_code(environment, environment.compile(tree), environment.globals)

    def render(**variables: Any) -> str:
        environment.rounds = 0
        return template.render(**variables)

    return render, marked
