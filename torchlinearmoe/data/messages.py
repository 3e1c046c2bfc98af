"""What a line of a conversation file says: JSON, one conversation a line.

    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]}
    {"prompt": "Hi", "response": "Hello."}

Tools, for templates that write them: `tools` beside `messages` has their JSON schemas, an assistant's message its
`tool_calls`, and a message of the role `tool` what came back:

    {"tools": [{"type": "function", "function": {"name": "clock", "parameters": {...}}}],
     "messages": [{"role": "user", "content": "What time is it?"},
                  {"role": "assistant", "tool_calls": [{"function": {"name": "clock", "arguments": {"zone": "UTC"}}}]},
                  {"role": "tool", "name": "clock", "content": "12:04"},
                  {"role": "assistant", "content": "Four past twelve."}]}

Arguments are an object, or the JSON of one in a string. Whatever else a message holds is the template's to read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

ROLES = ("system", "developer", "user", "assistant", "tool")
ASSISTANT = ("assistant",)
"""The roles that are trained where nothing else is said."""


class Message(NamedTuple):
    """One turn."""

    role: str
    content: str
    turn: Mapping[str, Any] | None = None
    """All of it, role and content too, as the line has it; None where there is nothing else."""

    def table(self) -> dict[str, Any]:
        """As a template that reads all of it gets it."""
        return {"role": self.role, "content": self.content} if self.turn is None else dict(self.turn)


class Conversation(NamedTuple):
    """The turns, and the tools that they may call."""

    messages: Sequence[Message]
    tools: Sequence[Any] | None = None


def parse_conversation(entry: Any, trained_roles: Sequence[str] = ASSISTANT) -> Conversation:
    """The conversation of one line. Raises ValueError that names what is wrong with it."""
    if not isinstance(entry, dict):
        raise ValueError("not an object")
    entry = _cleaned(entry)
    if "messages" in entry:
        turns = entry["messages"]
        if not isinstance(turns, list):
            raise ValueError('"messages" is not a list')
        legal = tuple(dict.fromkeys((*ROLES, *trained_roles)))
        messages = [_message(turn, f"messages[{index}]", legal) for index, turn in enumerate(turns)]
    elif "prompt" in entry and "response" in entry:
        pairs = (("user", "prompt"), ("assistant", "response"))
        messages = [_message({"role": role, "content": entry[key]}, key, ROLES) for role, key in pairs]
    else:
        raise ValueError('neither "messages" nor "prompt" and "response"')
    if not any(message.role in trained_roles for message in messages):
        raise ValueError(f"no message of the {' or '.join(trained_roles)}: nothing to train on")
    return Conversation(messages, _tools(entry.get("tools")))


def _message(turn: Any, where: str, legal: Sequence[str]) -> Message:
    if not isinstance(turn, dict):
        raise ValueError(f"{where} is not an object")
    role, content = turn.get("role"), turn.get("content")
    if not isinstance(role, str) or role not in legal:
        raise ValueError(f"{where}: role {role!r}; legal: {', '.join(legal)}")
    calls = _calls(turn["tool_calls"], f"{where}: tool_calls") if turn.get("tool_calls") else None
    if calls:
        turn = {**turn, "tool_calls": calls}
    if not isinstance(content, str) and not (content is None and calls):
        raise ValueError(f"{where}: the content is not a string")
    return Message(role, content or "", turn if len(turn) > 2 or calls else None)


def _calls(calls: Any, where: str) -> list[dict[str, Any]]:
    """Calls with their arguments as objects."""
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise ValueError(f"{where} is not a list of objects")
    found = []
    for index, call in enumerate(calls):
        function = call.get("function", call)
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ValueError(f"{where}[{index}]: no function with a name")
        arguments = function.get("arguments", {})
        if isinstance(arguments, str):
            arguments = _json(arguments, f"{where}[{index}]: the arguments of {function['name']}") if arguments else {}
        if not isinstance(arguments, dict):
            raise ValueError(f"{where}[{index}]: the arguments of {function['name']} are no object")
        function = {**function, "arguments": arguments}
        found.append({**call, "function": function} if "function" in call else function)
    return found


def _tools(tools: Any) -> list[Any] | None:
    if isinstance(tools, str):
        tools = _json(tools, "tools") if tools else None
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise ValueError('"tools" is not a list of objects')
    return tools or None


def _json(text: str, what: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError(f"{what}: a string that is not JSON") from None


def _cleaned(value: Any) -> Any:
    """JSON can spell half a character, which has no UTF-8 form: it becomes U+FFFD in every string."""
    if isinstance(value, str):
        return value if value.isascii() else value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, list):
        return [_cleaned(item) for item in value]
    if isinstance(value, dict):
        return {_cleaned(key): _cleaned(item) for key, item in value.items()}
    return value
