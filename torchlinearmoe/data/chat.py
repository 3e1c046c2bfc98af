"""How the messages of a file become documents: by which template, and which roles are trained."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from torchlinearmoe.data.chat_template import Template, template_of
from torchlinearmoe.data.messages import ASSISTANT, Conversation, parse_conversation
from torchlinearmoe.data.store import Encoded, document_key
from torchlinearmoe.data.tokenizer import Tokenizer
from torchlinearmoe.errors import UserError


@dataclass(frozen=True)
class Chat:
    """What decides the tokens of a conversation, beside the tokenizer."""

    template: Template
    roles: tuple[str, ...] = ASSISTANT
    """Whose messages are trained."""

    def encode(self, entry: Any, tokenizer: Tokenizer) -> Encoded:
        """The document of one line, as JSON has it. Raises ValueError that names what is wrong with it."""
        conversation = parse_conversation(entry, self.roles)
        ids, trained = self.template.encode(conversation.messages, tokenizer, self.roles, conversation.tools)
        return Encoded(document_key(self._key(conversation)), ids, trained)

    def _key(self, conversation: Conversation) -> str:
        """What two conversations have in common that are held out together."""
        messages: list[Any] = [[message.role, message.content] for message in conversation.messages]
        if self.template.reads_all and (conversation.tools or any(message.turn for message in conversation.messages)):
            messages = [[message.table() for message in conversation.messages], conversation.tools]
            return json.dumps(messages, sort_keys=True)
        return json.dumps(messages)

    def described(self) -> dict[str, Any]:
        """As JSON, for a folder of tokens."""
        return {"kind": self.template.kind, "template": self.template.source, "roles": list(self.roles)}

    @classmethod
    def of(cls, described: dict[str, Any], where: str) -> Chat:
        """What `described` wrote into `where`. Raises UserError."""
        try:
            template = template_of(described["kind"], described["template"], "the chat template")
            return cls(template, tuple(described["roles"]))
        except (KeyError, TypeError) as error:
            raise UserError(f"{where}: damaged: {error!r}; delete it and prepare again") from None

    def told(self, tokenizer: Tokenizer) -> str:
        """All of it in a string, which is part of the name of cached tokens."""
        told = [self.template.source]
        if self.template.reads_all:
            told += [self.template.kind, json.dumps(dict(tokenizer.names), sort_keys=True)]
        if self.roles != ASSISTANT:
            told.append(f"trained roles {' '.join(sorted(self.roles))}")
        return "\n".join(told)

    def check(self, made: dict[str, Any] | None, folder: Any) -> None:
        """Raise UserError where tokens, of which `made` is `described`, are not those of these messages."""
        if made is None:
            raise UserError(f"data.paths: '{folder}' holds tokens of text, not of messages; set data.format = 'text'")
        if (made.get("kind"), made.get("template")) != (self.template.kind, self.template.source):
            raise UserError(
                f"data.chat_template: the messages in '{folder}' were prepared by another template than "
                f"{self.template.where}; name that one, or prepare them again with --chat-template"
            )
        if sorted(made.get("roles", ())) != sorted(self.roles):
            raise UserError(
                f"data.trained_roles = {list(self.roles)}: of the messages in '{folder}' those of "
                f"{list(made.get('roles', ()))} are trained; say the same, or prepare them again with --trained-roles"
            )
