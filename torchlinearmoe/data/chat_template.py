"""How a conversation is written as tokens, and which of them are trained.

A template is the Jinja of a tokenizer (see `jinja_template.py`), or a TOML file with one line of text a role,
`{content}` once in each, and `{end}` where a turn ends; the roles developer and tool may be left out:

    end = "<|im_end|>"
    user = "<|im_start|>user\\n{content}{end}\\n"
    assistant = "<|im_start|>assistant\\n{content}{end}\\n"

Special tokens of the tokenizer that the template spells are one id each; in the content they are plain text, so that no
content can end a turn. `{end}` is the special token `end`, or the end of text where the tokenizer has no such token.
Before the first turn comes the token that starts every document: the begin of text where the tokenizer has one.
Trained are the assistant's content and the end right after it, or those of the roles that are asked for:

    <|endoftext|> <|im_start|> user \\n Hi <|im_end|> \\n <|im_start|> assistant \\n Hello . <|im_end|> \\n
    trained                                                                       ^^^^^ ^ ^^^^^^^^^^
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torchlinearmoe.data.jinja_template import JinjaTemplate, read_jinja, tokenizer_template
from torchlinearmoe.data.messages import ASSISTANT, ROLES, Message
from torchlinearmoe.data.tokenizer import Tokenizer
from torchlinearmoe.disk import expanded
from torchlinearmoe.errors import UserError, nearest

TEMPLATES = Path(__file__).parent / "templates"
NEEDED = ("system", "user", "assistant")
OF_TOKENIZER = "tokenizer"
"""The template that lies with the tokenizer."""
CONTENT, END = "{content}", "{end}"


@dataclass(frozen=True)
class ChatTemplate:
    """A template: what stands before and after the content of each role."""

    source: str
    """The TOML text."""
    around: dict[str, tuple[str, str]]
    end: str
    where: str = field(compare=False)
    """What errors call it."""
    kind = "toml"
    reads_all = False
    """Whether it reads more of a message than role and content."""

    def end_id(self, tokenizer: Tokenizer) -> int:
        """The id that ends a response."""
        return tokenizer.special_tokens.get(self.end, tokenizer.end_of_text)

    def encode(
        self,
        messages: Sequence[Message],
        tokenizer: Tokenizer,
        roles: Sequence[str] = ASSISTANT,
        tools: Sequence[Any] | None = None,
    ) -> tuple[list[int], list[bool]]:
        """The ids of a conversation, the start marker first, up to its last trained token; and which are trained: the
        contents of `roles` and their ends. Raises UserError for roles and tools that the template has no form for."""
        if tools or any(message.turn and message.turn.get("tool_calls") for message in messages):
            raise UserError(
                f"{self.where} has no form for tools; name one that has in data.chat_template, 'tools' perhaps"
            )
        ids, trained = [tokenizer.start], [False]
        for message in messages:
            before, after = self._around(message)
            answers = message.role in roles
            after_ids = self._literal(after, tokenizer)
            for part, learnt in (
                (self._literal(before, tokenizer), False),
                (tokenizer.encode(message.content), answers),
                (after_ids[:1], answers),
                (after_ids[1:], False),
            ):
                ids += part
                trained += [learnt] * len(part)
        while trained and not trained[-1]:
            ids.pop()
            trained.pop()
        return ids, trained

    def prompt(self, messages: Sequence[Message], tokenizer: Tokenizer) -> list[int]:
        """The ids of a conversation, the start marker first, up to where the assistant's next content begins."""
        ids = [tokenizer.start]
        for message in messages:
            before, after = self._around(message)
            ids += self._literal(before, tokenizer) + tokenizer.encode(message.content)
            ids += self._literal(after, tokenizer)
        return ids + self._literal(self.around["assistant"][0], tokenizer)

    def around_user(self, tokenizer: Tokenizer) -> tuple[str, str]:
        """The text before and after the content of a user's message."""
        end = tokenizer.decode([self.end_id(tokenizer)])
        before, after = (part.replace(END, end) for part in self.around["user"])
        return before, after

    def as_jinja(self, tokenizer: Tokenizer) -> str:
        """The same as Jinja for `apply_chat_template`, what is trained of the assistant in `{% generation %}`.

        The text is the same, and so are the ids, unless a role's line has white space before `{content}`: transformers
        cuts a text between special tokens as one, and may join the two.
        """
        end = _spelled(tokenizer, self.end_id(tokenizer))
        quoted = {role: [_quoted(part.replace(END, end)) for part in parts] for role, parts in self.around.items()}
        lines = [
            f"{{{{- {_quoted(_spelled(tokenizer, tokenizer.start))} -}}}}",
            "{%- if tools -%}{{- raise_exception('the template has no form for tools') -}}{%- endif -%}",
            "{%- for message in messages -%}",
        ]
        for number, (role, (before, after)) in enumerate(quoted.items()):
            lines.append(f"{{%- {'elif' if number else 'if'} message.role == {_quoted(role)} -%}}")
            if role == "assistant":
                rest = _quoted(self.around[role][1].removeprefix(END).replace(END, end))
                lines += [
                    f"{{{{- {before} -}}}}{{%- generation -%}}",
                    f"{{{{- (message.content or '') + {_quoted(end)} -}}}}{{%- endgeneration -%}}{{{{- {rest} -}}}}",
                ]
            else:
                lines.append(f"{{{{- {before} + (message.content or '') + {after} -}}}}")
        lines += [
            "{%- else -%}{{- raise_exception('the template has no line for the role ' + message.role) -}}{%- endif -%}",
            "{%- endfor -%}",
            f"{{%- if add_generation_prompt -%}}{{{{- {quoted['assistant'][0]} -}}}}{{%- endif -%}}",
        ]
        return "\n".join(lines) + "\n"

    def _around(self, message: Message) -> tuple[str, str]:
        if message.role not in self.around:
            raise UserError(
                f"{self.where} has no line for the role '{message.role}'; add one to a template of your own, or name a "
                "Jinja template in data.chat_template"
            )
        return self.around[message.role]

    def _literal(self, text: str, tokenizer: Tokenizer) -> list[int]:
        """The ids of the template's own text."""
        special = {END: self.end_id(tokenizer), **tokenizer.special_tokens}
        pattern = "|".join(re.escape(token) for token in sorted(special, key=len, reverse=True))
        ids: list[int] = []
        for piece in re.split(f"({pattern})", text):
            ids += [special[piece]] if piece in special else tokenizer.encode(piece) if piece else []
        return ids


