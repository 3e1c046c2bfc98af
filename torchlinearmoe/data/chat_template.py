"""How a conversation is written as tokens, and which of them are trained.

A template is a TOML file with one line of text a role, `{content}` once in each, and `{end}` where a turn ends:

    end = "<|im_end|>"
    user = "<|im_start|>user\\n{content}{end}\\n"
    assistant = "<|im_start|>assistant\\n{content}{end}\\n"

Special tokens of the tokenizer that the template spells are one id each; in the content they are plain text, so that no
content can end a turn. `{end}` is the special token `end`, or the end of text where the tokenizer has no such token.
Before the first turn comes the token that starts every document: the begin of text where the tokenizer has one.
Trained are the assistant's content and the end right after it:

    <|endoftext|> <|im_start|> user \\n Hi <|im_end|> \\n <|im_start|> assistant \\n Hello . <|im_end|> \\n
    trained                                                                       ^^^^^ ^ ^^^^^^^^^^
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from torchlinearmoe.data.tokenizer import Tokenizer
from torchlinearmoe.disk import expanded
from torchlinearmoe.errors import UserError, nearest

TEMPLATES = Path(__file__).parent / "templates"
ROLES = ("system", "user", "assistant")
CONTENT, END = "{content}", "{end}"


class Message(NamedTuple):
    """One turn."""

    role: str
    content: str


@dataclass(frozen=True)
class ChatTemplate:
    """A template: what stands before and after the content of each role."""

    source: str
    """The TOML text."""
    around: dict[str, tuple[str, str]]
    end: str

    def end_id(self, tokenizer: Tokenizer) -> int:
        """The id that ends a response."""
        return tokenizer.special_tokens.get(self.end, tokenizer.end_of_text)

    def encode(self, messages: Sequence[Message], tokenizer: Tokenizer) -> tuple[list[int], list[bool]]:
        """The ids of a conversation, the start marker first, up to its last trained token; and which are trained."""
        ids, trained = [tokenizer.start], [False]
        for message in messages:
            before, after = self.around[message.role]
            answers = message.role == "assistant"
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
            before, after = self.around[message.role]
            ids += self._literal(before, tokenizer) + tokenizer.encode(message.content)
            ids += self._literal(after, tokenizer)
        return ids + self._literal(self.around["assistant"][0], tokenizer)

    def _literal(self, text: str, tokenizer: Tokenizer) -> list[int]:
        """The ids of the template's own text."""
        special = {END: self.end_id(tokenizer), **tokenizer.special_tokens}
        pattern = "|".join(re.escape(token) for token in sorted(special, key=len, reverse=True))
        ids: list[int] = []
        for piece in re.split(f"({pattern})", text):
            ids += [special[piece]] if piece in special else tokenizer.encode(piece) if piece else []
        return ids


def load_template(name: str) -> ChatTemplate:
    """The template that ships under `name`, or the one in the file `name`. Raises UserError that names the mistake."""
    shipped = sorted(path.stem for path in TEMPLATES.glob("*.toml"))
    path = TEMPLATES / f"{name}.toml" if name in shipped else expanded(name, "data.chat_template")
    if not path.is_file():
        raise UserError(f"data.chat_template = '{name}': no such file or template; {nearest(name, shipped)}")
    try:
        return parse_template(path.read_text(encoding="utf-8-sig"), str(path))
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not a TOML file: byte {error.start} is not UTF-8") from None


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
    for role in ROLES:
        if role not in around:
            raise UserError(f"{where}: '{role}' is missing")
    if not around["assistant"][1].startswith(END):
        raise UserError(f"{where}: assistant: {END} must follow {CONTENT}, or no response would ever end")
    return ChatTemplate(text, around, table.get("end", ""))