def _spelled(tokenizer: Tokenizer, index: int) -> str:
    """A special token by its id."""
    known = (token for token, found in tokenizer.special_tokens.items() if found == index)
    return next(known, tokenizer.decode([index]))


def _quoted(text: str) -> str:
    """A string of Jinja, whose escapes are those of JSON."""
    return json.dumps(text, ensure_ascii=False)


Template = ChatTemplate | JinjaTemplate


def load_template(name: str, tokenizer: Tokenizer | None = None) -> Template:
    """The template that ships under `name`, the one of the `tokenizer`, or the one in the file `name`.

    Raises UserError that names the mistake.
    """
    shipped = sorted(path.stem for path in TEMPLATES.iterdir())
    if name == OF_TOKENIZER and tokenizer is not None:
        found = tokenizer_template(tokenizer)
        if found is None:
            raise UserError(
                f"data.chat_template = '{name}': neither a chat_template.jinja nor a chat_template in a "
                f"tokenizer_config.json lies with {tokenizer.path}; {nearest(name, shipped)}"
            )
        return found
    path = _shipped(name) if name in shipped else expanded(name, "data.chat_template")
    if not path.is_file():
        raise UserError(
            f"data.chat_template = '{name}': no such file or template; {nearest(name, [*shipped, OF_TOKENIZER])}"
        )
    if path.suffix == ".jinja":
        return read_jinja(path)
    try:
        return parse_template(path.read_text(encoding="utf-8-sig"), str(path))
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not a TOML file: byte {error.start} is not UTF-8") from None


def _shipped(name: str) -> Path:
    (path,) = TEMPLATES.glob(f"{name}.*")
    return path


def template_of(kind: str, source: str, where: str) -> Template:
    """A template of its text, as `kind` and `source` of another one tell it. Raises UserError."""
    return JinjaTemplate(source, where) if kind == JinjaTemplate.kind else parse_template(source, where)


def parse_template(text: str, where: str) -> ChatTemplate:
    """A template from its TOML text. Raises UserError that names `where` and the key."""
    try:
        table = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not valid TOML: {error}") from None
    around: dict[str, tuple[str, str]] = {}
    for key, value in table.items():
        if key not in (*ROLES, "end"):
            raise UserError(f"{where}: {key}: unknown key; {nearest(key, (*ROLES, 'end'))}")
        if not isinstance(value, str):
            raise UserError(f"{where}: {key} = {value!r}: must be a string")
        if key in ROLES:
            before, content, after = value.partition(CONTENT)
            if not content or CONTENT in after:
                raise UserError(f"{where}: {key} = {value!r}: must hold {CONTENT} once")
            around[key] = before, after
    for role in NEEDED:
        if role not in around:
            raise UserError(f"{where}: '{role}' is missing")
    if not around["assistant"][1].startswith(END):
        raise UserError(f"{where}: assistant: {END} must follow {CONTENT}, or no response would ever end")
    return ChatTemplate(text, around, table.get("end", ""), where)
